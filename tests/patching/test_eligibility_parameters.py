"""Parameters that no kernel can read by their address, whichever and whenever: stock runs, with a receipt.

What was changed is changed on a stock twin as well, and both are asked: equal bits, or the same exception.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.captured import recording
from support.policies import chunk, make_policy
from support.train_steps import make_batch, step
from torch import Tensor, nn
from torch.nn.utils import parametrize

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation

torchao = pytest.importorskip("torchao.quantization", reason="the quantised weights are torchao's own")
__all__ = ["recording"]


def _vlm(model: Any) -> Any:
    return model.vlm_with_expert.get_vlm_model()


PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "head": lambda model: model.action_out_proj,
    "time head": lambda model: model.action_time_mlp_in,
    "state head": lambda model: model.state_proj,
    "expert linear": lambda model: model.vlm_with_expert.lm_expert.layers[0].self_attn.q_proj,
    "cross linear": lambda model: model.vlm_with_expert.lm_expert.layers[1].self_attn.k_proj,
    "expert norm": lambda model: model.vlm_with_expert.lm_expert.norm,
    "norm of an expert layer": lambda model: model.vlm_with_expert.lm_expert.layers[2].input_layernorm,
    "text linear": lambda model: _vlm(model).text_model.layers[1].mlp.down_proj,
    "first keys": lambda model: _vlm(model).text_model.layers[0].self_attn.k_proj,
    "norm of a text layer": lambda model: _vlm(model).text_model.layers[1].post_attention_layernorm,
    "tokens": lambda model: _vlm(model).text_model.get_input_embeddings(),
    "vision linear": lambda model: _vlm(model).vision_model.encoder.layers[1].mlp.fc1,
    "vision norm": lambda model: _vlm(model).vision_model.encoder.layers[0].layer_norm2,
    "last vision norm": lambda model: _vlm(model).vision_model.post_layernorm,
    "patches": lambda model: _vlm(model).vision_model.embeddings.patch_embedding,
    "positions": lambda model: _vlm(model).vision_model.embeddings.position_embedding,
    "connector": lambda model: _vlm(model).connector.modality_projection.proj,
    "unread": lambda model: model.vlm_with_expert.vlm.lm_head,
}
LINEARS = ("head", "time head", "cross linear", "text linear", "vision linear")
BIASED = ("head", "vision linear", "vision norm", "last vision norm", "patches")


class _Scaled(Tensor):
    """Counts for 1.5 times what its memory holds, wherever a layer uses it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layers = (nn.functional.linear, nn.functional.layer_norm, nn.functional.embedding, Tensor.__mul__)
        if func not in layers:
            return super().__torch_function__(func, types, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*(1.5 * a if isinstance(a, cls) else a for a in args), **(kwargs or {}))


class _Packed(nn.Parameter):
    """As bitsandbytes' Params4bit: a class of its own below Parameter."""


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def _put(make: Callable[[Tensor], Any], key: str = "weight") -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        module._parameters[key] = make(module._parameters[key].detach().clone())

    return change


def _quantized(**settings: Any) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = torchao.Int8WeightOnlyConfig(**settings)
            torchao.quantize_(module, config, filter_fn=lambda m, name: m is module)

    return change


def _frozen(x: Any) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def _property(module: nn.Module) -> None:
    cls = type(module)
    weight = property(lambda self: 2 * self._parameters["weight"])
    module.__class__ = type(cls.__name__, (cls,), {"weight": weight, "__module__": cls.__module__})


def _attribute(module: nn.Module) -> None:
    module.__dict__["weight"] = 2 * module.weight.detach()


def _buffer(module: nn.Module) -> None:
    value = module.weight.detach()
    del module.weight
    module.register_buffer("weight", value)


def _swapped(module: nn.Module) -> None:
    other = nn.Parameter(module.weight.detach().clone().as_subclass(_Scaled), requires_grad=False)
    module.weight.requires_grad_(False)
    torch.utils.swap_tensors(module.weight, other)


