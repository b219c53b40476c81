"""Single ops: case by dtype by backend, each checked against fp64 before it is timed, under the roof.

Cases, inputs and costs come from ``smolvla_fast/ops/reference/<op>.py``, the check from ``tests/support/contract.py``: an
op that is added there is timed here. Rounds go through several copies of the inputs, as a chunk goes through
its layers; weights that one op leaves in the caches would flatter it.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

from benchmarks.harness.gate import timed
from benchmarks.suites.op_calls import OPS, REAL_FLOPS, check, cold_calls, figures, room
from smolvla_fast.measure.rounds import synchronize
from smolvla_fast.ops import select as backends

DTYPES = (torch.float32, torch.bfloat16)


def params() -> list[Any]:
    found = []
    table = backends.table(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for op in OPS:
        names = ["reference", *(row.backend for row in table if row.op == op and row.available)]
        for case in room(op).CASES:
            if room(op).cost(case, 4).flops < REAL_FLOPS:
                continue
            sizes = "-".join(f"{name}{value}" for name, value in case.items())
            for dtype in DTYPES:
                for name in names:
                    label = f"{op}-{sizes}-{str(dtype).removeprefix('torch.')}-{name}"
                    found.append(pytest.param(op, case, dtype, name, id=label))
    return found


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), params())
def test_op(benchmark, ceilings, device, pytestconfig, op, case, dtype, backend):
    reference = backends.reference_ops()
    try:
        ops = reference if backend == "reference" else backends.select(backend, device, False)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    short = str(dtype).removeprefix("torch.")
    benchmark.group = f"op: {op}, {device.type}, {short}, " + " ".join(f"{k}={v}" for k, v in case.items())

    def check_op() -> dict[str, Any]:
        if ops is not reference:
            check(reference, ops, op, case, dtype, device=device)
        return {}

    calls = cycle(cold_calls(ops, op, case, dtype, device))

    def one() -> None:
        next(calls)()
        synchronize(device)

    with torch.no_grad():
        timed(benchmark, check_op, one, 100 if pytestconfig.getoption("--full") else 20)
    p50 = benchmark.extra_info["p50_ms"]
    benchmark.extra_info.update(figures(op, case, dtype, backend, p50, ceilings))
