"""What the fuzz tests draw from, and how a patched policy is compared with its stock twin."""

from __future__ import annotations

import copy
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import smolvla_fast
from smolvla_fast.measure.rounding import FP32_BOUND, OtherSums, fp32_bound
from smolvla_fast.model.weights import is_cross
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from support.copies import Original

QUICK = 60
CASES = int(os.environ.get("SMOLVLA_FAST_FUZZ", QUICK))
"""Chunks compared in a run: 100, or as many as ``make fuzz`` asks for."""

CALLS = 4
"""Chunks of one drawn policy, so that what one call leaves behind meets the next."""

HEADS = (
    {},
    dict(hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    dict(hidden_size=120, intermediate_size=256, num_attention_heads=15, num_key_value_heads=5, head_dim=8),
    dict(num_key_value_heads=3),
    dict(hidden_size=16, num_attention_heads=1, num_key_value_heads=1, head_dim=16),
    dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=64),
)
"""Grouped heads, heads that are not, one head."""


def policies() -> st.SearchStrategy[dict[str, Any]]:
    """Arguments of ``make_policy``: everything that is fixed when a policy is made."""
    return st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 3),
            cameras=st.integers(1, 3),
            empty_cameras=st.integers(0, 2),
            layout=st.sampled_from(["fp32", "mixed", "bf16_text"]),
            text=st.sampled_from(HEADS),
            num_vlm_layers=st.integers(1, 4),
            expert_width_multiplier=st.sampled_from([0.5, 0.75, 1.0]),
            self_attn_every_n_layers=st.sampled_from([-1, 0, 1, 2, 3]),
            attention_mode=st.sampled_from(["cross_attn", "self_attn"]),
            add_image_special_tokens=st.booleans(),
            prefix_length=st.sampled_from([-1, 0, 90]),
            chunk_size=st.sampled_from([1, 4, 10]),
            tokenizer_max_length=st.sampled_from([8, 48]),
            state_dim=st.integers(1, 14),
            action_dim=st.integers(1, 14),
        )
    ).flatmap(lambda made: st.sampled_from([made, made, {**made, **ONES}]))


ONES = dict(
    cameras=1, empty_cameras=0, num_vlm_layers=1, chunk_size=1, tokenizer_max_length=1, state_dim=1, action_dim=1,
    max_state_dim=1, max_action_dim=1, prefix_length=-1, add_image_special_tokens=False,
)  # fmt: skip
"""Sizes of one, all together: a third of the policies has them, whatever their heads and their kinds of layers."""


def calls() -> st.SearchStrategy[dict[str, Any]]:
    """What differs from chunk to chunk."""
    return st.fixed_dictionaries(
        dict(
            seed=st.integers(0, 1000),
            batch=st.integers(1, 3),
            absent=st.integers(0, 2),
            image_size=st.sampled_from([None, (40, 20), (32, 32), (17, 48)]),
            image_dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
            padding=st.booleans(),
            task=st.just("") | st.text("abcdefg h", min_size=1, max_size=60),
            pad_to=st.integers(0, 8),
            num_steps=st.integers(1, 5),
            given_noise=st.booleans(),
            context=st.sampled_from(["bare", "no_grad", "inference_mode"]),
            rtc=st.none()
            | st.fixed_dictionaries(
                dict(
                    schedule=st.sampled_from(["ZEROS", "ONES", "LINEAR", "EXP"]),
                    weight=st.sampled_from([1.0, 5.0, 10.0]),
                    delay=st.integers(0, 12),
                    horizon=st.none() | st.integers(1, 14),
                    rows=st.integers(1, 12),
                    width=st.integers(1, 32),
                    rank=st.sampled_from([2, 3]),
                    first=st.booleans(),
                )
            ),
        )
    )


WEIGHTS = ("plain", "one storage, odd offsets", "a transposed parameter")


@torch.no_grad()
def lay_out(policy: Any, weights: str) -> None:
    """Puts the same numbers elsewhere in memory: as flat-parameter trainers do, or as ``weight.T`` leaves them."""
    if weights == "one storage, odd offsets":
        for dtype in (torch.float32, torch.bfloat16):
            mine = [parameter for parameter in policy.parameters() if parameter.dtype is dtype]
            # One element too many at the front: no parameter begins where a vector load would like it to.
            flat = torch.empty(1 + sum(parameter.numel() for parameter in mine), dtype=dtype)
            at = 1
            for parameter in mine:
                there = flat[at : at + parameter.numel()].view(parameter.shape)
                parameter.data = there.copy_(parameter)
                at += parameter.numel()
    elif weights == "a transposed parameter":
        parameter = policy.model.action_time_mlp_out.weight
        parameter.data = parameter.data.T.contiguous().T


