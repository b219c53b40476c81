"""The tier int16 on a CPU: nearer to fp32 than bf16 is, its copies never stale, and served by fp32 where that is as fast.

What it shares with int8 (copies, groups behind a norm, plans) is tested in test_int8_chunk.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.model.precision import TIERS, resolve_tier
from smolvla_fast.ops import availability, extension
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.cpu import int16
from smolvla_fast.testing.policies import make_noise, make_observation

pytestmark = [
    pytest.mark.processor,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
DIGITS = 2e-5
"""Relative L2 that 16 bits cannot stay below: a step is 1/3344 of the largest of a row. fp32 is an order below it."""


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whether integers are ahead is a question of the processor; their numbers are not."""
    monkeypatch.setattr(int16, "why_slow", lambda: None)
    monkeypatch.setattr(availability, "_why_slow", lambda: None)  # nor whether `auto` takes the kernels
    yield


@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_nearer_than_bf16_and_not_equal(layout: str) -> None:
    policy = make_policy("tiny", layout=layout)
    wide, narrow = copy.deepcopy(policy).float(), make_policy("tiny", layout="mixed")
    for mine, theirs in zip(narrow.parameters(), policy.parameters(), strict=True):
        mine.data.copy_(theirs)
    given, noise = make_observation(policy), make_noise(policy)
    truth = chunk(wide, given, noise)
    smolvla_fast.patch(policy, precision="int16")
    fast = chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert (now.precision, now.backend, now.calls_fast, now.calls_stock) == ("int16", "cpu", 1, 0)
    assert not now.fallback_reasons
    lost, stock = rel_l2(fast, truth), rel_l2(chunk(narrow, given, noise), truth)
    print(f"{layout}: relative L2 {lost:.2g}, stock in bf16 {stock:.2g}")
    assert DIGITS < lost < stock / 2
    assert torch.equal(chunk(policy, given, noise), fast), "a second chunk has other bits"
    report = smolvla_fast.verify(policy, given, noise=noise)
    assert report.passed and report.precision == "int16" and report.cosine >= (TIERS["int16"].cosine or 1)


def test_batches_and_cameras() -> None:
    policy = make_policy("tiny", cameras=3)
    smolvla_fast.patch(policy, precision="int16")
    given, noise = make_observation(policy, batch=2, cameras=2), make_noise(policy, batch=2)
    both = chunk(policy, given, noise)
    for i in range(2):
        alone = chunk(policy, {key: value[i : i + 1] for key, value in given.items()}, noise[i : i + 1])
        assert (
            rel_l2(both[i], alone[0]) < 5e-3
        )  # as far as the tier may be from fp32: half of what bf16 loses
    assert smolvla_fast.status(policy).calls_stock == 0


def test_changed_weights_are_seen_by_the_next_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    smolvla_fast.patch(policy, precision="int16")
    old = chunk(policy, observation, noise)
    kept = [parameter.detach().clone() for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    new = chunk(policy, observation, noise)
    smolvla_fast.patch(smolvla_fast.unpatch(policy), precision="int16")
    assert torch.equal(new, chunk(policy, observation, noise)), "a stale copy was read"
    assert rel_l2(new, old) > 1e-3, "the change does not show, so the test could not fail"
    for parameter, before in zip(policy.parameters(), kept, strict=True):
        parameter.data.copy_(before)
    assert torch.equal(chunk(policy, observation, noise), old)


def test_fp32_serves_where_integers_are_not_ahead(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    smolvla_fast.patch(policy, precision="fp32")
    want = chunk(policy, observation, noise)
    held = smolvla_fast.status(policy).extra_bytes
    monkeypatch.setattr(int16, "why_slow", lambda: "they measured no faster")
    smolvla_fast.patch(policy, precision="int16")
    assert torch.equal(chunk(policy, observation, noise), want)
    now = smolvla_fast.status(policy)
    assert now.precision == "int16" and now.extra_bytes == held
    assert now.fallback_reasons == {"int16 products": "they measured no faster; products run in fp32"}


@pytest.mark.parametrize("slow", ["int16_linear", "linear_float32_float32_float32"])
def test_the_trial_finds_the_faster_one(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `ahead`
    kernels = extension.load("cpu")

    class OneOfThemSlow:
        def __getattr__(self, name: str) -> Any:
            call = getattr(kernels, name)
            return (lambda *args: time.sleep(0.02) or call(*args)) if name == slow else call

    monkeypatch.setattr(extension, "load", lambda kind: OneOfThemSlow())
    int16.why_slow.cache_clear()
    found = int16.why_slow()
    int16.why_slow.cache_clear()
    assert found is None if slow != "int16_linear" else "measured no faster than fp32's" in str(found)


def test_never_taken_by_auto_and_refused_on_a_gpu() -> None:
    assert resolve_tier("auto", torch.float32).quantized is None
    with pytest.raises(
        RuntimeError, match="precision='int16' cannot serve.*CPU kernel, the policy is on cuda"
    ):
        backends.select("auto", torch.device("cuda"), False, "int16")


@LEROBOT_ONLY
@pytest.mark.long
@pytest.mark.slow
def test_full_size() -> None:
    policy = make_policy("full")
    given, noise = make_observation(policy), make_noise(policy)
    smolvla_fast.patch(policy, precision="fp32")
    truth = chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision="int16")
    lost = rel_l2(chunk(policy, given, noise), truth)
    print(f"int16, full size: relative L2 {lost:.3g}")
    assert DIGITS < lost < 5e-3  # half of what bf16 loses
