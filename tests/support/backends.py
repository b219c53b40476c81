"""The backends of an op as a test's parameter: CPU kernels at every level, Triton, CUDA C++ on the host emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from simt import on_the_host
from simt.emulator import build

from smolvla_fast.ops import extension
from smolvla_fast.ops.cuda import library
from support import triton_by
from support.guarded import DEVICE
from support.processors import LEVELS, at_level

SEEDS = (0, 1, 2)


def cpu_at(levels: list[Any]) -> list[Any]:
    """Backend ``cpu`` at each level of a list of ``processors``. Eager's error, by which it is judged, follows the mask."""
    marks = [pytest.mark.cpu_kernels, pytest.mark.processor]
    return [
        pytest.param(("cpu", each.values[0]), marks=[*each.marks, *marks], id=f"cpu {each.values[0]}")
        for each in levels
    ]


CPU = cpu_at(LEVELS)
TRITON = pytest.param(("triton", None), marks=pytest.mark.triton, id="triton")
CUDA = pytest.param(("cuda", None), marks=pytest.mark.simt, id="cuda")
ALL = [*CPU, TRITON, CUDA]


def with_dtypes(*grid: tuple[Any, tuple[Any, ...]]) -> list[Any]:
    """(backends, dtypes or pairs of them) of each, as parameters. Under Triton's interpreter products of bf16 are broken, so
    there fp16 stands for both."""
    found = []
    for backends, dtypes in grid:
        for each in backends:
            for dtype in dtypes:
                several = dtype if isinstance(dtype, tuple) else (dtype,)
                bf16 = triton_by.BF16 if each is TRITON and torch.bfloat16 in several else []
                identity = "-".join([each.id, *(str(one).removeprefix("torch.") for one in several)])
                marks = [*each.marks, *bf16]
                found.append(pytest.param(*each.values, dtype, marks=marks, id=identity))
    return found


@pytest.fixture(params=ALL)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Its name, while its kernels are there to be called: on a CPU at the level of the parameter."""
    name, level = request.param
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cuda":
        request.getfixturevalue("emulator")
    with at_level(level) if level else nullcontext():
        yield name


def device_of(name: str) -> str:
    return DEVICE if name == "triton" else "cpu"


def loaded(make: Callable[[], Any]) -> Any:
    """A module for the emulator; skips the test where it cannot be built."""
    try:
        return make()
    except build.Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compiled() -> Any:
    """The library's kernels, compiled for the emulator; only what changed is compiled."""
    return loaded(build.library)


@pytest.fixture
def emulator(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The emulator as the library on CPU tensors; settings and allowed memory are as at first."""
    compiled.reset()
    compiled.forget()
    on_the_host.install(monkeypatch, compiled)
    library.begins_early.cache_clear()  # noted of the GPU that the test before had configured
    yield compiled
    compiled.reset()
    compiled.forget()


@pytest.fixture
def over_seeds(emulator: Any) -> Any:
    """over_seeds(call) -> what call() returns under three orders in which threads run."""

    def run(call: Callable[[], Any]) -> list[Any]:
        results = []
        for seed in SEEDS:
            emulator.configure(seed=seed)
            results.append(call())
        return results

    return run


def at_every_level(run: Callable[[], Any], threads: tuple[int, ...] = (1, 2)) -> Iterator[Any]:
    """What ``run`` gives at every instruction level that this processor has, on so many threads."""
    before = torch.get_num_threads()
    for level in extension.load("cpu").levels():
        for count in threads:
            torch.set_num_threads(count)
            try:
                with at_level(level):
                    yield run()
            finally:
                torch.set_num_threads(before)
