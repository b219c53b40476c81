"""Single ops: case by dtype, every backend and eager torch in turn, each checked against fp64 before it is timed.

Cases, inputs and costs come from ``smolvla_fast/ops/reference/<op>.py``, the check from ``tests/support/contract.py``: an
op that is added there is timed here. Rounds go through several copies of the inputs, on a GPU as one captured graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from support.contract import OPS, call_of, check, inputs_in, reference_module, sizes, to_device
from torch.utils._pytree import tree_map_only

from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import rounds
from smolvla_fast.measure.rounds import synchronize
from smolvla_fast.ops import select as backends

DTYPES = ("bfloat16", "float32")
# Below this a case is one of the odd ones, which exist for correctness.
REAL_FLOPS = 2e6
# A working set above any processor's last-level cache, in at most so many copies.
COLD_BYTES, MAX_COPIES = 2**28, 32
WARM = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # bf16 of every op before fp32 of any: time may run out.
    found = [
        pytest.param(op, case, dtype, id=f"{op}-{sizes(case)}-{dtype}")
        for dtype in DTYPES
        for op in OPS
        for case in reference_module(op).CASES
        if reference_module(op).cost(case, 4).flops >= REAL_FLOPS
    ]
    metafunc.parametrize(("op", "case", "name"), found)


def cold_inputs(op: str, case: dict[str, int], dtype: torch.dtype, device: torch.device) -> list[Any]:
    """Several copies of the inputs, to be gone through in turn: a chunk goes through its layers, and weights that one call
    leaves in the caches would flatter the next."""
    cost = reference_module(op).cost(case, dtype.itemsize)
    copies = max(1, min(MAX_COPIES, int(COLD_BYTES // cost.bytes)))
    inputs = [to_device(inputs_in(op, case, dtype, seed)[0], device) for seed in range(2)]
    return inputs + [tree_map_only(torch.Tensor, torch.clone, inputs[0]) for _ in range(copies - 2)]


def replay(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """All calls, one after the other, as one graph: launching one by one would take longer than they."""
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


@torch.no_grad()
def test_op(
    measure: Any, ceilings: Any, device: torch.device, pytestconfig: Any, op: str, case: dict[str, int], name: str,
) -> None:  # fmt: skip
    dtype = getattr(torch, name)
    served = ["reference", *(row.backend for row in backends.table(device) if row.op == op and row.available)]
    inputs: list[dict[str, Any]] = []
    floor = ceilings.floor(reference_module(op).cost(case, dtype.itemsize), dtype)

    def variant(backend: str) -> Variant:
        def checked() -> dict[str, Any]:
            eager = backends.reference_ops()
            ops = eager if backend == "reference" else backends.select(backend, device, False)
            if ops is not eager:
                check(eager, ops, op, case, dtype, device=device)
            inputs.extend([] if inputs else cold_inputs(op, case, dtype, device))
            calls = [call_of(ops, op, values) for values in inputs]
            if device.type == "cuda":
                found.run = replay(calls, device)
                return {"calls_a_round": len(calls)}
            calls[0]()
            turns = cycle(calls)
            found.run = lambda: next(turns)() is None
            return {}

        found = Variant(backend, checked, dict, facts={**facts, "variant": backend, "backend": backend})
        return found

    facts = dict(ratio_to="reference", op=op, case=case, dtype=name, **floor)
    group = f"op: {op}, {device.type}, {name}, " + " ".join(f"{size}={value}" for size, value in case.items())
    measure(group, [variant(backend) for backend in served], rounds(pytestconfig, 20, 100), suite="ops")
