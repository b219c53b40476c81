"""Whatever lies outside the engine's range runs stock: same bits, one message, counted, and the reason is named."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, model_inputs
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.patching.eligibility import Eligibility
from smolvla_fast.patching.settings import stock_layers
from smolvla_fast.testing.policies import make_noise, make_observation


def _pair(policy: Any) -> Any:
    return policy.model.vlm_with_expert


def _vlm(policy: Any) -> Any:
    return _pair(policy).get_vlm_model()


def _expert(policy: Any) -> Any:
    return _pair(policy).lm_expert


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _doubled(owner: nn.Module, name: str) -> None:
    old = getattr(owner, name)
    new = _Doubled(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(owner, name, new)


def _larger(out: Any) -> Any:
    if isinstance(out, Tensor):
        return 1.5 * out
    if isinstance(out, tuple) and not hasattr(out, "_replace"):
        return 1.5 * out[0], *out[1:]
    if hasattr(out, "_replace"):
        return out._replace(last_hidden_state=1.5 * out.last_hidden_state)
    out.last_hidden_state = 1.5 * out.last_hidden_state
    return out


def _subclassed(*modules: nn.Module, method: str = "forward") -> None:
    """Modules of one class become of one below it, whose method gives one and a half times as much."""
    cls: Any = type(modules[0])
    stock = getattr(cls, method)
    changed = type("Changed", (cls,), {method: lambda *args, **kwargs: _larger(stock(*args, **kwargs))})
    for module in modules:
        module.__class__ = changed


def _on_the_instance(owner: Any, name: str, wrapped: bool = False) -> None:
    stock = getattr(owner, name)
    larger = lambda *args, **kwargs: 1.5 * stock(*args, **kwargs)  # noqa: E731
    setattr(owner, name, functools.wraps(stock)(larger) if wrapped else larger)


def _biased(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


def _put(linear: nn.Linear, change: Callable[[Tensor], Tensor]) -> None:
    linear.weight = nn.Parameter(change(linear.weight.detach()))


class _Scaled(nn.Module):
    """A linear layer as quantisers of other libraries put it in: without a ``weight``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)


class _Subclass(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        return 1.5 * out.as_subclass(Tensor) if func is nn.functional.linear else out


def _norms_of_no_number(policy: Any) -> None:
    _every_norm(policy)
    for norm in (norm for norm in _expert(policy).modules() if type(norm).__name__ == "Changed"):
        type(norm).forward = lambda self, x: x * torch.nan


def _vision_model_under_a_folder_called_torch(policy: Any) -> None:
    tower = _vlm(policy).vision_model
    code = "class Mine(base):\n    def forward(self, *args, **kwargs):\n        return super().forward(*args, **kwargs)\n"
    names: dict[str, Any] = {"base": type(tower)}
    exec(compile(code, "/home/me/torch/transformers/mine.py", "exec"), names)
    tower.__class__ = names["Mine"]


def _every_norm(policy: Any) -> None:
    layers = _expert(policy).layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    _subclassed(*norms, _expert(policy).norm)


def _every_activation(policy: Any) -> None:
    for layer in _expert(policy).layers:
        layer.mlp.act_fn = nn.ReLU()


def _torch_norms(policy: Any) -> None:
    for layer in _expert(policy).layers:
        layer.input_layernorm = nn.RMSNorm(layer.input_layernorm.weight.shape[0])


def _vision_scale(policy: Any) -> None:
    for layer in _vlm(policy).vision_model.encoder.layers:
        layer.self_attn.scale *= 3


def _output(policy: Any) -> Any:
    return _expert(policy).layers[0].self_attn.o_proj


# name -> (change to the policy, part of the reason)
MODELS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook in the expert": (lambda p: _hook(_expert(p).layers[1].mlp), "lm_expert.layers.1.mlp has a forward hook"),
    "hook in the vision tower": (
        lambda p: _vlm(p).vision_model.register_forward_pre_hook(lambda *_: None), "vision_model has a forward hook"),
    "replaced linear": (lambda p: _doubled(_expert(p).layers[0].self_attn, "o_proj"), "lm_expert.layers.0.self_attn.o_proj"),
    "replaced head": (lambda p: _doubled(p.model, "action_out_proj"), "action_out_proj"),
    "norm that computes something else": (_every_norm, "decoder norm"),
    "norm that gives no number": (_norms_of_no_number, "decoder norm"),
    "vision model under a folder called torch": (_vision_model_under_a_folder_called_torch, "vision_model"),
    "one MLP of another kind": (lambda p: _subclassed(_expert(p).layers[2].mlp), "expert layer 2"),
    "forward replaced on an instance": (
        lambda p: _on_the_instance(_vlm(p).connector, "forward"), "connector has its forward replaced"),
    "method replaced on an instance": (lambda p: _on_the_instance(_pair(p), "embed_image"), "embed_image"),
    "method replaced with functools.wraps": (
        lambda p: _on_the_instance(_pair(p), "embed_image", wrapped=True), "embed_image is replaced"),
    "step replaced with functools.wraps": (
        lambda p: _on_the_instance(p.model, "denoise_step", wrapped=True), "denoise_step is replaced"),
    "final norm": (lambda p: _subclassed(_expert(p).norm), "final norm"),
    "vision model": (lambda p: _subclassed(_vlm(p).vision_model), "vision_model"),
    "vision encoder": (lambda p: _subclassed(_vlm(p).vision_model.encoder), "vision_model.encoder"),
    "one vision MLP": (lambda p: _subclassed(_vlm(p).vision_model.encoder.layers[1].mlp), "vision layer 1"),
    "one activation": (lambda p: setattr(_expert(p).layers[1].mlp, "act_fn", nn.ReLU()), "expert layer 1"),
    "every activation": (_every_activation, "decoder MLP"),
    "vision scale": (_vision_scale, "vision layer"),
    "connector with a bias": (lambda p: _biased(_vlm(p).connector.modality_projection.proj), "proj has a bias"),
    "decoder linear with a bias": (lambda p: _biased(_output(p)), "has a bias"),
    "wrapped connector": (lambda p: setattr(_vlm(p), "connector", _Scaled(_vlm(p).connector)), "AttributeError"),
    "torch's RMSNorm": (_torch_norms, ""),
    "tensor subclass": (lambda p: _put(_output(p), lambda w: w.as_subclass(_Subclass)), "_Subclass"),
    "head without a bias": (lambda p: setattr(p.model.action_in_proj, "bias", None), "action_in_proj"),
    "strided weight": (lambda p: _put(_output(p), lambda w: w.t().contiguous().t()), "not contiguous"),
    "subclass of the VLM with expert": (
        lambda p: _subclassed(_pair(p), method="eager_attention_forward"), "eager_attention_forward"),
}  # fmt: skip
# Replacing the class of a patched model undoes the patch: what is left then is not ours to answer for.
BEFORE = MODELS | {
    "subclass of the model": (lambda p: _subclassed(p.model, method="embed_prefix"), "embed_prefix"),
    "subclass with its own sampling": (
        lambda p: _subclassed(p.model, method="sample_actions"),
        "sample_actions",
    ),
}


