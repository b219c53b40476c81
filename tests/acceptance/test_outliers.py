"""Checks 27 and 28 where narrow tiers suffer most: Student-t weights with outlier channels, and attention on one token.

The truth is the same chunk in fp64. What is judged and printed is the worst of several policies, not their mean.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from support import integer_products
from support.policies import chunk_in_fp64, make_policy, model_inputs, rel_l2
from torch import Tensor

import smolvla_fast
from benchmarks.harness.outliers import heavy_tailed, sharp_attention
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops import availability, extension
from smolvla_fast.ops.cpu import int8_attention, int16
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import SCATTER, cosine

pytestmark = pytest.mark.processor

SEEDS = range(4)
INT16 = ("int16",) if extension.available("cpu") else ()
CHANGES: dict[str, Any] = {
    "normal": lambda model, seed: nullcontext(),
    "Student t, channels x50": lambda model, seed: heavy_tailed(model, seed, degrees=3),
    "sharp attention": sharp_attention,
    # With scores that spread by up to 8, where 8-bit products still serve.
    "louder attention": partial(sharp_attention, factor=5.0),
}


def _changed(weights: str, policy: Any, seed: int) -> AbstractContextManager[None]:
    change: Any = CHANGES[weights]
    return change(policy.model, seed)


@pytest.mark.check(27, 28)
@pytest.mark.parametrize(
    "weights",  # normal ones are also those of tests/inference/test_inference.py and test_int16_chunk.py
    [pytest.param("normal", marks=pytest.mark.long), "Student t, channels x50", "sharp attention"],
)
@pytest.mark.parametrize("layout", ["fp32", "mixed"])
@torch.no_grad()
def test_worst_case_of_a_tier(weights: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``exact``: stock's bits. ``fp32`` and ``bf16``: no further from fp64 than stock in the same dtype, by the worst of
    four policies each; ``int16`` a fifth of that, and as ``fp32`` where attention is sharp."""
    monkeypatch.setattr(int16, "why_slow", lambda: None)  # fp32 would serve
    monkeypatch.setattr(availability, "_why_slow", lambda: None)  # or none would be taken
    worst: dict[str, float] = dict.fromkeys(("stock fp32", "fp32", "stock bf16", "bf16", *INT16), 0.0)

    def note(name: str, x: Tensor) -> None:
        worst[name] = max(worst[name], rel_l2(x, truth))

    for seed in SEEDS:
        policy = make_policy("tiny", layout=layout, seed=seed, num_steps=4)
        wide, narrow = copy.deepcopy(policy).float(), make_policy("tiny", layout="mixed", num_steps=4)
        with _changed(weights, policy, seed):
            for other in (wide, narrow):
                for mine, theirs in zip(other.parameters(), policy.parameters(), strict=True):
                    mine.data.copy_(theirs)
            inputs = model_inputs(policy, make_observation(policy, seed=seed))
            noise = make_noise(policy, seed=seed)
            truth = chunk_in_fp64(policy.model, inputs, noise)
            stock = policy.model.sample_actions(*inputs, noise=noise)
            note("stock fp32", wide.model.sample_actions(*inputs, noise=noise))
            note("stock bf16", narrow.model.sample_actions(*inputs, noise=noise))
            for precision in ("exact", "fp32", "bf16", *INT16):
                smolvla_fast.patch(policy, precision=precision)
                fast = policy.model.sample_actions(*inputs, noise=noise)
                if precision == "exact":
                    assert torch.equal(fast, stock)
                else:
                    note(precision, fast)
            assert smolvla_fast.status(policy).calls_stock == 0
    print(f"{weights}, {layout}: worst relative L2 of {len(SEEDS)} policies:", worst)
    # Twice: the rule of this project for another order of sums in the same dtype. bf16 keeps the residual stream in fp32
    # and so owes less than stock. Attention on one key passes a rounding on a thousandfold, and which order of sums meets
    # the closest pair of scores is chance (from policy to policy ours errs half to thrice as much as stock): there an order
    # of magnitude, and SCATTER, as for single observations.
    sharp = weights == "sharp attention"
    assert worst["fp32"] <= (10 if sharp else 2) * worst["stock fp32"] < worst["stock bf16"]
    assert 1e-4 < worst["bf16"] <= (SCATTER if sharp else 1) * worst["stock bf16"]
    # A row's largest number has 3344 steps where bf16 gives 128 to 256: found were at most 0.09.
    for name in INT16:
        assert worst[name] == worst["fp32"] if sharp else 1e-4 < worst[name] <= 0.2 * worst["stock bf16"]


