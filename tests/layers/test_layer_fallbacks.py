"""Where stock's own layers run below ``sample_actions``: equal bits and a receipt, whatever was changed."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.layer_calls import Given, contents, forward, given, one_layer
from support.policies import BOTH, LEROBOT_ONLY, chunk, make_policy, model_inputs, rel_l2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import smolvla_fast
from smolvla_fast.layers import caches
from smolvla_fast.testing.policies import make_noise, make_observation


@pytest.fixture
def inputs(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> Given:
    return given(policy, observation, noise)


def sample(policy: Any, inputs: Given, steps: int = 2) -> list[Tensor]:
    """Prefix, steps, and a whole pass behind the same cache."""
    pair = policy.model.vlm_with_expert
    with torch.no_grad():
        outputs, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)
        found = [outputs[0]]
        for step in range(steps):
            time = torch.full_like(inputs.time, 1 - step / steps)
            found.append(policy.model.denoise_step(inputs.pads, cache, inputs.x, time))
        found.append(forward(pair, inputs.suffix_call, [None, inputs.suffix], cache)[0][1])
    return found


def test_in_train_mode_the_ways_to_the_fast_path_are_said(policy: Any, inputs: Given) -> None:
    """``lerobot-train`` calls no ``patch`` of the user's: there a variable asks for it."""
    smolvla_fast.patch(policy).train()
    sample(policy, inputs, steps=1)
    said = str(smolvla_fast.status(policy).layers_fallback)
    assert "patch(policy, training=True), which SMOLVLA_FAST_TRAINING=1 asks for" in said


def _lora(policy: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # the same adapter on both
    config = peft.LoraConfig(r=2, target_modules=r".*lm_expert.*\.(q|v)_proj", init_lora_weights=False)
    peft.inject_adapter_in_model(config, policy.model)


class _Louder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.inner(x)


def _layer(policy: Any) -> Any:
    return policy.model.vlm_with_expert.lm_expert.layers[1]


def _own_attention(policy: Any) -> None:
    pair = policy.model.vlm_with_expert
    stock = pair.eager_attention_forward
    pair.eager_attention_forward = lambda *args, **kwargs: 1.5 * stock(*args, **kwargs)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook": (lambda p: _layer(p).mlp.register_forward_hook(lambda m, i, out: 1.5 * out), "forward hook"),
    "LoRA": (_lora, "not the plain module"),
    "a replaced module": (lambda p: setattr(_layer(p), "mlp", _Louder(_layer(p).mlp)), "AttributeError"),
    "an unknown source": (_own_attention, "eager_attention_forward"),
    "a bias": (lambda p: setattr(_layer(p).self_attn.q_proj, "bias", nn.Parameter(torch.ones(48))), "bias"),
}


@pytest.mark.parametrize("name", CHANGES)
@LEROBOT_ONLY
def test_a_changed_layer_runs_stock(policy: Any, inputs: Given, name: str) -> None:
    change, reason = CHANGES[name]
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    fast = sample(twin, inputs)
    change(policy)
    change(twin)
    want, found = sample(policy, inputs), sample(twin, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    assert not torch.equal(found[-1], fast[-1]), "the change shows"
    now = smolvla_fast.status(twin)
    assert now.layers_stock == {"denoise_step": 2, "forward": 2}
    assert now.layers_fast == {"denoise_step": 2, "forward": 2}
    assert reason in str(now.layers_fallback)


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a function mode": lambda: _Functions(),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "float64": lambda: _double(),
    "switched off": lambda: _disabled(),
}


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _double(nullcontext[None]):
    def __enter__(self) -> None:
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)


class _disabled(nullcontext[None]):
    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        self._patch.setenv("SMOLVLA_FAST_DISABLE", "1")

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()


