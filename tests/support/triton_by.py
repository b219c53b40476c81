"""Who runs Triton's kernels: a GPU, the machine of tests/simt/ptx as they are compiled for one, or the interpreter.

``SMOLVLA_FAST_TRITON`` says which where there is no GPU: "sm_90" (without it, where the machine can be built), "sm_80", or
"interpreter". It is asked once, before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from simt.emulator import build

ACCEPTED = ("sm_90", "sm_80", "interpreter")


def _by() -> str:
    if torch.cuda.is_available():
        return "gpu"
    asked = os.environ.get("SMOLVLA_FAST_TRITON")
    if asked:
        if asked not in ACCEPTED:
            raise pytest.UsageError(f"SMOLVLA_FAST_TRITON={asked}; accepted are {', '.join(ACCEPTED)}")
        return asked
    try:
        build.tools()
        build.python_includes()
    except build.Unavailable:
        return "interpreter"
    return "sm_90"


BY = _by()
INTERPRETED = BY == "interpreter"
CAPABILITY = int(BY.removeprefix("sm_")) if BY.startswith("sm_") else None
"""That kernels are compiled for, where the machine runs them."""
BF16 = [pytest.mark.gpu] if INTERPRETED else []
"""Marks of a test in bf16: under the interpreter its products are broken."""
FP16 = [] if INTERPRETED else [pytest.mark.long]
"""Of one in fp16 beside the same in bf16: each is a kernel to compile, and what sizes change in one they change in both.
Under the interpreter fp16 stands for bf16."""
FP8 = (
    [pytest.mark.skip(reason="8-bit floats are compiled from sm_89 on")]
    if CAPABILITY and CAPABILITY < 89
    else []
)


def prepare() -> None:
    """Before Triton is imported: its kernels are made for a compiler, or for the interpreter, when they are imported."""
    if BY == "gpu":
        return
    if CAPABILITY is not None and find_spec("triton") is not None:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton"))
        import smolvla_fast.ops.triton.ops  # noqa: F401
    os.environ["TRITON_INTERPRET"] = "1"  # so that a CPU may be asked; and of processes that tests start


def launches() -> int:
    """Of kernels by the machine, so far."""
    if CAPABILITY is None:
        return 0
    from simt.ptx.launcher import launched

    return launched.total()


@contextmanager
def running() -> Iterator[None]:
    """Inside, kernels can be launched."""
    if CAPABILITY is None or find_spec("triton") is None:
        yield
        return
    from simt.ptx.launcher import machine

    with machine(CAPABILITY):
        yield
