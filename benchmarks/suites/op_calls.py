"""One call of an op on prepared inputs, and as many of them as no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support.contract import OPS, check, inputs_in, to_device
from support.contract import reference_module as reference
from torch.utils._pytree import tree_map_only

from smolvla_fast.measure.rounds import synchronize

__all__ = ["OPS", "REAL_FLOPS", "check", "cold_inputs", "prepared", "reference", "replay"]

# Below this a case is one of the odd ones, which exist for correctness.
REAL_FLOPS = 2e6
# A working set above any processor's last-level cache, in at most so many copies.
COLD_BYTES, MAX_COPIES = 2**28, 32
WARM = 3


def prepared(ops: Any, op: str, inputs: dict[str, Any]) -> Callable[[], Any]:
    """One call of the op, with everything done that a chunk does once for all its calls."""
    inputs = dict(inputs)
    if op == "masked_attention":
        inputs["mask"] = ops.prepare_mask(inputs["mask"])
    if op == "suffix_embed":
        folded = ops.suffix_fold(*(inputs.pop(name) for name in ("times", "action_in", "time_in")))
        return lambda: ops.suffix_embed(inputs["x"], 1, folded, inputs["time_out"])
    function = getattr(ops, op)
    return lambda: function(**inputs)


def cold_inputs(
    op: str, case: dict[str, int], dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Several copies of the inputs, to be gone through in turn: a chunk goes through its layers, and weights that one call
    leaves in the caches would flatter the next."""
    cost = reference(op).cost(case, dtype.itemsize)
    copies = max(1, min(MAX_COPIES, int(COLD_BYTES // cost.bytes)))
    inputs = [to_device(inputs_in(op, case, dtype, seed)[0], device) for seed in range(2)]
    return inputs + [tree_map_only(torch.Tensor, torch.clone, inputs[0]) for _ in range(copies - 2)]


def replay(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """All calls, one after the other: as one graph on a GPU, where launching one by one would take longer than they."""
    if device.type != "cuda":
        return lambda: [call() for call in calls] and None
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            calls[0]()
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()

    def run() -> None:
        graph.replay()
        synchronize(device)

    return run