@pytest.mark.check(28)
@pytest.mark.skipif(not INT16, reason=extension.why_missing("cpu") or "built")
@pytest.mark.parametrize("factor", [3.0, 8.0, 12.0])
@torch.no_grad()
def test_int16_keeps_its_promise_however_loud_attention_is(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scores spread by more than 8 the chunk is in fp32, and ``status`` says so."""
    monkeypatch.setattr(int16, "why_slow", lambda: None)  # fp32 would serve
    bound, served = TIERS["int16"].cosine, set()
    assert bound is not None
    for seed in SEEDS:
        policy = make_policy("tiny", layout="fp32", seed=seed, num_steps=4)
        with sharp_attention(policy.model, seed, factor=factor):
            inputs = model_inputs(policy, make_observation(policy, seed=seed))
            noise = make_noise(policy, seed=seed)
            truth = chunk_in_fp64(policy.model, inputs, noise)
            smolvla_fast.patch(policy, precision="int16", backend="cpu")
            assert cosine(policy.model.sample_actions(*inputs, noise=noise), truth) >= bound
        served.add("int16" in smolvla_fast.status(policy).fallback_reasons)
    assert (factor >= 8) in served, "the quieter ones by integers, the loudest not"


@pytest.mark.check(28)
@pytest.mark.skipif(not INT16, reason=extension.why_missing("cpu") or "built")
@torch.no_grad()
def test_int16_has_room_below_the_limit_of_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers alone, however loud attention is; ``-s`` prints all. At the same spread one processor's rounding was seen to
    lose twice as much as another's, and policies differ by more: below the limit no more than a tenth may be lost."""
    monkeypatch.setattr(int16, "why_slow", lambda: None)
    largest, seen = int8_attention._largest, list[float]()
    monkeypatch.setattr(int8_attention, "_largest", lambda found: seen.append(largest(found)) or seen[-1])
    limit, bound = int8_attention.MOST_SPREAD, TIERS["int16"].cosine
    assert bound is not None
    monkeypatch.setattr(int8_attention, "MOST_SPREAD", float("inf"))
    found = []
    for factor, seed in itertools.product((3.0, 5.0, 8.0), SEEDS):
        policy = make_policy("tiny", layout="fp32", seed=seed, num_steps=4)
        with sharp_attention(policy.model, seed, factor=factor):
            inputs = model_inputs(policy, make_observation(policy, seed=seed))
            noise = make_noise(policy, seed=seed)
            truth = chunk_in_fp64(policy.model, inputs, noise)
            smolvla_fast.patch(policy, precision="int16", backend="cpu")
            seen.clear()
            lost = 1 - cosine(policy.model.sample_actions(*inputs, noise=noise), truth)
        found.append((max(seen), lost, factor, seed))
    for spread, lost, factor, seed in sorted(found):
        print(f"spread {spread:.2f}: 1 - cosine {lost:.1e}, factor {factor:g}, seed {seed}")
    quiet = [lost for spread, lost, *_ in found if spread <= limit]
    assert quiet and max(quiet) <= (1 - bound) / 10


@pytest.mark.check(28)
@pytest.mark.parametrize("layout", [pytest.param("fp32", marks=pytest.mark.long), "mixed"])
@torch.no_grad()
def test_worst_case_of_int8(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held on normal weights, tails, outlier channels, and on sharp attention, which is computed in fp32."""
    integer_products.provide(monkeypatch)
    worst = dict.fromkeys(CHANGES, 1.0)
    for weights in CHANGES:
        for seed in SEEDS:
            policy = make_policy("tiny", layout=layout, seed=seed, num_steps=4)
            with _changed(weights, policy, seed):
                inputs = model_inputs(policy, make_observation(policy, seed=seed))
                noise = make_noise(policy, seed=seed)
                truth = chunk_in_fp64(policy.model, inputs, noise)
                smolvla_fast.patch(policy, precision="int8")
                worst[weights] = min(
                    worst[weights], cosine(policy.model.sample_actions(*inputs, noise=noise), truth)
                )
    print(f"int8, {layout}: worst cosine of {len(SEEDS)} policies:", worst)
    bound = TIERS["int8"].cosine
    assert bound is not None
    assert worst["sharp attention"] >= bound, worst
    # Which numbers are rounded up follows from the processor's order of sums: the worst lies a twentieth above the bound
    # with AVX2, and at it without.
    assert 1 - worst["normal"] <= 1.05 * (1 - bound), worst
    # A tiny policy's rows have 48 columns to average over, not 720 and more: one cosine of four may fall this low, and does
    # with weights that lose too little for a second term. Full size has the bound: tests/inference/test_int8_chunk.py.
    assert worst["Student t, channels x50"] >= 0.997, worst
    # What 8 bits lose of q and k, a hundredth, is multiplied by the size of the scores; twice this spread is fp32's.
    assert worst["louder attention"] >= 0.995, worst


@pytest.mark.check(27)
@pytest.mark.parametrize("origin", ["lerobot", "ours"], indirect=True)
@torch.no_grad()
def test_the_changes_are_what_they_say_and_leave_no_trace(policy: Any) -> None:
    """Else the tests above would be of normal weights."""
    model = policy.model
    layer = model.vlm_with_expert.lm_expert.layers[0]
    before = [parameter.clone() for parameter in model.parameters()]
    weight, scores = layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight

    def kurtosis(x: Tensor) -> float:
        return float((x.double() ** 4).mean() / (x.double() ** 2).mean() ** 2)

    spread = float(weight.std())
    with heavy_tailed(model, degrees=3):
        # Of normal values 3. The variance stays, as well as some thousands of values with heavy tails show it.
        assert kurtosis(weight) > 5 and float(weight.std()) == pytest.approx(spread, rel=0.3)
    rows = float(scores.norm(dim=1).max())
    with sharp_attention(model):
        loud = (scores.norm(dim=1) > 10 * rows).sum()
        assert int(loud) == scores.shape[0] // layer.self_attn.head_dim, "one channel of every head"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="degrees=2: .* from 3 degrees on"), heavy_tailed(model, degrees=2):
        pass
