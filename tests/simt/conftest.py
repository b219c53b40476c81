"""CUDA C++ on the host: every test in this folder is marked `simt`, and runs kernels on the emulator."""

from pathlib import Path

import pytest
import torch
from simt import on_the_host
from simt.emulator import build

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.simt)


def _load(make):
    try:
        return make()
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiled():
    """The library's kernels, compiled for the emulator; only what changed is compiled."""
    return _load(build.library)


@pytest.fixture
def emulator(compiled, monkeypatch):
    """The emulator as the library on CPU tensors; settings and allowed memory are as at first."""
    compiled.reset()
    compiled.forget()
    on_the_host.install(monkeypatch, compiled)
    yield compiled
    compiled.reset()
    compiled.forget()


@pytest.fixture(params=SEEDS)
def scheduler_seed(request, emulator):
    """Three orders in which threads run; the emulator is set to it."""
    emulator.configure(seed=request.param)
    return request.param


@pytest.fixture
def over_seeds(emulator):
    """over_seeds(call) -> what call() returns, one result a seed."""

    def run(call):
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(call())
        return results

    return run


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
        self.module.configure(seed=seed)
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
    module = _load(lambda: build.load("_planted", sorted(folder.glob("*.cu")), [folder / "bindings.cpp"]))
    yield Planted(module)
    module.reset()
