"""Drawn policies, inputs and calls: a patched policy answers as its stock twin does, or raises what it raises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import smolvla_fast
from smolvla_fast.verify import SCATTER

from . import cases
from .cases import CALLS, CASES, Tally, calls, compare, policies, twins

pytest.importorskip("lerobot.policies.rtc.configuration_rtc")

NIGHTLY = CASES > 100
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@pytest.mark.parametrize("tier", ["exact", "fp32", "bf16"])
def test_a_patched_policy_answers_as_its_twin(tier: str) -> None:
    """``exact``: bits. ``fp32``: FP32_BOUND. ``bf16``: in sum no further from fp32 than stock in bf16 is.

    A run without a GPU draws the same cases every time; ``make fuzz`` draws others.
    """
    tally = Tally()

    @settings(
        max_examples=max(1, CASES // CALLS // 3), deadline=None, derandomize=not NIGHTLY, database=None,
        suppress_health_check=QUIET, phases=list(Phase) if NIGHTLY else [Phase.generate],
    )  # fmt: skip
    @given(
        policies(),
        st.sampled_from(cases.WEIGHTS),
        st.sampled_from(["auto", "torch"]),
        st.lists(calls(), min_size=CALLS, max_size=CALLS),
    )
    def run(made: dict[str, Any], weights: str, backend: str, drawn: list[dict[str, Any]]) -> None:
        stock, fast = twins(made, weights)
        smolvla_fast.patch(fast, precision=tier, backend=backend)
        for call in drawn:
            compare(tally, stock, fast, tier, call)

    run()
    print(f"\n{tier}:", *tally.lines(), sep="\n")
    assert tally.mismatches == 0 and tally.cases >= CASES // CALLS // 3 * CALLS
    # A run in which stock served most would prove little.
    assert sum(tally.served.values()) > 0.4 * tally.cases, tally.fallbacks
    if tier == "bf16":
        print(
            f"  in sum {tally.fast_error:.3g}, stock {tally.stock_error:.3g}; worst {tally.worst:.2f} x stock"
        )
        # Rounding errors of two orders of computation scatter: SCATTER says how far a single one may. Over hundreds
        # they average out.
        scatter = 1.0 + (SCATTER - 1.0) / max(1.0, sum(tally.served.values()) / 20) ** 0.5
        assert 0 < tally.fast_error <= scatter * tally.stock_error
