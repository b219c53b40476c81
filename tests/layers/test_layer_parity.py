"""Every method below ``sample_actions`` against LeRobot's own, over the knobs that change a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from support.layer_calls import Given, contents, forward, given, one_layer
from support.policies import rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.model.weights import is_cross
from smolvla_fast.testing import policies

KNOBS: dict[str, dict[str, Any]] = {
    "default": {},
    "self every 3rd": dict(self_attn_every_n_layers=3),
    "all cross": dict(self_attn_every_n_layers=0),
    "all self": dict(attention_mode="self_attn"),
    "fewer expert layers": dict(num_expert_layers=2, self_attn_every_n_layers=0),
    "chunk of 1": dict(chunk_size=1),
    "heads not grouped": dict(text={"num_attention_heads": 3, "num_key_value_heads": 3}),
    "prefix padded": dict(prefix_length=60),
    "batch 5": dict(batch=5),
    "a camera masked": dict(cameras=2, present=1),
}

FP32 = 1e-5
"""What another order of fp32 sums may move a result relative to its size, as for whole chunks: each sum rounds at 6e-8, and
four layers of these sharp weights amplify it a few times."""
TWICE = 2.0
"""With weights in bf16 the truth is stock in fp32, and ours may lose so many times what stock loses. Two orders of the same
roundings scatter against each other; a wrong mask or scale loses ten times as much and more."""


@lru_cache(maxsize=4)
def _made(origin: str, name: str) -> tuple[Any, Given]:
    settings = dict(KNOBS[name])
    batch, present = settings.pop("batch", 1), settings.pop("present", None)
    policy = policies.make_policy("tiny", origin=origin, **settings)
    observation = policies.make_observation(policy, batch=batch, cameras=present)
    return policy, given(policy, observation, policies.make_noise(policy, batch=batch))


@pytest.fixture
def case(origin: str, name: str) -> tuple[Any, Any, Given]:
    """Stock, a copy of it to be patched, and their inputs."""
    policy, inputs = _made(origin, name)
    return policy, copy.deepcopy(policy), inputs


def same(found: Any, stock: Any, bound: Callable[[int], float]) -> None:
    """The same dtypes and shapes, None where stock has None, and values within a bound by place: 0 is equal bits."""
    assert len(found) == len(stock)
    for place, (ours, theirs) in enumerate(zip(found, stock, strict=True)):
        assert (ours is None) == (theirs is None)
        if theirs is None:
            continue
        assert ours.dtype is theirs.dtype and ours.shape == theirs.shape
        allowed = bound(place)
        assert rel_l2(ours, theirs) <= allowed if allowed else torch.equal(ours, theirs), place


def fill(pair: Any, inputs: Given) -> tuple[list[Tensor], Any]:
    return forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)


def whole(pair: Any, model: Any, inputs: Given) -> list[Tensor]:
    """The prefix with its cache; two suffixes behind it; both streams together."""
    outputs, cache = fill(pair, inputs)
    found = [*outputs, *contents(cache, pair.num_vlm_layers)]
    for shift in (0.0, 0.3):
        grown, _ = forward(pair, inputs.suffix_call, [None, inputs.suffix + shift], cache)
        found += [*grown, *contents(cache, pair.num_vlm_layers)]
        if hasattr(cache, "crop"):
            cache.crop(inputs.prefix.shape[1])
    joint, _ = forward(pair, inputs.joint_call, [inputs.prefix, inputs.suffix])
    return [*found, *joint]


def steps(pair: Any, model: Any, inputs: Given) -> list[Tensor]:
    """Three denoise steps on one cache, which is as it was afterwards."""
    _, cache = fill(pair, inputs)
    x, found = inputs.x, []
    for time in (1.0, 0.7, 0.2):
        v = model.denoise_step(inputs.pads, cache, x, torch.full_like(inputs.time, time))
        found.append(v)
        x = x - 0.3 * v
    return [*found, *contents(cache, pair.num_vlm_layers)]


def layers(pair: Any, model: Any, inputs: Given) -> list[Tensor]:
    """Every layer alone, both streams together and the suffix behind a cache."""
    _, cache = fill(pair, inputs)
    found: list[Tensor] = []
    layers = pair.get_model_layers([pair.get_vlm_model().text_model, pair.lm_expert])
    for depth in range(pair.num_vlm_layers):
        name = "forward_cross_attn_layer" if is_cross(pair, depth) else "forward_attn_layer"
        found += one_layer(pair, name, depth, inputs.joint_call, [inputs.prefix, inputs.suffix])
        if layers[1][depth] is not None:
            found += one_layer(pair, name, depth, inputs.suffix_call, [None, inputs.suffix], cache)
    return found


def embeddings(pair: Any, model: Any, inputs: Given) -> list[Tensor]:
    side = pair.get_vlm_model().vision_model.embeddings.image_size
    image = torch.linspace(-1, 1, 2 * 3 * side * side).view(2, 3, side, side)
    return [pair.embed_image(image), pair.embed_language_tokens(torch.arange(7)[None])]


CALLS: dict[str, Callable[..., list[Tensor]]] = {
    "forward": whole, "denoise_step": steps, "layers": layers, "embeddings": embeddings,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["exact", "fp32"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", KNOBS)
def test_results_are_stocks(case: tuple[Any, Any, Given], name: str, call: str, precision: str) -> None:
    stock, policy, inputs = case
    smolvla_fast.patch(policy, precision=precision)
    with torch.no_grad():
        found = CALLS[call](policy.model.vlm_with_expert, policy.model, inputs)
        want = CALLS[call](stock.model.vlm_with_expert, stock.model, inputs)
    same(found, want, lambda place: 0.0 if precision == "exact" else FP32)
    now = smolvla_fast.status(policy)
    if name == "fewer expert layers" and call == "denoise_step":
        assert now.layers_stock == {"denoise_step": 3} and now.layers_fast == {"forward": 1}
    else:
        assert now.layers_fast and not now.layers_stock, now.layers_fallback


@pytest.mark.parametrize("precision", ["exact", "auto"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", ["mixed", "bf16_text"])
def test_bf16_weights_lose_no_more_than_in_stock(origin: str, layout: str, call: str, precision: str) -> None:
    stock = policies.make_policy("tiny", origin=origin, layout=layout)
    truth, policy = copy.deepcopy(stock).float(), copy.deepcopy(stock)
    inputs = given(stock, policies.make_observation(stock), policies.make_noise(stock))
    wide = inputs._replace(prefix=inputs.prefix.float(), suffix=inputs.suffix.float())
    smolvla_fast.patch(policy, precision=precision)
    with torch.no_grad():
        found = CALLS[call](policy.model.vlm_with_expert, policy.model, inputs)
        want = CALLS[call](stock.model.vlm_with_expert, stock.model, inputs)
        exact = CALLS[call](truth.model.vlm_with_expert, truth.model, wide)
    assert not smolvla_fast.status(policy).layers_stock
    if precision == "exact":
        return same(found, want, lambda place: 0.0)
    lost = [0 if x is None else rel_l2(x, y) for x, y in zip(want, exact, strict=True)]
    assert [getattr(x, "dtype", None) for x in found] == [getattr(x, "dtype", None) for x in want]
    return same(
        [None if x is None else x.float() for x in found], exact, lambda place: TWICE * lost[place] + FP32
    )


@pytest.mark.parametrize("name", KNOBS)
def test_gradients_are_stocks(case: tuple[Any, Any, Given], name: str) -> None:
    """Of both streams together, as a training loop of one's own calls them."""
    stock, policy, inputs = case
    smolvla_fast.patch(policy, training=True)

    def learn(policy: Any) -> list[Tensor]:
        policy.train()
        pair = policy.model.vlm_with_expert
        prefix, suffix = (x.clone().requires_grad_() for x in (inputs.prefix, inputs.suffix))
        outputs, _ = forward(pair, inputs.joint_call, [prefix, suffix])
        # Every output counts, so that each layer of both streams has a gradient.
        sum(each.float().sin().sum() for each in outputs).backward()
        gradients = [p.grad for p in pair.parameters() if p.grad is not None]
        policy.zero_grad()
        return [*(each.detach() for each in outputs), prefix.grad, suffix.grad, *gradients]

    found, want = learn(policy), learn(stock)
    assert smolvla_fast.status(policy).layers_fast == {"forward": 1}
    assert len(found) == len(want)
    ours, theirs = (torch.cat([each.flatten() for each in all_]) for all_ in (found, want))
    # A backward sums what a forward has rounded: twice the way through the layers.
    assert rel_l2(ours, theirs) <= 2 * FP32


@pytest.mark.parametrize("settings", [{}, dict(precision="exact", training=True)], ids=["plain", "exact"])
def test_gradients_are_stocks_own_where_no_training_path_is(origin: str, settings: dict[str, Any]) -> None:
    """``patch`` alone promises nothing of training, and ``exact`` has no such path: stock's layers run, with a receipt."""
    policy, inputs = _made(origin, "default")
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin, **settings)
    outputs, _ = forward(twin.model.vlm_with_expert, inputs.joint_call, [inputs.prefix, inputs.suffix])
    want, _ = forward(policy.model.vlm_with_expert, inputs.joint_call, [inputs.prefix, inputs.suffix])
    assert torch.equal(outputs[1], want[1]) and outputs[1].requires_grad
    now = smolvla_fast.status(twin)
    assert now.layers_stock == {"forward": 1} and "training" in str(now.layers_fallback)
