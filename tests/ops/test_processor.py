"""What is decided by the processor: its features, the limit that a user sets, and the tiers they allow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from support.processors import MASKS, SEEN, Mask, play

from smolvla_fast.ops import extension, processor
from smolvla_fast.ops.cpu import int8

pytestmark = pytest.mark.processor

BUILT = pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu"))

SLOW_BF16 = {
    "Core 2": "no instruction", "Zen 1": "no instruction", "Alder Lake": "no instruction", "Skylake-X": "no instruction",
    "Cascade Lake": "no instruction", "Cooper Lake": "no AMX",
}  # fmt: skip
NO_INT8 = {"Core 2", "Zen 1", "Skylake-X", "Neoverse V1"}


@pytest.mark.parametrize("name", SEEN)
def test_tiers_follow_from_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, name)
    slow = processor.why_bf16_is_slow()
    assert slow is None if name not in SLOW_BF16 else SLOW_BF16[name] in str(slow)
    monkeypatch.setattr(extension, "why_missing", lambda kind: "")
    monkeypatch.setattr(int8, "_sums_are_exact", lambda: True)
    reason = int8.why_not(torch.device("cpu"))
    assert (reason is not None) == (name in NO_INT8), reason
    if reason:
        assert "multiplies no 8-bit integers; accepted are AVX512-VNNI, AVX-VNNI, AMX-INT8" in reason


@pytest.mark.parametrize(
    ("limit", "without"),
    [
        ("AVX512_CORE_BF16", {"AMX", "AMX-BF16", "AMX-INT8", "AVX-VNNI", "AVX512-FP16"}),
        ("AVX512_CORE_FP16", {"AMX", "AMX-BF16", "AMX-INT8", "AVX-VNNI"}),
        ("AVX10_1_512", {"AMX", "AMX-BF16", "AMX-INT8", "AVX-VNNI"}),
        (
            "AVX2_VNNI_2",
            {"AMX", "AMX-BF16", "AMX-INT8", "AVX512-FP16", "AVX512-BF16", "AVX512-VNNI", "AVX-512"},
        ),
        ("avx512_core_vnni", {"AMX", "AMX-BF16", "AMX-INT8", "AVX-VNNI", "AVX512-FP16", "AVX512-BF16"}),
        (
            "AVX2_VNNI",
            {"AMX", "AMX-BF16", "AMX-INT8", "AVX512-FP16", "AVX512-BF16", "AVX512-VNNI", "AVX-512"},
        ),
        ("AVX512_CORE_AMX", set()),
        ("DEFAULT", set()),
        ("", set()),
    ],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_a_limit_takes_features_away(
    limit: str, without: set[str], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(monkeypatch, "Sapphire Rapids")
    whole = set(processor.features())
    assert {"AMX-INT8", "AVX512-BF16", "AVX2"} <= whole
    monkeypatch.setenv(variable, limit)
    assert set(processor.features()) == whole - without


def test_a_limit_is_named_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "Sapphire Rapids")
    monkeypatch.setattr(extension, "why_missing", lambda kind: "")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert "(ONEDNN_MAX_CPU_ISA=AVX2); accepted are" in str(int8.why_not(torch.device("cpu")))


LEVEL_OF = {
    "baseline": "baseline", "AVX2": "avx2", "AVX2 + VNNI": "avx2", "AVX-512": "avx512", "AVX-512 + VNNI": "avx512",
    "AVX-512 + VNNI + bf16": "avx512_bf16",
}  # fmt: skip
ASK = """
import json, torch
from smolvla_fast.ops import extension, processor
print(json.dumps([extension.load("cpu").levels()[-1], torch.backends.cpu.get_cpu_capability(), processor.features()]))
"""


@BUILT
@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", LEVEL_OF)
def test_kernels_keep_to_the_limit(name: str) -> None:
    """In a process of its own, for kernels and torch read their variables once."""
    environment = {k: v for k, v in os.environ.items() if k not in Mask("", "", "", ()).environment}
    mask = MASKS[name]
    if not set(mask.needs) <= set(_features_without_limit()):
        pytest.skip(f"this processor lacks {', '.join(mask.needs)}")
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**environment, **mask.environment}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    level, capability, features = json.loads(done.stdout)
    assert (level, capability) == (LEVEL_OF[name], mask.aten.upper())
    assert set(mask.needs) <= set(features) <= set(processor.LIMITS[mask.onednn])


def _features_without_limit() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            patch.delenv(variable, raising=False)
        return processor.features()
