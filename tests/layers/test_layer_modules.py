"""``smolvla_fast.layers`` for builders: whole layers on tensors, without a policy, against LeRobot's own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.layer_calls import forward, given
from support.policies import BOTH, make_policy, rel_l2
from torch import Tensor

import smolvla_fast.layers as fused
from smolvla_fast.layers import caches
from smolvla_fast.model.weights import is_cross
from smolvla_fast.testing.policies import make_noise, make_observation

BOUND = 1e-5
"""As of test_layer_parity: another order of fp32 sums over four layers."""


@BOTH
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_expert_of_fused_layers_is_stocks(origin: str, backend: str, batch: int) -> None:
    """The expert's suffix pass, layer by layer, over a prefix that stock has cached."""
    policy = make_policy("tiny")
    inputs = given(policy, make_observation(policy, batch=batch), make_noise(policy, batch=batch))
    pair = policy.model.vlm_with_expert
    with torch.no_grad():
        _, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)
        kvs = [[each.clone() for each in caches.read(cache, i)] for i in range(pair.num_vlm_layers)]
        want = forward(pair, inputs.suffix_call, [None, inputs.suffix], cache)[0][1]
        positions, mask = inputs.suffix_call
        x, prefix = inputs.suffix, inputs.prefix.shape[1]
        for i, module in enumerate(pair.lm_expert.layers):
            if is_cross(pair, i):
                layer = fused.CrossAttentionLayer(module, backend)
                k, v = layer.keys_and_values(*kvs[i])
                x = layer(x, k, v, positions - positions[:, :1], mask[:, :, :prefix])
            else:
                x, k, v = fused.SelfAttentionLayer(module, backend)(x, *kvs[i], positions, mask)
                assert k.shape[1] == v.shape[1] == prefix + x.shape[1] and torch.equal(
                    k[:, :prefix], kvs[i][0]
                )
        assert rel_l2(pair.lm_expert.norm(x), want) < BOUND


@pytest.mark.parametrize("cross", [False, True])
def test_a_layer_learns_as_its_own_modules_do(origin: str, cross: bool) -> None:
    """The backward of a layer against the same maths by hand in fp64, but for its norms, which are fp32 inside."""
    policy = make_policy("tiny")
    module = policy.model.vlm_with_expert.lm_expert.layers[int(cross)]
    wide = copy.deepcopy(module).double()
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x, k, v = draw(2, 5, 36), draw(2, 7, 1, 16), draw(2, 7, 1, 16)
    positions, mask = torch.arange(5).expand(2, -1), torch.ones(2, 5, 7 if cross else 12, dtype=torch.bool)
    mask[:, :, 3] = False

    def learn(layer: Any, x: Tensor, by_hand: bool) -> list[Tensor]:
        x, keys, values = (each.to(x.dtype).clone().requires_grad_() for each in (x, k, v))
        if by_hand:
            out = _by_hand(layer, cross, x, keys, values, positions, mask)
        elif cross:
            made = fused.CrossAttentionLayer(layer)
            out = made(x, *made.keys_and_values(keys, values), positions, mask)
        else:
            out, *_ = fused.SelfAttentionLayer(layer)(x, keys, values, positions, mask)
        out.sin().sum().backward()
        return [out.detach(), x.grad, keys.grad, values.grad, *(each.grad for each in layer.parameters())]  # type: ignore[list-item]

    for found, want in zip(learn(module, x, False), learn(wide, x.double(), True), strict=True):
        assert rel_l2(found, want) < BOUND


def _by_hand(
    layer: Any, cross: bool, x: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor
) -> Tensor:
    from smolvla_fast.ops.reference.masked_attention import masked_attention

    def rotated(y: Tensor) -> Tensor:
        angles = positions[..., None].double() / 10_000 ** (torch.arange(8).double() / 8)
        sin, cos = angles.sin()[:, :, None], angles.cos()[:, :, None]
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    attention = layer.self_attn
    h = layer.input_layernorm(x)
    split = lambda y: y.view(*y.shape[:2], -1, 16)  # noqa: E731
    q = rotated(split(attention.q_proj(h)))
    if cross:
        k, v = split(attention.k_proj(k.flatten(2))), split(attention.v_proj(v.flatten(2)))
    else:
        k = torch.cat([k, rotated(split(attention.k_proj(h)))], dim=1)
        v = torch.cat([v, split(attention.v_proj(h))], dim=1)
    y = x + attention.o_proj(masked_attention(q, k, v, mask))
    return y + layer.mlp(layer.post_attention_layernorm(y))