@pytest.mark.parametrize("name", AROUND)
@LEROBOT_ONLY
def test_what_is_set_around_a_call_runs_stock(policy: Any, inputs: Given, name: str) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    pair, stock = twin.model.vlm_with_expert, policy.model.vlm_with_expert
    with torch.no_grad(), AROUND[name]():
        found = forward(pair, inputs.joint_call, [inputs.prefix, inputs.suffix])[0]
        want = forward(stock, inputs.joint_call, [inputs.prefix, inputs.suffix])[0]
    assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
    assert smolvla_fast.status(twin).layers_stock == {"forward": 1}


@LEROBOT_ONLY
def test_odd_arguments_are_answered_or_refused_as_by_stock(policy: Any, inputs: Given) -> None:
    """What is not accepted goes to stock: the same answer, or the same error."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    positions, mask = inputs.joint_call
    both = [inputs.prefix, inputs.suffix]
    calls: dict[str, Callable[[Any], Any]] = {
        "a float mask": lambda p: forward(p, (positions, mask.float()), both),
        "a mask of one sample more": lambda p: forward(p, (positions, mask.repeat(2, 1, 1)), both),
        "float positions": lambda p: forward(p, (positions.float(), mask), both),
        "fp64": lambda p: forward(p, (positions, mask), [each.double() for each in both]),
        "one stream": lambda p: forward(p, (positions, mask), [inputs.prefix]),
        "a suffix without a cache": lambda p: forward(p, inputs.suffix_call, [None, inputs.suffix]),
        "no stream": lambda p: forward(p, (positions, mask), [None, None]),
        "an image of another size": lambda p: p.embed_image(torch.zeros(1, 3, 16, 16)),
        "an image without a batch": lambda p: p.embed_image(torch.zeros(3, 32, 32)),
        "an unknown argument": lambda p: p.embed_image(picture=torch.zeros(1, 3, 32, 32)),
    }

    def answer(call: Callable[[Any], Any], of: Any) -> tuple[str, Any]:
        try:
            with torch.no_grad():
                found = call(of.model.vlm_with_expert)
        except Exception as error:
            return type(error).__name__, str(error)
        return "", found[0][1] if isinstance(found, tuple) else found

    for name, call in calls.items():
        (error, found), (wanted, want) = answer(call, twin), answer(call, policy)
        assert error == wanted, name
        assert torch.equal(found, want) if not error else found == want, name
    assert not smolvla_fast.status(twin).layers_fast


@LEROBOT_ONLY
def test_layers_of_another_model_run_stock(policy: Any, inputs: Given) -> None:
    """``model_layers`` is an argument: what is passed is what runs."""
    other = make_policy("tiny", seed=1)
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    pair = twin.model.vlm_with_expert
    theirs = [other.model.vlm_with_expert.get_vlm_model().text_model, other.model.vlm_with_expert.lm_expert]
    pair.get_model_layers, own = (lambda models: own(theirs)), pair.get_model_layers
    with torch.no_grad():
        found = one_layer(pair, "forward_attn_layer", 0, inputs.joint_call, [inputs.prefix, inputs.suffix])
    del pair.get_model_layers
    with torch.no_grad():
        mine = one_layer(pair, "forward_attn_layer", 0, inputs.joint_call, [inputs.prefix, inputs.suffix])
        want = one_layer(
            other.model.vlm_with_expert,
            "forward_attn_layer",
            0,
            inputs.joint_call,
            [inputs.prefix, inputs.suffix],
        )
    assert torch.equal(found[0], want[0]) and not torch.allclose(mine[0], found[0])


@LEROBOT_ONLY
def test_a_chunk_that_falls_back_has_stocks_bits(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    """Its layers too: nothing of ours is called where the receipt says stock."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chunk(twin, observation, noise), chunk(policy, observation, noise))
    # Gradients of the noise: refused for a chunk, and no reason of the layers.
    asked = noise.clone().requires_grad_()
    found = twin.model.sample_actions(*model_inputs(twin, observation), noise=asked)
    want = policy.model.sample_actions(*model_inputs(policy, observation), noise=asked)
    assert torch.equal(found, want)
    now = smolvla_fast.status(twin)
    assert now.calls_stock == 2 and not now.layers_fast and not now.layers_stock


