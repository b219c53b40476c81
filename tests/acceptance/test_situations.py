"""Checks 2 to 4, 18, 19 and 30: what sends users to stock. ``status`` and the one line in the log tell the truth of it."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.policies import make_policy, model_inputs
from support.processors import play
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.ops import availability
from smolvla_fast.testing.policies import make_noise, make_observation


class Call:
    """A policy and the arguments of one call to its ``sample_actions``, for a situation to change."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.inputs = list(model_inputs(policy, make_observation(policy)))
        self.noise = make_noise(policy)

    def run(self) -> Tensor | type[Exception]:
        """The chunk, or the kind of exception."""
        images, *rest = self.inputs
        try:
            return self.policy.model.sample_actions(list(images), *rest, noise=self.noise)
        except Exception as error:
            return type(error)


Situation = Callable[[Call], Any]
"""A context manager: enters a situation, and leaves it."""


@contextmanager
def train_mode(call: Call) -> Iterator[None]:
    call.policy.train()
    yield
    call.policy.eval()


@contextmanager
def hook(call: Call) -> Iterator[None]:
    fired: list[None] = []
    mlp = call.policy.model.vlm_with_expert.lm_expert.layers[1].mlp
    handle = mlp.register_forward_hook(lambda *_: fired.append(None))
    yield
    assert fired
    handle.remove()


@contextmanager
def global_hook(call: Call) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@contextmanager
def replaced_module(call: Call) -> Iterator[None]:
    attention = call.policy.model.vlm_with_expert.lm_expert.layers[0].self_attn
    old = attention.o_proj
    attention.o_proj = _Doubled(old.in_features, old.out_features, bias=False).eval()
    attention.o_proj.weight = old.weight
    yield
    attention.o_proj = old


@contextmanager
def unmerged_lora(call: Call) -> Iterator[None]:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r".*lm_expert.*\.(q|v)_proj", init_lora_weights=False)
    torch.manual_seed(0)  # the adapter of the twin has the same values
    wrapped = peft.get_peft_model(call.policy, config).eval()
    assert wrapped.get_base_model() is call.policy
    yield
    wrapped.unload()


@contextmanager
def disabled(call: Call) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMOLVLA_FAST_DISABLE", "1")
        yield


@contextmanager
def compiled_step(call: Call) -> Iterator[None]:
    """As ``torch.compile`` leaves it, without its minutes."""
    stock = call.policy.model.denoise_step
    call.policy.model.__dict__["denoise_step"] = lambda **kwargs: stock(**kwargs)
    yield
    del call.policy.model.__dict__["denoise_step"]


@contextmanager
def replaced_function(call: Call) -> Iterator[None]:
    """Put there from outside; what a release itself has changed is tried (tests/patching/test_trial.py)."""
    places = inspect.unwrap(type(call.policy.model.vlm_with_expert).forward_attn_layer).__globals__
    own = places["apply_rope"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(places, "apply_rope", lambda *args: own(*args))
        yield


@contextmanager
def double_weights(call: Call) -> Iterator[None]:
    call.policy.double()
    yield
    call.policy.float()


@contextmanager
def another_image_size(call: Call) -> Iterator[None]:
    kept = call.inputs[0]
    call.inputs[0] = [nn.functional.pad(image, (0, 32, 0, 32)) for image in kept]
    yield
    call.inputs[0] = kept


@contextmanager
def autograd(call: Call) -> Iterator[None]:
    call.noise.requires_grad_()
    with torch.enable_grad():
        yield
    call.noise.requires_grad_(False)


@contextmanager
def autocast(call: Call) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def autocast_to_fp16(call: Call) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.float16):
        yield


@contextmanager
def double_noise(call: Call) -> Iterator[None]:
    call.noise = call.noise.double()
    yield
    call.noise = call.noise.float()


@contextmanager
def debug_tracker(call: Call) -> Iterator[None]:
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    call.policy.config.rtc_config = RTCConfig(debug=True)
    call.policy.init_rtc_processor()
    yield
    call.policy.config.rtc_config = None
    call.policy.model.rtc_processor = None


