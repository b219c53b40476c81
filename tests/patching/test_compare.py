"""``compare`` on many observations is ``verify`` on each; when many frames keep a bound together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.policies import make_policy

import smolvla_fast
from smolvla_fast.patching.judge import Judgement
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import StockServed, compare, passed_together, stock_in_fp32


@pytest.mark.parametrize("layout", ["fp32", "mixed"])
@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16", "auto"])
def test_compare_judges_as_verify_does(layout: str, precision: str) -> None:
    policy, copies = make_policy("tiny", layout=layout, num_steps=3), {}
    smolvla_fast.patch(policy, precision=precision)
    for seed in (0, 1):
        batch, noise = make_observation(policy, seed=seed), make_noise(policy, seed=seed)
        report = smolvla_fast.verify(policy, batch, noise=noise)
        truth = stock_in_fp32(policy, batch, noise, copies)
        found = compare(policy, batch, noise, truth=truth, copies=copies)
        assert found.tier == report.precision and found.judgement.passed and report.passed
        assert found.judgement.bound == report.bound and found.judgement.movement == report.movement
        dim = policy.config.action_feature.shape[0]
        assert torch.equal(found.fast[..., :dim], policy.predict_action_chunk(dict(batch), noise=noise))
        if precision == "exact":
            assert torch.equal(found.fast, found.reference) and found.own is None
        else:
            assert torch.equal(found.reference, truth) and found.judgement.error == report.rel_l2
            assert found.own is not None and not torch.equal(found.own, truth)
    # A copy for each dtype that the policy is not stored in, and none for each observation.
    needs = layout == "mixed" or precision == "bf16"
    assert len(copies) == needs


def test_compare_says_when_stock_served() -> None:
    policy = make_policy("tiny")
    batch, noise = make_observation(policy), make_noise(policy)
    with pytest.raises(StockServed, match="not patched"):
        compare(policy, batch, noise)
    smolvla_fast.patch(policy)
    handle = policy.model.vlm_with_expert.lm_expert.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(StockServed, match="hook"):
        compare(policy, batch, noise)
    handle.remove()
    assert compare(policy, batch, noise).judgement.passed


def judged(*ratios: float) -> list[Judgement]:
    return [Judgement(0.01 * ratio, 0.01, None, ratio <= 1) for ratio in ratios]


@pytest.mark.parametrize(
    ("ratios", "fp32", "bf16"),
    [
        ((0.5, 1.0), True, True),
        ((0.5, 0.5, 0.5, 1.2), False, True),  # one of many scatters beyond its bound
        ((1.1, 1.1, 1.1), False, False),  # all of them do: no scatter
        ((0.1,) * 50 + (2.1,), False, False),  # too far for scatter
        ((0.1, float("nan")), False, False),
    ],
)
def test_many_frames_together(ratios: Any, fp32: bool, bf16: bool) -> None:
    assert passed_together(judged(*ratios), "fp32") is fp32
    assert passed_together(judged(*ratios), "int8") is fp32
    assert passed_together(judged(*ratios), "bf16") is bf16