class _Sampler:
    """A subclass whose chunks are not LeRobot's: the engine does not serve it."""

    def sample_actions(
        self: Any, images: Any, img_masks: Any, *rest: Any, noise: Tensor, **kwargs: Any
    ) -> Tensor:
        raise NotImplementedError


@LEROBOT_ONLY
def test_a_sampler_beside_a_model_that_stock_serves_has_fused_layers(policy: Any, inputs: Given) -> None:
    twin = copy.deepcopy(policy)
    twin.model.__class__ = type("Own", (_Sampler, type(twin.model)), {})
    smolvla_fast.patch(twin)
    assert not smolvla_fast.status(twin).active
    for found, want in zip(sample(twin, inputs), sample(policy, inputs), strict=True):
        # Another order of fp32 sums; see test_layer_parity.
        assert rel_l2(found, want) < 1e-5
    assert smolvla_fast.status(twin).layers_fast == {"denoise_step": 2, "forward": 2}


class _Scaled:
    """A step with one argument more than stock's."""

    def denoise_step(self: Any, *given: Any, scale: float = 1.0, **more: Any) -> Tensor:
        return scale * super().denoise_step(*given, **more)  # type: ignore[misc]


@LEROBOT_ONLY
def test_a_method_of_the_users_own_keeps_its_signature(policy: Any, inputs: Given) -> None:
    twin = copy.deepcopy(policy)
    for each in (policy, twin):
        each.model.__class__ = type("Own", (_Scaled, type(each.model)), {})
    smolvla_fast.patch(twin)
    found, want = [], []
    for each, results in ((twin, found), (policy, want)):
        with torch.no_grad():
            _, cache = forward(
                each.model.vlm_with_expert, inputs.prefix_call, [inputs.prefix, None], fill=True
            )
            step = each.model.denoise_step
            results.append(step(inputs.pads, cache, inputs.x, inputs.time, scale=2.0))
            results.append(step(inputs.pads, cache, x_t=inputs.x, timestep=inputs.time))
    for ours, theirs in zip(found, want, strict=True):
        # Another order of fp32 sums; see test_layer_parity.
        assert rel_l2(ours, theirs) < 1e-5
    assert smolvla_fast.status(twin).layers_fast == {"forward": 3}, "its layers are served"


@LEROBOT_ONLY
@pytest.mark.parametrize("keywords", [False, True])
def test_arguments_by_place_and_by_name(policy: Any, inputs: Given, keywords: bool) -> None:
    smolvla_fast.patch(policy)
    with torch.no_grad():
        _, cache = forward(policy.model.vlm_with_expert, inputs.prefix_call, [inputs.prefix, None], fill=True)
        given = dict(prefix_pad_masks=inputs.pads, past_key_values=cache, x_t=inputs.x, timestep=inputs.time)
        step = policy.model.denoise_step
        assert (step(**given) if keywords else step(*given.values())).shape == inputs.x.shape
    assert smolvla_fast.status(policy).layers_fast["denoise_step"] == 1


@LEROBOT_ONLY
def test_a_pair_that_is_not_lerobots_is_left_alone() -> None:
    policy = make_policy("tiny", num_steps=1, num_vlm_layers=1)  # torch.compile takes seconds for more
    observation, noise = make_observation(policy), make_noise(policy)
    stock = chunk(policy, observation, noise)
    policy.model.vlm_with_expert = torch.compile(policy.model.vlm_with_expert, backend="eager")
    smolvla_fast.patch(policy)
    now = smolvla_fast.status(policy)
    assert not now.active and "OptimizedModule" in str(now.layers_fallback)
    assert torch.equal(chunk(policy, observation, noise), stock)
    smolvla_fast.unpatch(policy)


