"""CUDA C++ on the host: every test in this folder is marked `simt`, and runs kernels on the emulator."""

from pathlib import Path

import pytest
import torch
from simt.emulator import build
from support.backends import SEEDS, compiled, emulator, loaded, over_seeds

__all__ = ["compiled", "emulator", "over_seeds"]
HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.simt)


@pytest.fixture(params=SEEDS)
def scheduler_seed(request, emulator):
    """Three orders in which threads run; the emulator is set to it."""
    emulator.configure(seed=request.param)
    return request.param


class Planted:
    """The kernels of tests/simt/planted on two arrays of 32-bit words."""

    def __init__(self, module):
        self.module = module

    def run(self, name, a=64, b=64, seed=0, mended=True):
        """Run a kernel on tensors, or on so many words of zeros; returns both. Guards around each stay untouched."""
        arrays = [_guarded(x) for x in (a, b)]
        self.module.forget()
        for _, words in arrays:
            self.module.allow(words.data_ptr(), words.numel() * words.element_size())
        self.module.configure(seed=seed, compute_capability=90)
        self.module.run(name, mended, *(words.data_ptr() for _, words in arrays))
        for whole, words in arrays:
            guards = torch.cat([whole[:GUARD], whole[GUARD + words.numel() :]])
            assert (guards.view(torch.int32) == 0x55555555).all(), f"{name} wrote beside its array"
        return tuple(words for _, words in arrays)


GUARD = 64


def _guarded(given):
    given = torch.zeros(given, dtype=torch.int32) if isinstance(given, int) else given.view(torch.int32)
    whole = torch.full((given.numel() + 2 * GUARD,), 0x55555555, dtype=torch.int32)
    words = whole[GUARD : GUARD + given.numel()]
    words.copy_(given.reshape(-1))
    return whole, words


@pytest.fixture(scope="session")
def planted():
    """Kernels for the emulator's own tests, in a module of their own."""
    folder = HERE / "planted"
    module = loaded(lambda: build.load("_planted", sorted(folder.glob("*.cu")), [folder / "bindings.cpp"]))
    yield Planted(module)
    module.reset()
