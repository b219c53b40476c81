"""When a model is looked at again, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.policies import chunk, model_inputs
from support.train_steps import make_batch, step
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast.patching import runtime, served, training_runtime


class Switch:
    """The norms of text and expert, of a class whose ``forward`` does what it is told; no look sees a change of it."""

    def __init__(self, policy: Any) -> None:
        self.work: Callable[[Tensor], Tensor] = lambda x: x
        pair = policy.model.vlm_with_expert
        for stack in (pair.get_vlm_model().text_model, pair.lm_expert):
            norms = [each for each in stack.modules() if type(each) is type(stack.norm)]
            cls: Any = type(stack.norm)
            forward = lambda norm, x, cls=cls: self.work(cls.forward(norm, x))  # noqa: E731
            switched = type("Switched", (cls,), {"forward": forward})
            for norm in norms:
                norm.__class__ = switched


def _raise(error: Exception) -> Any:
    raise error


SHORT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    MemoryError("no page left"),
]


def test_a_refresh_asks_the_probe_again(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    switch = Switch(policy)
    switch.work = lambda x: 2 * x
    smolvla_fast.patch(policy)
    assert "decoder norm" in str(smolvla_fast.status(policy).last_fallback)
    switch.work = lambda x: x
    chunk(policy, observation, noise)
    assert smolvla_fast.status(policy).calls_stock == 1, "asked again without a refresh"
    smolvla_fast.refresh(policy)
    chunk(policy, observation, noise)
    now = smolvla_fast.status(policy)
    assert now.active and (now.calls_fast, now.calls_stock) == (1, 1)


@pytest.mark.parametrize("error", SHORT, ids=["device", "allocator", "Python"])
def test_a_probe_short_of_memory_is_asked_at_the_next_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, error: Exception
) -> None:
    switch = Switch(policy)
    smolvla_fast.patch(policy)
    wanted = chunk(policy, observation, noise)
    smolvla_fast.refresh(policy)
    switch.work = lambda x: _raise(error)
    now = smolvla_fast.status(policy)
    assert not now.active and str(error) in str(now.last_fallback)
    switch.work = lambda x: x
    assert torch.equal(chunk(policy, observation, noise), wanted)
    assert smolvla_fast.status(policy).active and smolvla_fast.status(policy).calls_stock == 0


@pytest.mark.parametrize("error", SHORT, ids=["device", "allocator", "Python"])
@pytest.mark.parametrize("training", [False, True], ids=["chunk", "loss"])
def test_an_engine_that_found_no_memory_is_built_at_the_next_call(
    policy: Any,
    observation: dict[str, Tensor],
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
    error: Exception,
) -> None:
    module, name = (training_runtime, "LossEngine") if training else (runtime, "Engine")
    batch = make_batch(policy)

    def call() -> Any:
        step(policy.train(), batch) if training else chunk(policy.eval(), observation, noise)
        now = smolvla_fast.status(policy)
        return (
            (now.training_fast, now.training_stock, now.training_fallback)
            if training
            else (now.calls_fast, now.calls_stock, now.last_fallback)
        )

    with monkeypatch.context() as short:
        short.setattr(module, name, lambda *_, **__: _raise(error))
        smolvla_fast.patch(policy, training=training)
        assert call() == (0, 1, str(error))
    assert call()[:2] == (1, 1)


@pytest.mark.training
def test_a_loss_whose_probe_is_short_of_memory_is_stocks_and_the_next_one_is_not(policy: Any) -> None:
    switch = Switch(policy)
    switch.work = lambda x: _raise(SHORT[0])
    smolvla_fast.patch(policy, training=True)
    now = smolvla_fast.status(policy)
    assert str(SHORT[0]) in str(now.training_fallback) and now.training_fallback_reasons == {}
    switch.work = lambda x: x
    step(policy.train(), make_batch(policy))
    now = smolvla_fast.status(policy)
    assert now.training_fast == 1 and now.training_fallback_reasons == {}


@pytest.mark.parametrize("training", [False, True], ids=["chunk", "loss"])
def test_a_model_that_stock_runs_costs_no_detector(
    policy: Any,
    observation: dict[str, Tensor],
    noise: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
) -> None:
    hook = policy.model.vlm_with_expert.lm_expert.norm.register_forward_hook(lambda *_: None)
    smolvla_fast.patch(policy, training=training)
    made: list[Any] = []
    make = served.detector_of
    monkeypatch.setattr(served, "detector_of", lambda model: made.append(model) or make(model))

    def calls() -> tuple[int, int]:
        step(policy.train(), make_batch(policy)) if training else chunk(policy.eval(), observation, noise)
        now = smolvla_fast.status(policy)
        return (now.training_fast, now.training_stock) if training else (now.calls_fast, now.calls_stock)

    assert calls() == (0, 1) and calls() == (0, 2) and not made
    hook.remove()
    assert calls() == (1, 2) and made


def test_no_parameter_is_listed_for_gradients_where_they_are_off(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model has many: listing them takes longer than all other questions of a chunk."""
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    listed: list[Any] = []
    parameters = nn.Module.parameters
    monkeypatch.setattr(nn.Module, "parameters", lambda self, *a: listed.append(self) or parameters(self, *a))
    inputs = model_inputs(policy, observation)
    with torch.no_grad():
        policy.model.sample_actions(*inputs, noise=noise)
    assert not any(each is policy.model for each in listed)
    policy.model.sample_actions(*inputs, noise=noise)
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.calls_stock) == (2, 1) and "autograd is on" in str(now.last_fallback)