CHANGES: dict[str, tuple[Callable[[nn.Module], None], tuple[str, ...]]] = {
    "torchao int8": (_quantized(), LINEARS),
    "torchao int8, version 2": (_quantized(version=2), ("head", "text linear")),
    "subclass": (_put(lambda w: _frozen(w.as_subclass(_Scaled))), tuple(PLACES)),
    "bias of a subclass": (_put(lambda b: _frozen(b.as_subclass(_Scaled)), "bias"), BIASED),
    "swapped in place": (_swapped, ("head", "expert norm", "text linear")),
    "subclass of Parameter": (_put(lambda w: _Packed(w, requires_grad=False)), ("head", "vision norm")),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "weight", _Half()) and None,
        ("head", "expert linear", "expert norm", "vision norm", "positions", "tokens"),
    ),
    "a property of the class": (_property, ("head", "expert norm", "text linear", "positions")),
    "an attribute beside it": (_attribute, ("head", "expert norm", "vision linear")),
    "a buffer": (_buffer, ("head", "norm of a text layer")),
    "sparse": (_put(lambda w: _frozen(w.to_sparse())), ("head", "text linear", "first keys")),
    "sparse rows": (_put(lambda w: _frozen(w.to_sparse_csr())), ("head", "vision linear")),
    "oneDNN's": (_put(lambda w: _frozen(w.to_mkldnn())), ("head", "expert linear")),
    "meta": (_put(lambda w: _frozen(w.to("meta"))), ("head", "vision norm", "positions")),
    "nested": (_put(lambda w: _frozen(torch.nested.nested_tensor([w, w]))), ("head", "text linear")),
    "negated view": (_put(lambda w: _frozen(torch._neg_view(w))), ("head", "expert norm", "vision norm")),
    "negated bias": (_put(lambda b: _frozen(torch._neg_view(b)), "bias"), BIASED),
    "not initialised": (_put(lambda w: nn.UninitializedParameter()), ("head", "vision linear")),
    "fp64": (_put(lambda w: _frozen(w.double())), ("head", "expert norm", "tokens")),
    "complex": (_put(lambda w: _frozen(w.to(torch.complex64))), ("head",)),
    "expanded": (_put(lambda w: _frozen(w[:1].expand_as(w))), ("head", "text linear", "expert norm")),
    "renormalised rows": (lambda m: setattr(m, "max_norm", 0.3), ("positions", "tokens")),
    "one number for all": (_put(lambda w: _frozen(w[:1])), ("expert norm", "norm of a text layer")),
    "bias of one number": (_put(lambda b: _frozen(b[:1]), "bias"), ("head", "vision linear")),
    "too narrow": (_put(lambda w: _frozen(w[:, :-1].contiguous())), ("head", "connector", "positions")),
    "too few": (_put(lambda w: _frozen(w[:-1])), ("head", "connector", "text linear")),
}  # fmt: skip
CASES = [(change, place) for change in CHANGES for place in CHANGES[change][1]]
UNDEFINED = [("meta", "head")]
"""A product with a weight that has no memory: stock gives whatever lay in the memory of the result."""
TRAINED = [case for case in CASES if case not in UNDEFINED and case[1] == CHANGES[case[0]][1][0]]


