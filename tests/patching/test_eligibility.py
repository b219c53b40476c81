"""Whatever lies outside the engine's range runs stock: same bits, one message, counted, and the reason is named."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_FIRST, LEROBOT_ONLY, chunk, make_policy, seam_inputs
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.patching.eligibility import Eligibility
from smolvla_fast.testing.policies import make_noise, make_observation


def _hook(policy: Any) -> None:
    policy.model.vlm_with_expert.lm_expert.layers[1].mlp.register_forward_hook(lambda *_: None)


def _vision_hook(policy: Any) -> None:
    policy.model.vlm_with_expert.get_vlm_model().vision_model.register_forward_pre_hook(lambda *_: None)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced_linear(policy: Any) -> None:
    attention = policy.model.vlm_with_expert.lm_expert.layers[0].self_attn
    old = attention.o_proj
    attention.o_proj = _Doubled(old.in_features, old.out_features, bias=False)
    attention.o_proj.load_state_dict(old.state_dict())


def _replaced_head(policy: Any) -> None:
    old = policy.model.action_out_proj
    policy.model.action_out_proj = _Doubled(old.in_features, old.out_features)
    policy.model.action_out_proj.load_state_dict(old.state_dict())


def _replaced_norm(policy: Any, by: float = 0.1) -> None:
    class Shifted(type(policy.model.vlm_with_expert.lm_expert.layers[0].input_layernorm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + by

    for layer in policy.model.vlm_with_expert.lm_expert.layers:
        layer.input_layernorm.__class__ = layer.post_attention_layernorm.__class__ = Shifted
    policy.model.vlm_with_expert.lm_expert.norm.__class__ = Shifted


def _replaced_one_mlp(policy: Any) -> None:
    class Scaled(type(policy.model.vlm_with_expert.lm_expert.layers[2].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * super().forward(x)

    policy.model.vlm_with_expert.lm_expert.layers[2].mlp.__class__ = Scaled


def _instance_forward(policy: Any) -> None:
    layer = policy.model.vlm_with_expert.get_vlm_model().connector
    stock = layer.forward
    layer.forward = lambda x: 1.5 * stock(x)


def _instance_method(policy: Any) -> None:
    pair = policy.model.vlm_with_expert
    stock = pair.embed_image
    pair.embed_image = lambda image: 1.5 * stock(image)


def _wrapped_method(policy: Any) -> None:
    pair = policy.model.vlm_with_expert
    stock = pair.embed_image
    pair.embed_image = functools.wraps(stock)(lambda image: 1.5 * stock(image))


def _wrapped_step(policy: Any) -> None:
    stock = policy.model.denoise_step
    policy.model.denoise_step = functools.wraps(stock)(lambda **kwargs: 1.1 * stock(**kwargs))


def _pair(policy: Any) -> Any:
    return policy.model.vlm_with_expert


def _subclassed(module: Any) -> None:
    class Scaled(type(module)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            if isinstance(out, Tensor):
                return 1.5 * out
            if hasattr(out, "_replace"):
                return out._replace(last_hidden_state=1.5 * out.last_hidden_state)
            out.last_hidden_state = 1.5 * out.last_hidden_state
            return out

    module.__class__ = Scaled


def _final_norm(policy: Any) -> None:
    _subclassed(_pair(policy).lm_expert.norm)


def _vision_model_of_a_file_under_a_folder_called_torch(policy: Any) -> None:
    tower = _pair(policy).get_vlm_model().vision_model
    code = "class Mine(base):\n    def forward(self, *args, **kwargs):\n        return super().forward(*args, **kwargs)\n"
    names: dict[str, Any] = {"base": type(tower)}
    exec(compile(code, "/home/me/torch/transformers/mine.py", "exec"), names)
    tower.__class__ = names["Mine"]


def _vision_model(policy: Any) -> None:
    _subclassed(_pair(policy).get_vlm_model().vision_model)


def _vision_encoder(policy: Any) -> None:
    _subclassed(_pair(policy).get_vlm_model().vision_model.encoder)


def _one_vision_mlp(policy: Any) -> None:
    _subclassed(_pair(policy).get_vlm_model().vision_model.encoder.layers[1].mlp)


def _one_activation(policy: Any) -> None:
    _pair(policy).lm_expert.layers[1].mlp.act_fn = nn.ReLU()


def _every_activation(policy: Any) -> None:
    for layer in _pair(policy).lm_expert.layers:
        layer.mlp.act_fn = nn.ReLU()


def _vision_scale(policy: Any) -> None:
    for layer in _pair(policy).get_vlm_model().vision_model.encoder.layers:
        layer.self_attn.scale *= 3


def _connector_bias(policy: Any) -> None:
    projection = _pair(policy).get_vlm_model().connector.modality_projection.proj
    projection.bias = nn.Parameter(torch.ones(projection.out_features))


def _decoder_bias(policy: Any) -> None:
    projection = _pair(policy).lm_expert.layers[0].self_attn.o_proj
    projection.bias = nn.Parameter(torch.ones(projection.out_features))


def _wrapped_connector(policy: Any) -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 1.5 * self.inner(x)

    vlm = _pair(policy).get_vlm_model()
    vlm.connector = Outer(vlm.connector)


def _torch_norms(policy: Any) -> None:
    for layer in _pair(policy).lm_expert.layers:
        layer.input_layernorm = nn.RMSNorm(layer.input_layernorm.weight.shape[0])


class _Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 1.5 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def _tensor_subclass(policy: Any) -> None:
    projection = _pair(policy).lm_expert.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach().as_subclass(_Subclass))


def _head_without_bias(policy: Any) -> None:
    policy.model.action_in_proj.bias = None


def _strided_weight(policy: Any) -> None:
    projection = _pair(policy).lm_expert.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(projection.weight.detach().t().contiguous().t())


def _subclass_of_the_model(policy: Any) -> None:
    class Forked(type(policy.model)):  # type: ignore[misc]
        def embed_prefix(self, *args: Any, **kwargs: Any) -> Any:
            embeddings, pad, att = super().embed_prefix(*args, **kwargs)
            return embeddings * 1.1, pad, att

    policy.model.__class__ = Forked


def _subclass_with_its_own_sampling(policy: Any) -> None:
    class Forked(type(policy.model)):  # type: ignore[misc]
        def sample_actions(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().sample_actions(*args, **kwargs) + 1

    policy.model.__class__ = Forked


def _subclass_of_the_pair(policy: Any) -> None:
    class Forked(type(policy.model.vlm_with_expert)):  # type: ignore[misc]
        def eager_attention_forward(self, *args: Any) -> Tensor:
            return 1.1 * super().eager_attention_forward(*args)

    policy.model.vlm_with_expert.__class__ = Forked


# name -> (change to the policy, part of the reason)
MODELS: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook in the expert": (_hook, "lm_expert.layers.1.mlp has a forward hook"),
    "hook in the vision tower": (_vision_hook, "vision_model has a forward hook"),
    "replaced linear": (_replaced_linear, "lm_expert.layers.0.self_attn.o_proj"),
    "replaced head": (_replaced_head, "action_out_proj"),
    "norm that computes something else": (_replaced_norm, "decoder norm"),
    "norm that gives no number": (lambda policy: _replaced_norm(policy, float("nan")), "decoder norm"),
    "vision model under a folder called torch": (
        _vision_model_of_a_file_under_a_folder_called_torch,
        "vision_model",
    ),
    "one MLP of another kind": (_replaced_one_mlp, "expert layer 2"),
    "forward replaced on an instance": (_instance_forward, "connector has its forward replaced"),
    "method replaced on an instance": (_instance_method, "embed_image"),
    "method replaced with functools.wraps": (_wrapped_method, "embed_image is replaced"),
    "step replaced with functools.wraps": (_wrapped_step, "denoise_step is replaced"),
    "final norm": (_final_norm, "final norm"),
    "vision model": (_vision_model, "vision_model"),
    "vision encoder": (_vision_encoder, "vision_model.encoder"),
    "one vision MLP": (_one_vision_mlp, "vision layer 1"),
    "one activation": (_one_activation, "expert layer 1"),
    "every activation": (_every_activation, "decoder MLP"),
    "vision scale": (_vision_scale, "vision layer"),
    "connector with a bias": (_connector_bias, "proj has a bias"),
    "decoder linear with a bias": (_decoder_bias, "has a bias"),
    "wrapped connector": (_wrapped_connector, "AttributeError"),
    "torch's RMSNorm": (_torch_norms, ""),
    "tensor subclass": (_tensor_subclass, "_Subclass"),
    "head without a bias": (_head_without_bias, "action_in_proj"),
    "strided weight": (_strided_weight, "not contiguous"),
    "subclass of the model": (_subclass_of_the_model, "embed_prefix"),
    "subclass with its own sampling": (_subclass_with_its_own_sampling, "sample_actions"),
    "subclass of the VLM with expert": (_subclass_of_the_pair, "eager_attention_forward"),
}

UNDO = ("_subclass_of_the_model", "_subclass_with_its_own_sampling")


def _check(policy: Any, stock: Tensor, fast: Tensor, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.equal(fast.nan_to_num(), stock.nan_to_num())
    now = smolvla_fast.status(policy)
    assert now.calls_fast == 0 and now.calls_stock >= 1
    assert reason in now.last_fallback
    assert len(caplog.records) == 1, "one reason, one message"


@LEROBOT_FIRST
@pytest.mark.check(18, 19)
@pytest.mark.parametrize("name", MODELS)
def test_model_changed_before_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = MODELS[name]
    policy = make_policy("tiny")
    observation, noise = make_observation(policy), make_noise(policy)
    change(policy)
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    _check(policy, stock, chunk(policy, observation, noise), reason, caplog)
    assert not smolvla_fast.status(policy).active


# Replacing the class of a patched model undoes the patch: what is left then is not ours to answer for.
@LEROBOT_FIRST
@pytest.mark.check(18, 19)
@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name][0].__name__ not in UNDO])
def test_model_changed_after_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = MODELS[name]
    policy = make_policy("tiny")
    observation, noise = make_observation(policy), make_noise(policy)
    smolvla_fast.patch(policy)
    change(policy)
    chunk(policy, observation, noise)
    with torch.no_grad():
        model = policy.model
        stock = type(model).stock_class.sample_actions(model, *seam_inputs(policy, observation), noise=noise)
    _check(policy, stock[:, :, :6], chunk(policy, observation, noise), reason, caplog)
    assert not smolvla_fast.status(policy).active


def _fewer_masks(inputs: list[Any]) -> None:
    inputs[1] = [*inputs[1], torch.ones(1, dtype=torch.bool)]


def _integer_masks(inputs: list[Any]) -> None:
    inputs[3] = inputs[3].long()


def _double_noise(inputs: list[Any]) -> None:
    inputs[5] = inputs[5].double()


def _double_state(inputs: list[Any]) -> None:
    inputs[4] = inputs[4].double()


def _another_size(inputs: list[Any]) -> None:
    inputs[0] = [nn.functional.pad(image, (0, 32, 0, 32)) for image in inputs[0]]


def _integer_images(inputs: list[Any]) -> None:
    inputs[0] = [image.to(torch.int32) for image in inputs[0]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_fewer_masks, "2 images with 3 masks"),
        (_integer_masks, "language masks"),
        (_double_noise, "noise"),
        (_double_state, "state"),
        (_another_size, "the vision tower is for"),
        (_integer_images, "images of dtype torch.int32; floating point"),
    ],
)
@torch.no_grad()
def test_unusual_arguments_do_what_stock_does(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, change: Any, reason: str
) -> None:
    """Same bits, or the same exception."""

    def outcome() -> Any:
        inputs = [*seam_inputs(policy, observation), noise]
        change(inputs)
        try:
            return policy.model.sample_actions(*inputs[:5], noise=inputs[5])
        except Exception as error:
            return type(error)

    stock = outcome()
    smolvla_fast.patch(policy)
    fast = outcome()
    assert torch.equal(fast, stock) if isinstance(stock, Tensor) else fast is stock
    assert reason in smolvla_fast.status(policy).last_fallback and smolvla_fast.status(policy).calls_fast == 0


@torch.no_grad()
def test_strided_noise_and_iterators_are_served(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    smolvla_fast.patch(policy)
    images, masks, *rest = seam_inputs(policy, observation)
    wanted = policy.model.sample_actions(images, masks, *rest, noise=noise)
    strided = noise.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(policy.model.sample_actions(iter(images), iter(masks), *rest, noise=strided), wanted)
    assert smolvla_fast.status(policy).calls_fast == 2


class _Wrapped(nn.Module):
    """A linear layer as quantisers of other libraries put it in: without a ``weight``."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def test_a_wrapped_first_layer_runs_stock(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    attention = policy.model.vlm_with_expert.get_vlm_model().text_model.layers[0].self_attn
    attention.k_proj = _Wrapped(attention.k_proj)
    # Stock reads that weight's dtype itself where the policy is LeRobot's: then both fail, and alike.
    try:
        wanted = chunk(policy, observation, noise)
    except AttributeError as error:
        with pytest.raises(type(error)):
            chunk(smolvla_fast.patch(policy), observation, noise)
        return
    smolvla_fast.patch(policy)
    assert "stock runs: " in caplog.text and "k_proj" in caplog.text
    assert torch.equal(chunk(policy, observation, noise), wanted)