@lru_cache(maxsize=16)
def _made(key: str, settings: Any) -> Any:
    return Original(make_policy("tiny", **settings.value))


@dataclass(frozen=True)
class _Unhashed:
    value: dict[str, Any] = field(hash=False, compare=False)


def policy_of(settings: dict[str, Any]) -> Any:
    return _made(repr(settings), _Unhashed(settings)).copy()


def twins(settings: dict[str, Any], weights: str) -> tuple[Any, Any]:
    """Two policies of equal numbers, each laid out by itself: a deep copy gives every parameter a storage of its own, and
    bits of a matrix product may depend on where its operands begin."""
    pair = policy_of(settings), policy_of(settings)
    for policy in pair:
        lay_out(policy, weights)
    return pair


def inputs_of(policy: Any, call: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The batch and the keyword arguments of one call; sets what of it is live configuration."""
    config = policy.config
    config.num_steps = call["num_steps"]
    known = [key for key in config.image_features if "empty_camera" not in key]
    present = known[: max(1, len(known) - call["absent"])]
    batch = make_observation(
        policy, batch=call["batch"], seed=call["seed"], cameras=present, task=call["task"],
        image_size=call["image_size"], language_length=len(call["task"]) + 1 + call["pad_to"],
    )  # fmt: skip
    for key in present:
        batch[key] = batch[key].to(call["image_dtype"])
    if call["padding"]:
        batch[f"{present[0]}_padding_mask"] = torch.arange(call["batch"]) % 2 == 0
    noise = make_noise(policy, batch=call["batch"], seed=call["seed"]) if call["given_noise"] else None
    kwargs: dict[str, Any] = dict(noise=noise)
    rtc = call["rtc"]
    config.rtc_config = None
    if rtc is not None:
        config.rtc_config = _rtc_config(rtc)
        # One more than fits is refused alike; where a size is one, most draws would be.
        rows, width = min(rtc["rows"], config.chunk_size + 1), min(rtc["width"], config.max_action_dim + 1)
        if (config.chunk_size, config.max_action_dim) == (1, 1):
            rows, width = 1 + (rtc["rows"] > 11), 1
        shape = (call["batch"],) * (rtc["rank"] - 2) + (rows, width)
        previous = torch.randn(shape, generator=torch.Generator().manual_seed(call["seed"]))
        kwargs |= dict(
            inference_delay=rtc["delay"],
            prev_chunk_left_over=None if rtc["first"] else previous,
            execution_horizon=rtc["horizon"],
        )
    policy.init_rtc_processor()
    policy.model.rtc_processor = policy.rtc_processor
    return batch, kwargs


def _rtc_config(rtc: dict[str, Any]) -> Any:
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    return RTCConfig(
        enabled=True,
        prefix_attention_schedule=RTCAttentionSchedule[rtc["schedule"]],
        max_guidance_weight=rtc["weight"],
        execution_horizon=6,
    )


CONTEXTS = {"bare": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def outcome(policy: Any, call: dict[str, Any]) -> Tensor | Exception:
    """The chunk, or what was raised instead. Both twins draw their noise from one seed."""
    batch, kwargs = inputs_of(policy, call)
    torch.manual_seed(call["seed"])
    with CONTEXTS[call["context"]]():
        return attempt(policy, batch, **kwargs)


def attempt(policy: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor | Exception:
    try:
        return policy.predict_action_chunk(
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()},
            **kwargs,
        ).clone()
    except Exception as error:
        return error


def rel_l2(x: Tensor, reference: Tensor) -> float:
    """Relative L2, of no less than numbers of unit size: a chunk begins as normal noise, to which velocities are added, and
    where a chunk of one or two numbers happens to end near zero, its rounding errors are still those of the sum."""
    x, reference = x.double(), reference.double()
    return float((x - reference).norm() / max(float(reference.norm()), reference.numel() ** 0.5))


def in_fp32(policy: Any) -> Any:
    """The reference of a bf16 tier: the same weights in fp32."""
    return copy.deepcopy(policy).float()


@dataclass(frozen=True)
class Loss:
    """Relative L2 from the fp32 reference in one case: of the bf16 tier, and of stock in bf16."""

    mine: float
    stock: float
    case: str


WORST = 4.0
"""How far one case of the bf16 tier may lie beyond stock's own loss in it or on average over the run, whichever is more,
for stock may be lucky in one. A drawn policy has one to four layers, one to five steps and chunks of as little as one
number: the error is that of a few roundings, which scatter more than verify.SCATTER allows to the 300 numbers of a real
chunk. In a run of 295 random cases (``make fuzz``) ours lay 2.3 times above at worst, and in sum lost 2.13 against 2.96.
Stock lost 0.010 on average and 0.027 at most, so a chunk that is wrong by an eighth of its size is found."""


class Tally:
    """What a run has seen: cases, mismatches, errors, who served, why not, and the bf16 errors beside stock's own.

    raised    calls in which both raised alike      answered  calls that stock refuses and ours answers
    """

    def __init__(self) -> None:
        self.cases = self.mismatches = self.raised = self.answered = 0
        self.served: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.losses: list[Loss] = []

    def receipt(self, policy: Any, tier: str) -> bool:
        """Adds who served since the last receipt; returns whether the engine did."""
        now = smolvla_fast.status(policy)
        seen = getattr(policy, "_receipt", 0)
        policy.__dict__["_receipt"] = now.calls_fast
        fast = now.calls_fast > seen
        if fast:
            self.served[f"{tier}, {now.backend}"] += 1
        else:
            self.fallbacks[str(now.last_fallback)] += 1
        return fast

    def lines(self) -> list[str]:
        return [
            f"cases {self.cases}, mismatches {self.mismatches}, errors alike {self.raised}, "
            f"answered where stock raises {self.answered}",
            *(f"  served by {name}: {count}" for name, count in self.served.most_common()),
            *(f"  stock, {reason}: {count}" for reason, count in self.fallbacks.most_common()),
        ]

    def beyond_stock(self) -> tuple[float, str]:
        """The worst case of the bf16 tier, over what stock loses in it or on average; and which it was."""
        mean = sum(loss.stock for loss in self.losses) / len(self.losses)
        worst = max(self.losses, key=lambda loss: loss.mine / max(loss.stock, mean))
        return worst.mine / max(worst.stock, mean), f"{worst.mine:.3g}, stock {worst.stock:.3g}: {worst.case}"


def compare(tally: Tally, stock: Any, fast: Any, tier: str, call: dict[str, Any], made: Any = None) -> None:
    """One case. ``exact``, and whatever stock serves: equal bits. ``fp32``: FP32_BOUND, sums in another order. ``bf16``: the
    loss is kept, for ``Tally.beyond_stock``.

    made    what the policies were made of, to tell the case again
    """
    tally.cases += 1
    want, got = outcome(stock, call), outcome(fast, call)
    try:
        if isinstance(want, Exception) or isinstance(got, Exception):
            if type(got) is type(want):
                tally.raised += 1
                return
            # Guidance in closed form needs no autograd: under inference_mode stock raises where ours can answer.
            answers_more = "inference" in call["context"] and call["rtc"] is not None
            assert answers_more and isinstance(want, RuntimeError) and isinstance(got, Tensor), (want, got)
            tally.answered += 1
            call = {**call, "context": "no_grad"}
            want = outcome(stock, call)
            assert isinstance(want, Tensor), want
        assert got.shape == want.shape and got.dtype == want.dtype and torch.isfinite(want).all()
        if not tally.receipt(fast, tier) or tier == "exact":
            assert torch.equal(got, want), rel_l2(got, want)
        elif tier == "fp32":
            reference = want if _all_fp32(stock) else outcome(in_fp32(stock), call)
            assert isinstance(reference, Tensor)
            distance = rel_l2(got, reference)
            if distance > FP32_BOUND:  # then stock is asked how far it is from itself, as in ``verify``
                with OtherSums():
                    moved = outcome(in_fp32(stock), call)
                assert isinstance(moved, Tensor) and distance <= fp32_bound(rel_l2(moved, reference)), (
                    distance
                )
        else:
            reference = outcome(in_fp32(stock), call)
            low = outcome(as_bf16(stock), call)
            assert isinstance(reference, Tensor) and isinstance(low, Tensor)
            tally.losses.append(Loss(rel_l2(got, reference), rel_l2(low, reference), f"{call} of {made}"))
    except AssertionError:
        tally.mismatches += 1
        raise


def _all_fp32(policy: Any) -> bool:
    return all(parameter.dtype is torch.float32 for parameter in policy.parameters())


def as_bf16(policy: Any) -> Any:
    """Stock in the dtypes of lerobot/smolvla_base, from the same weights: what bf16 costs stock itself. The layout bf16_text
    is no such stock: its vision stays in fp32, where the tier runs it in bf16."""
    low = copy.deepcopy(policy)
    pair = low.model.vlm_with_expert.to(torch.bfloat16)
    for i, layer in enumerate(pair.lm_expert.layers):
        if is_cross(pair, i):
            layer.self_attn.k_proj.float(), layer.self_attn.v_proj.float()
    return low