def test_policies_that_share_a_pair(policy: Any, inputs: Given) -> None:
    """Settings that differ: stock's layers, for there is one pair. Alike again, or alone: served."""
    first, second = copy.deepcopy(policy), copy.deepcopy(policy)
    second.model.vlm_with_expert = first.model.vlm_with_expert
    smolvla_fast.patch(first, precision="exact")
    smolvla_fast.patch(second, precision="fp32")
    want = sample(policy, inputs)
    assert all(torch.equal(*pair) for pair in zip(sample(first, inputs), want, strict=True))
    now = smolvla_fast.status(first)
    assert not now.layers_fast and "share" in str(now.layers_fallback)
    smolvla_fast.unpatch(second)
    assert all(torch.equal(*pair) for pair in zip(sample(first, inputs), want, strict=True))
    assert smolvla_fast.status(first).layers_fast == {"denoise_step": 2, "forward": 2}
    pair = first.model.vlm_with_expert
    smolvla_fast.unpatch(first)
    assert (
        type(pair) is type(policy.model.vlm_with_expert)
        and vars(pair).keys() == vars(policy.model.vlm_with_expert).keys()
    )


def test_a_replaced_pair_is_stocks_and_undone(policy: Any, inputs: Given) -> None:
    other, stock = copy.deepcopy(policy).model.vlm_with_expert, type(policy.model.vlm_with_expert)
    smolvla_fast.patch(policy)
    old, policy.model.vlm_with_expert = policy.model.vlm_with_expert, other
    sample(policy, inputs, steps=1)
    now = smolvla_fast.status(policy)
    assert now.layers_stock == {"denoise_step": 1} and "patch the policy again" in str(now.layers_fallback)
    smolvla_fast.unpatch(policy)
    assert type(old) is stock and "_smolvla_fast" not in vars(old)


def test_train_mode_is_stocks(policy: Any, inputs: Given) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    policy.train(), twin.train()
    assert all(torch.equal(*pair) for pair in zip(sample(twin, inputs), sample(policy, inputs), strict=True))
    assert not smolvla_fast.status(twin).layers_fast


@pytest.mark.parametrize("what", ["cache", "time"])
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_that_comes_by_the_cache_or_the_time(
    policy: Any, inputs: Given, what: str, training: bool
) -> None:
    """Nothing of the policy learns: a learned prompt, or a time that is searched for."""
    policy.requires_grad_(False)
    twin, stock = smolvla_fast.patch(copy.deepcopy(policy), training=training), policy.model.vlm_with_expert

    def learn(policy: Any) -> list[Tensor | None]:
        prefix, time = inputs.prefix.clone(), inputs.time.clone()
        (prefix if what == "cache" else time).requires_grad_()
        pair = policy.model.vlm_with_expert
        # A gradient by the time magnifies what a cache of ours differs by.
        filled = pair if what == "cache" else stock
        _, cache = forward(filled, inputs.prefix_call, [prefix, None], fill=True)
        v = policy.model.denoise_step(inputs.pads, cache, inputs.x, time)
        whole = forward(pair, inputs.suffix_call, [None, inputs.suffix], cache)[0][1]
        (v.sin().sum() + (whole.sin().sum() if what == "cache" else 0)).backward()
        return [prefix.grad, time.grad]

    for found, want in zip(learn(twin), learn(policy), strict=True):
        assert (found is None) == (want is None)
        # A backward sums what a forward has rounded: twice the way through the layers.
        assert found is None or want is None or rel_l2(found, want) < 2e-5