@pytest.mark.parametrize("what", ["hook", "bias", "replaced"])
@pytest.mark.parametrize("cross", [False, True])
def test_what_a_layers_modules_do_besides_their_weights_counts(origin: str, cross: bool, what: str) -> None:
    """Without gradients as with them, and as by hand; a query that sees nothing among the rows."""
    module = make_policy("tiny").model.vlm_with_expert.lm_expert.layers[int(cross)]
    if what == "hook":
        module.mlp.register_forward_hook(lambda m, i, out: 1.5 * out)
    elif what == "bias":
        module.self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(48))
    else:
        module.self_attn.q_proj = torch.nn.Sequential(module.self_attn.q_proj, torch.nn.Tanh())
        module.self_attn.q_proj.weight = module.self_attn.q_proj[0].weight
    x, k, v = torch.randn(1, 5, 36), torch.randn(1, 7, 1, 16), torch.randn(1, 7, 1, 16)
    positions, mask = torch.arange(5)[None], torch.ones(1, 5, 7 if cross else 12, dtype=torch.bool)
    mask[:, 2] = False
    layer: Any = (fused.CrossAttentionLayer if cross else fused.SelfAttentionLayer)(module)
    call = lambda: layer(x, *(layer.keys_and_values(k, v) if cross else (k, v)), positions, mask)  # noqa: E731
    with torch.no_grad():
        frozen = call()
        wide = [each.double() for each in (x, k, v)]
        want = _by_hand(copy.deepcopy(module).double(), cross, *wide, positions, mask)
    for found in (frozen, call()):
        assert rel_l2(found if cross else found[0], want) < BOUND


def test_modules_hold_the_layers_own_parameters(origin: str) -> None:
    module = make_policy("tiny").model.vlm_with_expert.lm_expert.layers[1]
    layer = fused.CrossAttentionLayer(module)
    assert {id(each) for each in layer.parameters()} == {id(each) for each in module.parameters()}


@pytest.mark.parametrize("kind", [fused.SelfAttentionLayer, fused.CrossAttentionLayer])
def test_what_is_no_layer_of_its_kind_is_refused_at_once(origin: str, kind: Any) -> None:
    layers = make_policy("tiny").model.vlm_with_expert.lm_expert.layers  # the first attends to itself
    own, other = layers[kind.cross], layers[not kind.cross]
    for nothing in (None, own.self_attn):
        with pytest.raises(
            TypeError, match=f"{kind.__name__} takes a decoder layer .* got a {type(nothing).__name__}"
        ):
            kind(nothing)
    with pytest.raises(ValueError, match=f"give it to {'Self' if kind.cross else 'Cross'}AttentionLayer"):
        kind(other)
    with pytest.raises(ValueError, match="backend='cuad' is not a backend; accepted are 'auto'"):
        kind(own, "cuad")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(mask=torch.ones(1, 5, 6, dtype=torch.bool)), "mask"),
        (dict(mask=torch.ones(1, 5, 7)), "mask"),
        (dict(k=torch.ones(1, 7, 1, 8)), "k is"),
        (dict(v=torch.ones(1, 6, 1, 16)), "v is"),
        (dict(x=torch.ones(1, 5, 24)), "x is"),
        (dict(positions=torch.arange(5)), "positions"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(origin: str, change: dict[str, Tensor], error: str) -> None:
    layer = fused.CrossAttentionLayer(make_policy("tiny").model.vlm_with_expert.lm_expert.layers[1])
    call = dict(
        x=torch.ones(1, 5, 36), k=torch.ones(1, 7, 1, 16), v=torch.ones(1, 7, 1, 16), positions=torch.arange(5)[None],
        mask=torch.ones(1, 5, 7, dtype=torch.bool),
    )  # fmt: skip
    with torch.no_grad(), pytest.raises(ValueError, match=error):
        layer(**(call | change))
