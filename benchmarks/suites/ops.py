"""Single ops: case by dtype, every backend and eager torch in turn, each checked against fp64 before it is timed.

Cases, inputs and costs come from ``smolvla_fast/ops/reference/<op>.py``, the check from ``tests/support/contract.py``: an
op that is added there is timed here. Rounds go through several copies of the inputs, on a GPU as one captured graph.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import rounds
from benchmarks.suites.op_calls import OPS, REAL_FLOPS, check, cold_inputs, prepared, reference, replay
from smolvla_fast.ops import select as backends

DTYPES = (torch.bfloat16, torch.float32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # bf16 of every op before fp32 of any: time may run out.
    found = [
        pytest.param(op, case, dtype, id="-".join([op, *(f"{k}{v}" for k, v in case.items()), short(dtype)]))
        for dtype in DTYPES
        for op in OPS
        for case in reference(op).CASES
        if reference(op).cost(case, 4).flops >= REAL_FLOPS
    ]
    metafunc.parametrize(("op", "case", "dtype"), found)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_op(measure, ceilings, device, pytestconfig, op, case, dtype):
    sizes = " ".join(f"{name}={value}" for name, value in case.items())
    group = f"op: {op}, {device.type}, {short(dtype)}, {sizes}"
    served = ["reference", *(row.backend for row in backends.table(device) if row.op == op and row.available)]
    inputs, cost = [], reference(op).cost(case, dtype.itemsize)

    def variant(name: str) -> Variant:
        eager, runs = backends.reference_ops(), []

        def checked() -> dict[str, Any]:
            ops = eager if name == "reference" else backends.select(name, device, False)
            if ops is not eager:
                check(eager, ops, op, case, dtype, device=device)
            if not inputs:
                inputs.extend(cold_inputs(op, case, dtype, device))
            calls = [prepared(ops, op, values) for values in inputs]
            if device.type == "cuda":
                runs.append(replay(calls, device))
                return {"calls_a_round": len(calls)}
            calls[0]()
            turns = cycle(calls)
            runs.append(lambda: next(turns)() is None)
            return {}

        facts = dict(
            suite="ops", variant=name, ratio_to="reference", op=op, case=case, dtype=short(dtype), backend=name,
            flops=cost.flops, bytes=cost.bytes, floor_ms=ceilings.floor_ms(cost.flops, cost.bytes, dtype),
        )  # fmt: skip
        return Variant(name, checked, lambda: runs[0](), facts=facts)

    with torch.no_grad():
        measure(group, [variant(name) for name in served], rounds(pytestconfig, 20, 100))
