"""Every op, with SmolVLA's own tiles, in the dtypes of the tiers, as it is compiled for each architecture and run."""

from __future__ import annotations

from collections import Counter

import pytest
from support import triton_by

pytest.importorskip("triton")
if not triton_by.CAPABILITY:
    pytest.skip("the machine of tests/simt/ptx does not run here", allow_module_level=True)
from simt.ptx import calls, launcher, report

pytestmark = pytest.mark.compiled_kernels
CALLS = [call for capability in calls.CAPABILITIES for call in calls.calls(capability)]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_contract(call: calls.Call) -> None:
    """Equal bits in two orders, no memory unwritten, and at most twice eager's error against fp64."""
    before = launcher.launched.total()
    found = calls.judged(call)
    assert bool(found) == (launcher.launched.total() > before)
    if not found:
        pytest.skip("torch serves it, by the defaults")


def test_the_committed_table_names_what_runs() -> None:
    """`make compiled-kernels` writes it."""
    rows = report.read()
    assert {str(call) for call in CALLS} == set(rows), "run `make compiled-kernels` and commit its table"
    assert not [name for name, row in rows.items() if "beyond" in row]


def test_every_op_runs_for_every_architecture_in_every_tier() -> None:
    found = Counter(
        (call.op, call.capability, call.dtypes.partition(";")[0].partition(":")[0]) for call in CALLS
    )
    for op in calls.MOST:
        for capability in calls.CAPABILITIES:
            tiers = {tier for each, cc, tier in found if (each, cc) == (op, capability)}
            alone = {"fp32"} if op in ("suffix_embed", "flow_loss") else {"fp32", "bf16"}
            eight = {"fp8"} if op in calls.aot.EIGHT_BITS and capability >= 89 else set()
            assert tiers == alone | eight, (op, capability)
