"""What this machine can do at best, measured in the same run: the roof under which every figure is put."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from smolvla_fast.measure.rounds import synchronize

# Large enough to reach a machine's top speed, small enough for a second on two cores.
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Ceilings:
    """This machine's best: operations a second in matrix products by dtype, bytes a second in copying."""

    flops: dict[torch.dtype, float]
    bytes: float

    def floor_ms(self, flops: float, bytes_: float, dtype: torch.dtype) -> float:
        """The least time for so much work: whichever of arithmetic and memory takes longer."""
        return 1e3 * max(flops / self.best(dtype), bytes_ / self.bytes)

    def best(self, dtype: torch.dtype) -> float:
        """Operations a second of the fastest product that is no narrower: fp32 serves bf16 on a processor that multiplies
        it no slower."""
        return max(rate for wide, rate in self.flops.items() if wide.itemsize >= dtype.itemsize)

    def to_dict(self) -> dict[str, Any]:
        named = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops.items()}
        return {"gemm_flops": named, "copy_bytes": self.bytes}


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """A large matrix product in fp32 and bf16, and a large copy; the best of a few seconds of rounds.

    small  of a sixteenth of the elements: for tiny policies, whose times say nothing under any roof
    """
    side = gemm_side(device, small)
    flops = {dtype: _gemm(dtype, device, side) for dtype in (torch.float32, torch.bfloat16)}
    return Ceilings(flops, _copy(device, COPY_BYTES[device.type] // (16 if small else 1)))


def gemm_side(device: torch.device, small: bool) -> int:
    return GEMM_SIDE[device.type] // (4 if small else 1)


def best_seconds(function: Callable[[], Any], device: torch.device, budget: float = 1.0) -> float:
    function()
    best, end = float("inf"), time.perf_counter() + budget
    while best == float("inf") or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _gemm(dtype: torch.dtype, device: torch.device, side: int) -> float:
    x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    pointwise = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
    onednn = device.type == "cpu" and torch.backends.mkldnn.is_available() and pointwise is not None
    if onednn and (dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        # torch's own fp32 path is MKL, far from the roof on other makers' processors; oneDNN is near it.
        seconds = best_seconds(lambda: pointwise(x, weight, None, "none", [], ""), device)
    else:
        seconds = best_seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return 2.0 * side**3 / seconds


def _copy(device: torch.device, bytes_: int) -> float:
    source = torch.ones(bytes_ // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / best_seconds(lambda: target.copy_(source), device)