def _outcome(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return type(error)


def _check(policy: Any, want: Any, observation: dict[str, Tensor], noise: Tensor, place: str) -> None:
    served = smolvla_fast.status(policy).calls_fast
    got = _outcome(lambda: chunk(policy, observation, noise))
    if want is not None:
        assert torch.equal(got, want) if isinstance(want, Tensor) else got is want, (want, got)
    now = smolvla_fast.status(policy)
    assert not now.active and now.calls_fast == served and now.calls_stock == 1
    name = next(n for n, module in policy.model.named_modules() if module is PLACES[place](policy.model))
    assert name.split(".")[-1] in now.last_fallback or "norm" in now.last_fallback, now.last_fallback


@pytest.mark.parametrize(
    ("change", "place"),
    [
        # One change has every place, every change has one.
        pytest.param(
            *case, marks=[pytest.mark.long] * (case[0] != "subclass" and case[1] != CHANGES[case[0]][1][0])
        )
        for case in CASES
    ],
)
def test_a_parameter_that_is_not_dense_runs_stock(change: str, place: str) -> None:
    """Before the policy is patched, and when chunks have been served."""
    twin = make_policy("tiny", num_steps=1)
    observation, noise = make_observation(twin), make_noise(twin)
    before, after = make_policy("tiny", num_steps=1), smolvla_fast.patch(make_policy("tiny", num_steps=1))
    chunk(after, observation, noise)
    assert smolvla_fast.status(after).calls_fast == 1
    for each in (twin, before, after):
        CHANGES[change][0](PLACES[place](each.model))
    smolvla_fast.patch(before)
    want = _outcome(lambda: chunk(twin, observation, noise))
    for policy in (before, after):
        _check(policy, None if (change, place) in UNDEFINED else want, observation, noise, place)


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("place", ["head", "expert linear"])
@pytest.mark.parametrize("batch", [1, 2], ids=["a shape seen before", "a new shape"])
def test_a_captured_policy_reads_no_parameter_that_is_not_dense(place: str, batch: int) -> None:
    """Where the look at the model hides behind the chunk, a chunk that is no replay must be looked at before."""
    twin = make_policy("tiny")
    policy = smolvla_fast.patch(make_policy("tiny"), backend="torch")
    chunk(policy, make_observation(twin), make_noise(twin))
    assert smolvla_fast.status(policy).graphs == 1
    for each in (twin, policy):
        _quantized()(PLACES[place](each.model))
    observation, noise = make_observation(twin, batch=batch), make_noise(twin, batch=batch)
    _check(policy, chunk(twin, observation, noise), observation, noise, place)


@pytest.mark.parametrize(("change", "place"), TRAINED)
def test_a_parameter_that_is_not_dense_trains_as_in_stock(change: str, place: str) -> None:
    twin = make_policy("tiny")
    batch = make_batch(twin, batch=1, cameras=1)
    before, after = make_policy("tiny"), smolvla_fast.patch(make_policy("tiny"), training=True)
    step(after, batch)
    assert smolvla_fast.status(after).training_fast == 1
    for each in (twin, before, after):
        CHANGES[change][0](PLACES[place](each.model))
    smolvla_fast.patch(before, training=True)
    want = _outcome(lambda: step(twin, batch))
    for policy in (before, after):
        served = smolvla_fast.status(policy).training_fast
        got, now = _outcome(lambda policy=policy: step(policy, batch)), smolvla_fast.status(policy)
        if isinstance(want, type):
            assert got is want, (want, got)
            continue
        assert got.gradients.keys() == want.gradients.keys() and torch.equal(got.random, want.random)
        if now.training_fast > served:
            # Dense, and what is unusual about it is the live module's affair: two orders of summation.
            torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=0)
            continue
        assert now.training_fallback and torch.equal(got.loss, want.loss)
        assert all(torch.equal(got.gradients[name], want.gradients[name]) for name in want.gradients)


def test_a_dtensor_runs_stock() -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        policy = make_policy("tiny")
        head = policy.model.action_out_proj
        head.weight = _frozen(DTensor.from_local(head.weight.detach(), mesh, [Replicate()]))
        smolvla_fast.patch(policy)
        assert "DTensor" in smolvla_fast.status(policy).last_fallback
    finally:
        distributed.destroy_process_group()


@torch.no_grad()
def test_swapped_plain_tensors_are_served(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    """``torch.func.functional_call`` puts plain tensors where parameters were: dense ones, read where they lie."""
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    other = {f"model.{n}": 1.01 * p for n, p in policy.model.named_parameters()}
    twin = copy.deepcopy(policy)
    twin.load_state_dict(other, strict=False)
    call = _Call(policy)
    got = torch.func.functional_call(call, {f"policy.{n}": p for n, p in other.items()}, (observation, noise))
    assert smolvla_fast.status(policy).calls_fast == 2
    assert torch.equal(got, chunk(twin, observation, noise))


class _Call(nn.Module):
    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: dict[str, Tensor], noise: Tensor) -> Tensor:
        return chunk(self.policy, observation, noise)
