"""One call of an op on prepared inputs, and as many of them as no cache holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from support.contract import OPS, check, inputs_in, room, to_device

__all__ = ["OPS", "REAL_FLOPS", "check", "cold_calls", "figures", "room"]

# Below this a case is one of the odd ones, which exist for correctness.
REAL_FLOPS = 2e6
# A working set above any processor's last-level cache, in at most so many copies.
COLD_BYTES, MAX_COPIES = 2**28, 32


def prepared(ops: Any, op: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """One call of the op, with everything done that a chunk does once for all its calls."""
    inputs = dict(inputs)
    if op == "masked_attention":
        inputs["mask"] = ops.prepare_mask(inputs["mask"])
    if op == "suffix_embed":
        names = ("times", "in_weight", "in_bias", "mlp_in_weight", "mlp_in_bias")
        folded = ops.suffix_fold(*(inputs.pop(name) for name in names))
        return lambda: ops.suffix_embed(
            inputs["x"], 1, folded, inputs["mlp_out_weight"], inputs["mlp_out_bias"]
        )
    function = getattr(ops, op)
    return lambda: function(**inputs)


def cold_calls(
    ops: Any, op: str, case: dict[str, int], dtype: torch.dtype, device: torch.device
) -> list[Callable[[], Any]]:
    """Calls on several copies of the inputs, to be made in turn: a chunk goes through its layers, and weights that one
    call leaves in the caches would flatter the next."""
    cost = room(op).cost(case, dtype.itemsize)
    copies = max(1, min(MAX_COPIES, int(COLD_BYTES // cost.bytes)))
    inputs = [to_device(inputs_in(op, case, dtype, seed)[0], device) for seed in range(2)]
    inputs += [{name: _clone(value) for name, value in inputs[0].items()} for _ in range(copies - 2)]
    return [prepared(ops, op, values) for values in inputs]


def figures(
    op: str, case: dict[str, int], dtype: torch.dtype, backend: str, p50_ms: float, ceilings: Any
) -> dict[str, Any]:
    """What the report says of an op beside its times."""
    cost = room(op).cost(case, dtype.itemsize)
    floor_ms = ceilings.floor_ms(cost.flops, cost.bytes, dtype)
    return dict(
        suite="ops", op=op, case=case, dtype=str(dtype).removeprefix("torch."), backend=backend,
        flops=cost.flops, bytes=cost.bytes,
        gflops_per_s=cost.flops / p50_ms / 1e6, gbytes_per_s=cost.bytes / p50_ms / 1e6,
        floor_ms=floor_ms, share_of_floor=floor_ms / p50_ms,
    )  # fmt: skip


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
