"""The reference implementation of every op: the maths in plain torch, its real shapes, and the least work it can take.

A reference follows the dtype it is given. In fp64 it is the truth that every backend is judged against; in fp32 or
bf16 it runs the ATen calls of LeRobot's own model in the same order and with the same roundings, so a chunk computed by
references alone (tier ``exact``) is bit-identical to stock.

Each op's file holds the function, ``CASES`` (SmolVLA's own sizes, then odd ones), ``make_inputs(case, dtype, generator)``
and ``cost(case, itemsize)``. Tests and benchmarks read these and have no copy of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """The least an op can cost: floating point operations, and bytes that must cross memory once."""

    flops: float
    bytes: float


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics and rotations are computed: fp32, or fp64 when the input is fp64."""
    return torch.promote_types(x.dtype, torch.float32)


def randn(*shape: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Normal values drawn in fp64 and rounded once, so that every dtype tests the same numbers."""
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * scale).to(dtype)
