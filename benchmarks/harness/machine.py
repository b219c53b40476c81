"""What this machine can do at best, measured in the same run: the roof under which every figure is put."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from smolvla_fast.ops.reference import Cost
from smolvla_fast.ops.torch.linear import linear

# Large enough to reach a machine's top speed, small enough for a second on two cores.
GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class Ceilings:
    """This machine's best: operations a second in matrix products by dtype, bytes a second in copying.

    int8 is missing where torch has no such product here.
    """

    flops: dict[torch.dtype, float]
    bytes: float

    def floor(self, cost: Cost, dtype: torch.dtype) -> dict[str, float]:
        """The least time for so much work: whichever of arithmetic and memory takes longer."""
        least = max(cost.flops / self.best(dtype), cost.bytes / self.bytes)
        return dict(flops=cost.flops, bytes=cost.bytes, floor_ms=1e3 * least)

    def best(self, dtype: torch.dtype) -> float:
        """Operations a second of the fastest product that is no narrower: fp32 serves bf16 on a processor that multiplies
        it no slower."""
        return max(rate for wide, rate in self.flops.items() if wide.itemsize >= dtype.itemsize)

    def to_dict(self) -> dict[str, Any]:
        named = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops.items()}
        return {"gemm_flops": named, "copy_bytes": self.bytes}


def measure_ceilings(device: torch.device, small: bool = False) -> Ceilings:
    """A large matrix product in fp32, bf16 and on a CPU in 8 bits, and a large copy; the best of a few seconds of rounds.

    small  of a sixteenth of the elements and for a twentieth of the time: for tiny policies, whose times say nothing
    """
    # Timer waits for the device before and after each block of calls.
    side, budget = GEMM_SIDE[device.type] // (4 if small else 1), 0.05 if small else 1.0

    def rate(work: float, function: Callable[[], Any]) -> float:
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return work / min(timer.blocked_autorange(min_run_time=budget).times)

    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        # torch's own fp32 path is MKL, far from the roof on other makers' processors; oneDNN is near it.
        flops[dtype] = rate(2.0 * side**3, partial(linear, x, weight))
    if device.type == "cpu" and (integers := _int8(side)):
        flops[torch.int8] = rate(2.0 * side**3, integers)
    source = torch.ones(COPY_BYTES[device.type] // (64 if small else 4), device=device)
    target = torch.empty_like(source)
    return Ceilings(flops, rate(2.0 * source.nbytes, lambda: target.copy_(source)))


def ceilings_once(path: Path | None, device: torch.device, small: bool) -> Ceilings:
    """Measured by the first suite of a run that asks, and read from this file by the others."""
    if path is not None and path.is_file():
        found = json.loads(path.read_text())
        return Ceilings(
            {getattr(torch, n): rate for n, rate in found["gemm_flops"].items()}, found["copy_bytes"]
        )
    ceilings = measure_ceilings(device, small)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ceilings.to_dict()))
    return ceilings


def _int8(side: int) -> Callable[[], Any] | None:
    """uint8 activations by a prepacked int8 weight, as oneDNN multiplies them fastest; None where torch cannot."""
    x = torch.randint(0, 255, (side, side), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (side, side), dtype=torch.int8)
    scales, zeros = torch.ones(side), torch.zeros(side, dtype=torch.int32)
    with suppress(AttributeError, RuntimeError):
        packed = torch.ops.onednn.qlinear_prepack(weight, [side, side])
        given = (x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
        torch.ops.onednn.qlinear_pointwise(*given)
        return partial(torch.ops.onednn.qlinear_pointwise, *given)
    return None
