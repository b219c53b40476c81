"""Every op, with SmolVLA's own tiles, in the dtypes of the tiers, as it is compiled for each architecture and run."""

from __future__ import annotations

from typing import Any

import pytest
from support import triton_by

pytest.importorskip("triton")
if not triton_by.CAPABILITY:
    pytest.skip("the machine of tests/simt/ptx does not run here", allow_module_level=True)
from simt.ptx import calls, launcher, report

pytestmark = pytest.mark.compiled_kernels
CALLS = [call for capability in calls.CAPABILITIES for call in calls.calls(capability)]
JUDGED: dict[Any, str] = {}
"""Names of the calls that have run, by what a run depends on."""


DIVIDES = ("norm_swiglu", "norm_qkv_rope", "suffix_embed", "euler_step")
"""What a denoise step launches that divides or takes a root."""
WAIT = (
    "linear_residual", "norm_swiglu", "norm_qkv_rope", "masked_attention", "attention_residual", "linear", "layer_norm",
    "attention", "patch_embed", "pixel_shuffle_linear", "cross_kv", "image_prep", "suffix_embed",
)  # fmt: skip
"""What may begin while the launch ahead still runs; the machine finds what one reads before it waits."""
ONLY_FP32 = ("suffix_embed", "flow_loss", "rope_masks")


def _long(call: calls.Call) -> bool:
    """Kernels in fp32 run in tests/ops too, those in fp8 in tests/ops/test_triton_fp8.py and test_compiled_chunk.py."""
    elsewhere = call.dtypes.startswith("fp8") or (call.dtypes == "fp32" and call.op not in ONLY_FP32)
    return call.capability < 90 or elsewhere


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, marks=[pytest.mark.long] * _long(call), id=str(call)) for call in CALLS],
)
def test_contract(call: calls.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal bits in two orders, no memory unwritten, and at most twice eager's error against fp64.

    Calls that differ in sizes which are made smaller, and in nothing else, are one run; it is judged once.

    A denoise step in the tier of bf16 divides without a call: ptxas makes one of a rounded division or root, for operands
    such as 0, which padded rows have.
    """
    rows, first = report.read(), JUDGED.setdefault(calls.run_of(call), str(call))
    if first != str(call):
        assert rows[first] == rows[str(call)], (
            "one run, and the table has two results: run `make compiled-kernels`"
        )
        return
    texts: list[str] = []
    monkeypatch.setattr(launcher, "rewrite", lambda text: texts.append(text) or text)
    found = calls.judged(call)
    assert bool(found) == bool(texts) == (rows[str(call)] != "torch")
    if call.op in WAIT and call.capability == 90:
        assert any("griddepcontrol.wait;" in text for text in texts)
    narrow = "fp32" if call.op == "suffix_embed" else "bf16"  # whose heads stay in fp32
    if call.op in DIVIDES and call.capability == 90 and call.dtypes.startswith(narrow):
        assert not [text for text in texts if "div.rn" in text or "sqrt.rn" in text]


def test_the_calls_that_divide_have_kernels() -> None:
    """Else nobody looks at their text."""
    rows = report.read()
    for op in DIVIDES:
        narrow = "fp32" if op == "suffix_embed" else "bf16"
        own = [c for c in CALLS if (c.op, c.capability) == (op, 90) and c.dtypes.startswith(narrow)]
        assert any(rows[str(call)] != "torch" for call in own), op


def test_the_committed_table_names_what_runs() -> None:
    """`make compiled-kernels` writes it."""
    rows = report.read()
    assert {str(call) for call in CALLS} == set(rows), "run `make compiled-kernels` and commit its table"
    assert not [name for name, row in rows.items() if "beyond" in row]


def test_every_op_runs_for_every_architecture_in_every_tier() -> None:
    """By the table, which the tests above hold to what runs. Large products in fp32 are torch's by the defaults."""
    ran = {str(call) for call in CALLS if report.read()[str(call)] != "torch"}
    for op in calls.MOST:
        for capability in calls.CAPABILITIES:
            own = [
                call for call in CALLS if (call.op, call.capability) == (op, capability) and str(call) in ran
            ]
            tiers = {call.dtypes.partition(";")[0].partition(":")[0] for call in own}
            fp32 = set() if op in ("linear", "pixel_shuffle_linear") else {"fp32"}
            bf16 = set() if op in ONLY_FP32 else {"bf16"}
            eight = {"fp8"} if op in calls.aot.EIGHT_BITS and capability >= 89 else set()
            assert tiers == fp32 | bf16 | eight, (op, capability)