def test_disabled_asks_nothing_of_this_machine(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable may have been set because the machine has changed: a wish that cannot be met must not raise then."""
    monkeypatch.setattr("smolvla_fast.ops.cpu.int8.why_not", lambda device: "no such instruction")
    with pytest.raises(RuntimeError, match="no such instruction"):
        smolvla_fast.patch(policy, precision="int8")
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    assert smolvla_fast.patch(policy, precision="int8") is policy
    assert not smolvla_fast.status(policy).active


def test_unpatched_by_another_thread_in_mid_call(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = chunk(policy, observation, noise)
    smolvla_fast.patch(policy)
    policy.model.vlm_with_expert.lm_expert.norm.register_forward_hook(lambda *_: None)

    def fell_back(self: Any, reason: str) -> None:  # where the other thread gets in
        smolvla_fast.unpatch(policy)

    monkeypatch.setattr("smolvla_fast.patching.runtime.Runtime.fell_back", fell_back)
    assert torch.equal(chunk(policy, observation, noise), wanted)


def test_a_policy_that_has_changed_its_dtype_says_so_once(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    with caplog.at_level(logging.INFO, "smolvla_fast"):
        caplog.clear()
        policy.model.vlm_with_expert.bfloat16()
        for _ in range(2):
            chunk(policy, observation, noise)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and said[0].startswith("smolvla_fast: now: bf16 on cpu, backend "), said


def test_a_model_that_holds_its_own_method_is_freed(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    import gc
    import weakref
    from types import MethodType

    mine = copy.deepcopy(policy)
    mine.model.note = MethodType(lambda self: None, mine.model)
    chunk(smolvla_fast.patch(mine), observation, noise)
    assert smolvla_fast.status(mine).calls_fast == 1
    gone = weakref.ref(mine.model)
    del mine
    gc.collect()
    assert gone() is None


def test_a_failed_patch_leaves_the_policy_as_it_was(policy: Any) -> None:
    cls = type(policy.model)
    with pytest.raises(KeyError):
        smolvla_fast.patch(policy, warmup={"observation.images.camera1": torch.zeros(1)})
    assert type(policy.model) is cls


@LEROBOT_ONLY
@pytest.mark.parametrize(
    "settings",
    [dict(num_expert_layers=2), dict(use_cache=False)],
    ids=["fewer expert layers", "use_cache=False"],
)
def test_what_stock_cannot_run_fails_as_in_stock(settings: dict[str, Any]) -> None:
    policy = make_policy("tiny", **settings)
    observation, noise = make_observation(policy), make_noise(policy)
    with pytest.raises(Exception) as stock:
        chunk(policy, observation, noise)
    smolvla_fast.patch(policy)
    with pytest.raises(type(stock.value)) as fast:
        chunk(policy, observation, noise)
    assert str(fast.value) == str(stock.value)
    assert smolvla_fast.status(policy).calls_stock == 1


def test_a_policy_that_the_probe_refuses_is_looked_through_once(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until something in it changes, a chunk by stock does not wait for the rules again."""
    _replaced_norm(policy)
    smolvla_fast.patch(policy)
    looks: list[Any] = []
    look = Eligibility.model_reason
    monkeypatch.setattr(Eligibility, "model_reason", lambda self, model: looks.append(0) or look(self, model))
    for _ in range(2):
        chunk(policy, observation, noise)
    assert not looks and smolvla_fast.status(policy).calls_stock == 2
    norm = policy.model.vlm_with_expert.lm_expert.norm
    norm.variance_epsilon = 2 * norm.variance_epsilon
    chunk(policy, observation, noise)
    assert len(looks) == 1 and "decoder norm" in str(smolvla_fast.status(policy).last_fallback)


@pytest.mark.check(43)
def test_bad_input_raises_as_stock_and_the_next_call_is_right(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    broken: list[dict[str, Any]] = [
        {k: v for k, v in observation.items() if "images" not in k},
        {k: v for k, v in observation.items() if "state" not in k},
        {**observation, "observation.state": torch.zeros(1, 40)},
        {**observation, "observation.state": torch.zeros(2, 6)},
        {**observation, "observation.language.tokens": observation["observation.language.tokens"][:, :5]},
        {**observation, "observation.images.camera1": observation["observation.images.camera1"][0]},
    ]
    for batch in broken:
        with pytest.raises(Exception) as stock:
            chunk(twin, batch, noise)
        with pytest.raises(type(stock.value)):
            chunk(policy, batch, noise)
        assert torch.equal(chunk(policy, observation, noise), chunk(twin, observation, noise))


@pytest.mark.check(2)
def test_nothing_is_said_twice(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    smolvla_fast.patch(policy)
    _hook(policy)
    with caplog.at_level(logging.INFO, logger="smolvla_fast"):
        for _ in range(5):
            chunk(policy, observation, noise)
    assert len(caplog.records) == 1 and smolvla_fast.status(policy).calls_stock == 5
