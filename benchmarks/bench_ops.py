"""Single ops: case by dtype by backend, each checked against fp64 before it is timed, under the roof.

Cases, inputs and costs come from ``smolvla_fast/reference/<op>.py``, the check from ``tests/contract.py``: an
op that is added there is timed here. Rounds go through several copies of the inputs, as a chunk goes through
its layers; weights that one op leaves in the caches would flatter it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from contract import OPS, check, inputs_in, room, to_device

from benchmarks.gate import timed
from smolvla_fast import backends
from smolvla_fast.cli.measure import synchronize

DTYPES = (torch.float32, torch.bfloat16)
# Below this a case is one of the odd ones, which exist for correctness.
REAL_FLOPS = 2e6
# A working set above any processor's last-level cache, in at most so many copies.
COLD_BYTES, MAX_COPIES = 2**28, 32


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


@pytest.mark.parametrize(("op", "case", "dtype", "backend"), params())
def test_op(benchmark, ceilings, device, pytestconfig, op, case, dtype, backend):
    reference = backends.reference_ops()
    try:
        ops = reference if backend == "reference" else backends.select(backend, device, False)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    short = str(dtype).removeprefix("torch.")
    benchmark.group = f"op: {op}, {device.type}, {short}, " + " ".join(f"{k}={v}" for k, v in case.items())
    cost = room(op).cost(case, dtype.itemsize)

    def check_op() -> dict[str, Any]:
        if ops is not reference:
            check(reference, ops, op, case, dtype, device=device)
        return {}

    copies = max(1, min(MAX_COPIES, int(COLD_BYTES // cost.bytes)))
    inputs = [to_device(inputs_in(op, case, dtype, seed)[0], device) for seed in range(2)]
    inputs += [{name: clone(value) for name, value in inputs[0].items()} for _ in range(copies - 2)]
    calls = cycle([prepared(ops, op, values) for values in inputs])

    def one() -> None:
        next(calls)()
        synchronize(device)

    with torch.no_grad():
        timed(benchmark, check_op, one, 100 if pytestconfig.getoption("--full") else 20)
    p50 = benchmark.extra_info["p50_ms"]
    floor_ms = ceilings.floor_ms(cost.flops, cost.bytes, dtype)
    benchmark.extra_info.update(
        suite="ops", op=op, case=case, dtype=short, backend=backend, flops=cost.flops, bytes=cost.bytes,
        gflops_per_s=cost.flops / p50 / 1e6, gbytes_per_s=cost.bytes / p50 / 1e6,
        floor_ms=floor_ms, share_of_floor=floor_ms / p50,
    )  # fmt: skip


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