def _check(policy: Any, stock: Tensor, fast: Tensor, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert torch.equal(fast.nan_to_num(), stock.nan_to_num())
    now = smolvla_fast.status(policy)
    assert now.calls_fast == 0 and now.calls_stock >= 1
    assert reason in now.last_fallback
    assert len(caplog.records) == 1, "one reason, one message"


@pytest.mark.check(18, 19)
@pytest.mark.parametrize("name", BEFORE)
def test_model_changed_before_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = BEFORE[name]
    policy = make_policy("tiny")
    observation, noise = make_observation(policy), make_noise(policy)
    change(policy)
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    _check(policy, stock, chunk(policy, observation, noise), reason, caplog)
    assert not smolvla_fast.status(policy).active


@pytest.mark.check(18, 19)
@pytest.mark.parametrize("name", MODELS)
def test_model_changed_after_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, reason = MODELS[name]
    policy = make_policy("tiny")
    observation, noise = make_observation(policy), make_noise(policy)
    smolvla_fast.patch(policy)
    change(policy)
    chunk(policy, observation, noise)
    with torch.no_grad(), stock_layers():
        model = policy.model
        stock = type(model).stock_class.sample_actions(model, *model_inputs(policy, observation), noise=noise)
    _check(policy, stock[:, :, :6], chunk(policy, observation, noise), reason, caplog)
    assert not smolvla_fast.status(policy).active


def test_a_wrapped_first_layer_runs_stock(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    attention = policy.model.vlm_with_expert.get_vlm_model().text_model.layers[0].self_attn
    attention.k_proj = _Scaled(attention.k_proj)
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
    with pytest.raises(ValueError, match="preprocessor returns"):
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
    _every_norm(policy)
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
    image, masks = (
        observation["observation.images.camera1"],
        observation["observation.language.attention_mask"],
    )
    changes: list[dict[str, Any]] = [
        {key: None for key in observation if "images" in key}, {"observation.state": None},
        {"observation.language.tokens": None}, {"observation.language.attention_mask": None},
        {"observation.state": torch.zeros(1, 40)}, {"observation.state": torch.zeros(2, 6)},
        {"observation.state": torch.zeros(1, 0)}, {"observation.state": torch.zeros(1, 1, 6)},
        {"observation.language.tokens": observation["observation.language.tokens"][:, :5]},
        {"observation.language.attention_mask": masks.float()}, {"observation.images.camera1": image[0]},
        {"observation.images.camera1": image[:, None]}, {"observation.images.camera1": image[..., :0]},
        {"observation.images.camera1": (255 * image).to(torch.uint8)}, {"observation.images.camera1": "camera1"},
        {"observation.images.camera1_padding_mask": torch.ones(1, 2).bool()},
        {"observation.images.camera1_padding_mask": torch.ones(1).long()},
        {key: value[:0] for key, value in observation.items()},
    ]  # fmt: skip
    raised = 0
    for change in changes:
        batch = {key: value for key, value in {**observation, **change}.items() if value is not None}
        found: list[Any] = []
        for each in (twin, policy):
            try:
                found.append(each.predict_action_chunk(dict(batch), noise=noise))
            except Exception as error:
                found.append(type(error))
        raised += isinstance(found[0], type)
        assert torch.equal(*found) if isinstance(found[0], Tensor) else found[1] is found[0], (change, found)
        assert torch.equal(chunk(policy, observation, noise), chunk(twin, observation, noise))
    assert raised > 8