# Live weights and caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_sees_weights_and_cache_as_they_are(policy: Any, inputs: Given, precision: str) -> None:
    """Cross KV and converted weights are kept for a cache; each change makes them anew."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin, precision=precision)
    pair = twin.model.vlm_with_expert
    with torch.no_grad():
        _, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)

        def step() -> Tensor:
            return twin.model.denoise_step(inputs.pads, cache, inputs.x, inputs.time)

        def fresh() -> Tensor:
            """The same on a policy that has seen nothing."""
            other = smolvla_fast.patch(smolvla_fast.unpatch(copy.deepcopy(twin)), precision=precision)
            return other.model.denoise_step(inputs.pads, copy.deepcopy(cache), inputs.x, inputs.time)

        before = step()
        assert torch.equal(step(), before)
        expert = pair.lm_expert.layers
        changes: list[Callable[[], Any]] = [
            lambda: expert[1].self_attn.k_proj.weight.mul_(1.1),
            lambda: expert[1].mlp.up_proj.weight.mul_(1.1),
            lambda: expert[0].self_attn.k_proj.weight.mul_(1.1),
            lambda: setattr(
                expert[1].self_attn, "v_proj", copy.deepcopy(expert[1].self_attn.v_proj).requires_grad_(False)
            ),
            lambda: expert[1].self_attn.v_proj.weight.mul_(1.1),
            lambda: caches.held(cache, 1)[0].mul_(1.1),
            lambda: caches.held(cache, 0)[1].mul_(1.1),
        ]
        for place, change in enumerate(changes):
            change()
            found = step()
            assert torch.equal(found, fresh()), place
            assert place == 3 or not torch.equal(found, before), place  # a copy of a module changes nothing
            before = found


@LEROBOT_ONLY
def test_a_norms_eps_is_read_at_every_step(policy: Any, inputs: Given) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    with torch.no_grad():
        caches_of = [
            forward(p.model.vlm_with_expert, inputs.prefix_call, [inputs.prefix, None], fill=True)[1]
            for p in (twin, policy)
        ]
        for eps in (1e-5, 0.5):
            found, want = [], []
            for each, cache, results in ((twin, caches_of[0], found), (policy, caches_of[1], want)):
                _layer(each).input_layernorm.variance_epsilon = eps
                results.append(each.model.denoise_step(inputs.pads, cache, inputs.x, inputs.time))
            assert rel_l2(found[0], want[0]) < 1e-5


@pytest.mark.parametrize("precision", ["exact", "fp32", "bf16"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_inference_mode_and_no_grad_take_turns_on_a_cache(
    policy: Any, inputs: Given, precision: str, backend: str
) -> None:
    smolvla_fast.patch(policy, precision=precision, backend=backend)
    pair = policy.model.vlm_with_expert
    with torch.no_grad():
        _, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)
    found = []
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode(), torch.no_grad()):
        with mode:
            found.append(policy.model.denoise_step(inputs.pads, cache, inputs.x, inputs.time).clone())
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_threads_share_a_cache(policy: Any, inputs: Given) -> None:
    """Of a release whose steps do not write to it, and by ``denoise_step`` in any."""
    smolvla_fast.patch(policy)
    with torch.no_grad():
        _, cache = forward(policy.model.vlm_with_expert, inputs.prefix_call, [inputs.prefix, None], fill=True)
        times = [torch.full_like(inputs.time, time) for time in (0.2, 0.5, 0.7, 1.0)]
        want = [policy.model.denoise_step(inputs.pads, cache, inputs.x, time) for time in times]
    wrong: list[int] = []

    def steps(place: int) -> None:
        with torch.no_grad():
            for _ in range(25):
                found = policy.model.denoise_step(inputs.pads, cache, inputs.x, times[place])
                if not torch.equal(found, want[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=steps, args=(place,)) for place in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_cross_kv_is_projected_once_for_a_cache(
    policy: Any, inputs: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    smolvla_fast.patch(policy)
    pair = policy.model.vlm_with_expert
    with torch.no_grad():
        _, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)
        policy.model.denoise_step(inputs.pads, cache, inputs.x, inputs.time)
        from smolvla_fast.patching.layer_runtime import LAYER_RUNTIMES

        engine = LAYER_RUNTIMES.of(pair).engine
        assert engine is not None
        calls: list[int] = []
        project = engine.products.ops.cross_kv
        counted = lambda *given: (calls.append(1), project(*given))[1]  # noqa: E731
        object.__setattr__(engine.products.ops, "cross_kv", counted)
        try:
            policy.model.denoise_step(inputs.pads, cache, inputs.x, inputs.time)
            forward(pair, inputs.suffix_call, [None, inputs.suffix], cache)
            assert not calls
            other = copy.deepcopy(cache)
            if hasattr(other, "crop"):
                other.crop(inputs.prefix.shape[1])
            policy.model.denoise_step(inputs.pads, other, inputs.x, inputs.time)
            assert len(calls) == 2, "one a cross-attention layer"
        finally:
            object.__setattr__(engine.products.ops, "cross_kv", project)
    held = smolvla_fast.status(policy).extra_bytes
    kept = weakref.ref(cache) if not isinstance(cache, dict) else None
    del cache, other
    gc.collect()
    assert kept is None or kept() is None
    assert smolvla_fast.status(policy).extra_bytes < held, "what was kept for a cache goes with it"


def test_position_ids_of_the_patches_are_counted(policy: Any) -> None:
    smolvla_fast.patch(policy)
    before = smolvla_fast.status(policy).extra_bytes
    with torch.no_grad():
        policy.model.vlm_with_expert.embed_image(torch.zeros(1, 3, 32, 32))
    # Patches of 4 x 4 pixels, an int64 each.
    assert smolvla_fast.status(policy).extra_bytes - before == 8 * 8 * 8


# Identity -------------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_layers_of_its_own(policy: Any, inputs: Given, how: str) -> None:
    smolvla_fast.patch(policy)
    before = sample(policy, inputs)
    other = copy.deepcopy(policy) if how == "deepcopy" else pickle.loads(pickle.dumps(policy))
    assert type(other.model.vlm_with_expert) is type(policy.model.vlm_with_expert)
    with torch.no_grad():
        _layer(policy).mlp.up_proj.weight.mul_(2)
    for found, want in zip(sample(other, inputs), before, strict=True):
        assert torch.equal(found, want)
    assert smolvla_fast.status(other).layers_fast == {"denoise_step": 2, "forward": 2}
    smolvla_fast.unpatch(policy)
    assert sample(other, inputs) and smolvla_fast.status(other).layers_fast == {
        "denoise_step": 4,
        "forward": 4,
    }


def test_a_cache_of_stock_serves_and_the_other_way_round(policy: Any, inputs: Given) -> None:
    """A cache holds what stock puts there, in its layout: filled by one, read by the other."""
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(twin)
    call, first = inputs.prefix_call, [inputs.prefix, None]
    with torch.no_grad():
        ours = forward(twin.model.vlm_with_expert, call, first, fill=True)[1]
        theirs = forward(policy.model.vlm_with_expert, call, first, fill=True)[1]
        assert type(ours) is type(theirs)
        for found, want in zip(contents(ours, 4), contents(theirs, 4), strict=True):
            assert (
                found.dtype is want.dtype and found.stride() == want.stride() and rel_l2(found, want) < 1e-5
            )
        step = [inputs.pads, None, inputs.x, inputs.time]
        want = policy.model.denoise_step(inputs.pads, theirs, *step[2:])
        assert rel_l2(twin.model.denoise_step(inputs.pads, theirs, *step[2:]), want) < 1e-5
        assert rel_l2(policy.model.denoise_step(inputs.pads, ours, *step[2:]), want) < 1e-5


def test_status_before_a_call_and_after_unpatch(policy: Any, inputs: Given) -> None:
    def layers() -> tuple[Any, ...]:
        now = smolvla_fast.status(policy)
        return now.layers_fast, now.layers_stock, now.layers_fallback

    assert layers() == ({}, {}, None)
    smolvla_fast.patch(policy)
    sample(policy, inputs)
    assert layers() == ({"denoise_step": 2, "forward": 2}, {}, None)
    smolvla_fast.unpatch(policy)
    sample(policy, inputs)
    assert layers() == ({}, {}, None)
