"""A device that nobody has tried: the torch backend runs on it, and a trial says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY

import smolvla_fast
from smolvla_fast.patching import model_rules
from smolvla_fast.patching.untried import Untried
from smolvla_fast.testing.policies import make_policy

TESTS = Path(__file__).resolve().parents[1]
HAS_PYTHON_DEVICES = hasattr(torch._C, "_acc") and hasattr(
    torch._C._acc, "register_python_privateuseone_hook"
)


PRECISIONS = ["fp32", "bf16", "exact"]


@pytest.fixture(scope="module")
def on_the_device() -> dict[str, Any]:
    """What came of a policy a precision there."""
    done = subprocess.run(
        [sys.executable, "-m", "support.python_device", *PRECISIONS], text=True, capture_output=True, cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[-len(PRECISIONS) :]
    return {precision: json.loads(line) for precision, line in zip(PRECISIONS, lines, strict=True)}


@LEROBOT_ONLY  # our own class is what runs; the fixture of origins would run it twice
@pytest.mark.skipif(not HAS_PYTHON_DEVICES, reason="this torch lets no device be written in Python")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_policy_on_a_device_that_nobody_has_tried_runs_fast(
    precision: str, on_the_device: dict[str, Any]
) -> None:
    """No float64, and torch's own operators alone, as on MPS; the numbers are real."""
    found = on_the_device[precision]
    if precision == "bf16":
        assert found["errors"][0] < 0.1, (
            "what bf16 loses on such a policy; a wrong chunk is off by one and more"
        )
        return
    assert found["active"] and (found["calls_fast"], found["calls_stock"]) == (2, 1)
    assert found["backend"] == ("reference" if precision == "exact" else "torch")
    [verdict] = found["trials"].values()
    assert verdict.startswith("passed: off by ")
    # Of stock there, of ours, beside a CPU's: its times are embedded in fp32, which moves a chunk by 3e-5. A wrong chunk is
    # off by one and more.
    stock, *fast = found["errors"]
    assert stock < 1e-4 and max(fast) < 1e-4
    assert (fast[0] == stock) == (precision == "exact")


class Elsewhere:
    """A model as far as the rule of devices reads it."""

    def __init__(self, device: str) -> None:
        weight = type("Weight", (), {"device": torch.device(device)})
        self.state_proj = type("Linear", (), {"weight": weight})


@pytest.mark.parametrize("device", ["mps", "xpu:0", "hpu", "npu:1"])
def test_other_kinds_of_device_are_untried(device: str) -> None:
    if device.startswith("npu"):
        device = "privateuseone:1"
    reason = model_rules.device(Elsewhere(device))
    assert isinstance(reason, Untried) and reason == f"the policy is on {device}; known are cpu and cuda"


def test_an_amd_gpu_is_untried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    reason = model_rules.device(Elsewhere("cuda:0"))
    assert isinstance(reason, Untried) and "an AMD GPU (ROCm 6.4.43482)" in reason


@pytest.mark.parametrize(
    ("capability", "untried"),
    [((8, 0), False), ((9, 0), False), ((12, 0), False), ((11, 0), True), ((13, 1), True)],
)
def test_an_architecture_without_a_row_is_untried(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], untried: bool
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    model_rules._untried_architecture.cache_clear()
    try:
        reason = model_rules.device(Elsewhere("cuda:0"))
    finally:
        model_rules._untried_architecture.cache_clear()
    assert isinstance(reason, Untried) is untried
    assert reason is None or f"compute capability {capability[0]}.{capability[1]}" in reason


def test_a_device_without_values_is_no_question() -> None:
    policy = smolvla_fast.patch(make_policy("tiny").to("meta"))
    now = smolvla_fast.status(policy)
    assert (
        not now.active
        and now.last_fallback == "the policy is on meta and has no values; accepted are cpu and cuda"
    )