# Situation -> part of the reason, and whether it is of the model (then status is inactive) or of the call.
MODEL, CALL = True, False
SITUATIONS: dict[Situation, tuple[str, bool]] = {
    hook: ("lm_expert.layers.1.mlp has a forward hook", MODEL),
    global_hook: ("a global forward hook", MODEL),
    replaced_module: ("lm_expert.layers.0.self_attn.o_proj is a", MODEL),
    unmerged_lora: ("lora", MODEL),
    disabled: ("SMOLVLA_FAST_DISABLE is set", MODEL),
    compiled_step: ("denoise_step is replaced on the instance", MODEL),
    replaced_function: ("apply_rope", MODEL),
    double_weights: ("torch.float64", MODEL),
    train_mode: ("train mode", CALL),
    another_image_size: ("the vision tower is for (1, 3, 32, 32)", CALL),
    autograd: ("autograd is on", CALL),
    autocast: ("autocast is on", CALL),
    autocast_to_fp16: ("autocast is on", CALL),
    double_noise: ("noise (1, 10, 32) torch.float64", CALL),
    debug_tracker: ("debug tracker", CALL),
}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


@pytest.mark.check(2, 3, 4, 18, 19, 30)
@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda each: each.__name__)
def test_a_situation_that_comes_and_goes(situation: Situation, caplog: pytest.LogCaptureFixture) -> None:
    """Fast, then stock with stock's bits and a receipt, then fast again."""
    reason, of_the_model = SITUATIONS[situation]
    stock = Call(make_policy("tiny", num_steps=2))
    fast = Call(copy.deepcopy(stock.policy))
    smolvla_fast.patch(fast.policy, precision="exact")
    with torch.no_grad():
        before = fast.run()
        assert isinstance(before, Tensor) and smolvla_fast.status(fast.policy).calls_fast == 1
        with caplog.at_level(logging.INFO, logger="smolvla_fast"):
            caplog.clear()  # another test may have left the logger at a level at which patching is heard
            with situation(stock):
                wanted = stock.run()
            with situation(fast):
                assert _same(fast.run(), wanted) and _same(fast.run(), wanted)
                now = smolvla_fast.status(fast.policy)
        assert (now.calls_fast, now.calls_stock) == (1, 2)
        assert now.active is not of_the_model and reason in str(now.last_fallback)
        reported = {now.precision, now.backend, *now.stages.values()}
        assert reported == {"stock"} if of_the_model else now.precision == "exact" and "stock" not in reported
        [line] = [record.getMessage() for record in caplog.records]
        assert line == f"smolvla_fast: this chunk runs stock: {now.last_fallback}", "one situation, one line"
        assert _same(fast.run(), before)
    after = smolvla_fast.status(fast.policy)
    assert after.active and after.precision == "exact" and (after.calls_fast, after.calls_stock) == (2, 2)
    assert len(caplog.records) == 1


@pytest.mark.check(2, 3, 18, 19)
@pytest.mark.parametrize(
    "situation", [s for s, (_, of_the_model) in SITUATIONS.items() if of_the_model], ids=lambda s: s.__name__
)
def test_patching_in_a_situation_says_it_at_once(
    situation: Situation, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the model is the reason, ``patch`` itself says so, in its one line, and no call says it again."""
    call, reason = Call(make_policy("tiny", num_steps=2)), SITUATIONS[situation][0]
    with torch.no_grad(), situation(call), caplog.at_level(logging.INFO, logger="smolvla_fast"):
        stock = call.run()
        smolvla_fast.patch(call.policy)
        now = smolvla_fast.status(call.policy)
        assert not now.active and reason in str(now.last_fallback)
        [line] = [record.getMessage() for record in caplog.records]
        assert str(now.last_fallback) in line and ("stock runs" in line or "off:" in line)
        assert _same(call.run(), stock) and len(caplog.records) == 1


@pytest.mark.check(3)
def test_int8_without_vnni_is_refused_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, "Zen 1")
    policy = make_policy("tiny")
    for patched in (False, True):
        if patched:
            smolvla_fast.patch(policy)
        before = smolvla_fast.status(policy).to_dict()
        reason = availability.why_not_int8(torch.device("cpu"))
        with pytest.raises(RuntimeError, match="precision='int8' cannot serve this policy") as refused:
            smolvla_fast.patch(policy, precision="int8")
        assert str(reason) in str(refused.value) and smolvla_fast.status(policy).to_dict() == before
