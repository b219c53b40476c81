"""The bound of tier fp32 is stock's own movement under another order of sums: deep policies pass, faults do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smolvla_fast
from smolvla_fast import backends, testing
from smolvla_fast.rounding import CAP, FP32_BOUND, MOVEMENTS, ReversedSums, fp32_bound
from smolvla_fast.testing import make_noise, make_observation

from .conftest import LEROBOT_FIRST

SEEDS = [pytest.param(seed, marks=() if seed in (4, 7) else pytest.mark.long) for seed in range(16)]


def _deep(seed: int) -> Any:
    """32 layers at tiny widths whose sharp attention makes much of a last bit."""
    policy = testing.make_policy(
        "tiny", seed=seed, num_vlm_layers=32, text={"num_hidden_layers": 32}, num_steps=4
    )
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(1.08)
    return policy


@LEROBOT_FIRST
@pytest.mark.parametrize("seed", SEEDS)
def test_deep_policies_pass_and_a_bf16_product_among_them_does_not(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = smolvla_fast.patch(_deep(seed), precision="fp32", backend="torch")
    observation, noise = make_observation(policy, seed=seed), make_noise(policy, seed=seed)
    report = smolvla_fast.verify(policy, observation, noise=noise)
    print(f"seed {seed}: {report.rel_l2:.2e}, stock moves {report.movement:.2e}, bound {report.bound:.2e}")
    assert report.movement and report.bound == fp32_bound(report.movement)
    assert report.passed and 0 < report.rel_l2 <= report.bound <= CAP, report

    select = backends.select

    def one_in_bf16(*args: Any, **kwargs: Any) -> Any:
        ops = select(*args, **kwargs)
        step = ops.euler_step

        def euler_step(h: Any, norm: Any, eps: float, weight: Any, bias: Any, *rest: Any) -> Any:
            return step(h, norm, eps, weight.bfloat16().float(), bias, *rest)

        return replace(ops, euler_step=euler_step)

    monkeypatch.setattr("smolvla_fast.inference.select", one_in_bf16)
    smolvla_fast.refresh(policy)
    wrong = smolvla_fast.verify(policy, observation, noise=noise)
    assert not wrong.passed and wrong.rel_l2 > CAP, wrong


def test_the_bound_has_a_floor_and_a_cap() -> None:
    assert fp32_bound(0.0) == FP32_BOUND and fp32_bound(1e-5) == MOVEMENTS * 1e-5 and fp32_bound(1.0) == CAP


def test_reversed_sums_are_the_same_sums() -> None:
    """Equal in real numbers, other last bits; of a convolution whose patches do not fill the image nothing is changed."""
    generator = torch.Generator().manual_seed(0)
    x, image = torch.randn(5, 333, generator=generator), torch.randn(2, 3, 32, 32, generator=generator)
    linear, conv = nn.Linear(333, 7), nn.Conv2d(3, 8, 4, stride=4)
    for module, given in ((linear, x), (conv, image)):
        plain = module(given)
        with ReversedSums():
            other = module(given)
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)  # 333 and 48 terms of unit size
        assert not torch.equal(other, plain)
    with ReversedSums():
        odd = conv(image[..., :-1])
        same = F.linear(x[:, :1], linear.weight[:, :1])
    assert torch.equal(odd, conv(image[..., :-1])) and torch.equal(
        same, F.linear(x[:, :1], linear.weight[:, :1])
    )
