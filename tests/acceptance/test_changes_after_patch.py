"""Checks 35 to 44: what users change under a patched policy, and what their robots send."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.captured import Captured
from support.policies import LEROBOT_ONLY, TIERS, chunk, make_policy, model_inputs, rel_l2
from torch import Tensor, nn

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND


@pytest.mark.check(35)
def test_a_changed_config_takes_effect(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    for owner in (policy, policy.model):
        for steps in (4, 1, 10):
            owner.config.num_steps = twin.config.num_steps = steps
            assert torch.equal(chunk(policy, observation, noise), chunk(twin, observation, noise))


@pytest.mark.check(36)
@LEROBOT_ONLY
def test_real_time_chunking_is_switched_at_run_time(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    plain = chunk(policy, observation, noise)
    left = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    kwargs: dict[str, Any] = dict(inference_delay=2, prev_chunk_left_over=left)
    for weight in (1.0, 10.0):
        for each in (policy, twin):
            each.config.rtc_config = RTCConfig(execution_horizon=6, max_guidance_weight=weight)
            each.init_rtc_processor()
        for enabled in (True, False, True):
            policy.config.rtc_config.enabled = twin.config.rtc_config.enabled = enabled
            fast = chunk(policy, observation, noise, **kwargs)
            assert torch.equal(fast, chunk(twin, observation, noise, **kwargs))
            assert torch.equal(fast, plain) is not enabled
    assert smolvla_fast.status(policy).calls_stock == 0


def _load(policy: Any) -> None:
    policy.load_state_dict({name: value * 1.1 for name, value in policy.state_dict().items()})


def _step(policy: Any) -> None:
    for parameter in policy.parameters():
        parameter.requires_grad_().grad = torch.ones_like(parameter)
    torch.optim.AdamW(policy.parameters(), lr=1e-2).step()
    policy.zero_grad()


def _copy(policy: Any) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(1.1 * parameter)


def _swap(policy: Any) -> None:
    """As an EMA swap: no version counter moves."""
    versions = [parameter._version for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.data.copy_(1.1 * parameter.data)
    assert [parameter._version for parameter in policy.parameters()] == versions


def _replace(policy: Any) -> None:
    for module in policy.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, nn.Parameter(1.1 * parameter.detach()))


def _assign(policy: Any) -> None:
    policy.load_state_dict({n: 1.1 * v for n, v in policy.state_dict().items()}, assign=True)


def _move(policy: Any) -> None:
    """As ``.to()`` does: the same parameters, elsewhere."""
    for parameter in policy.parameters():
        parameter.data = 1.1 * parameter.data


def _module(policy: Any) -> None:
    mlp = policy.model.vlm_with_expert.lm_expert.layers[1].mlp
    old = mlp.up_proj.weight
    mlp.up_proj = nn.Linear(old.shape[1], old.shape[0], bias=False).eval()
    mlp.up_proj.weight = nn.Parameter(1.5 * old.detach())


def _eps(policy: Any) -> None:
    for layer in policy.model.vlm_with_expert.lm_expert.layers:
        layer.input_layernorm.variance_epsilon = 0.1


def _double_and_back(policy: Any) -> None:
    policy.double().float()


WAYS = {_load: 1, _step: 1, _copy: 1, _swap: 1, _replace: 2, _assign: 2, _move: 2, _module: 2, _eps: 2}
"""Change -> captures it takes to replay before and after it."""


@pytest.mark.check(37, 38, 39)
@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("precision", TIERS)
def test_the_next_chunk_is_of_the_new_weights(
    origin: str, change: Callable[[Any], None], precision: str
) -> None:
    """The chunk afterwards is the one that a policy patched afresh gives."""
    policy = make_policy("tiny", num_steps=2)
    given, noise = make_observation(policy), make_noise(policy)
    other = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision=precision)
    before = chunk(policy, given, noise)
    for each in (policy, other):
        change(each)
    after = chunk(policy, given, noise)
    assert torch.equal(after, chunk(smolvla_fast.patch(other, precision=precision), given, noise))
    assert rel_l2(before, after) > 1e-2 and smolvla_fast.status(policy).calls_stock == 0


@pytest.mark.check(37, 38, 39)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize(("change", "captures"), [*WAYS.items(), (_double_and_back, 2)])
def test_a_replay_is_of_the_new_weights(change: Callable[[Any], None], captures: int) -> None:
    """Values in place are read live; what has moved asks for another capture."""
    pair = Captured(num_steps=2)
    assert pair.same()
    for policy in (pair.plain, pair.policy):
        change(policy)
    assert pair.same() and pair.driver.captures == captures and pair.status.calls_stock == 0


@pytest.mark.check(39)
def test_dtype_change_under_a_patched_policy(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    policy.model.vlm_with_expert.to(torch.bfloat16)
    chunk(policy, observation, noise)
    assert smolvla_fast.status(policy).precision == "bf16"
    for each in (policy, twin):
        each.model.vlm_with_expert.to(torch.bfloat16)
        each.float()
    assert rel_l2(chunk(policy, observation, noise), chunk(twin, observation, noise)) <= FP32_BOUND
    assert smolvla_fast.status(policy).precision == "fp32"


@pytest.mark.check(39)
def test_another_device_fails_as_in_stock(observation: dict[str, Tensor], noise: Tensor) -> None:
    """Here ``meta``, which every machine has: frames on the CPU and weights elsewhere."""
    policy = make_policy("tiny")
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy)
    chunk(policy, observation, noise)
    for each in (policy, twin):
        each.to("meta")
    with pytest.raises(Exception) as stock:
        chunk(twin, observation, noise)
    with pytest.raises(type(stock.value)):
        chunk(policy, observation, noise)
    assert "the policy is on meta" in str(smolvla_fast.status(policy).last_fallback)


@pytest.mark.check(40)
def test_train_mode_is_stock_with_stock_gradients(policy: Any, observation: dict[str, Tensor]) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy)
    batch = {**observation, "action": torch.linspace(-1, 1, 60).view(1, 10, 6)}
    time = torch.tensor([0.4])
    noise = make_noise(policy)
    losses = []
    for each in (policy, twin):
        each.train()
        loss, _ = each.forward(dict(batch), noise=noise, time=time)
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    for mine, theirs in zip(policy.parameters(), twin.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)
    with torch.no_grad():
        policy.train()
        policy.model.sample_actions(*model_inputs(policy, observation), noise=noise)
    assert "train mode" in smolvla_fast.status(policy).last_fallback
    chunk(policy, observation, noise)  # predict_action_chunk goes to eval by itself
    assert smolvla_fast.status(policy).calls_fast == 1


@pytest.mark.check(41)
def test_autograd_through_sample_actions(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    gradients = []
    for patched in (False, True):
        given = noise.clone().requires_grad_()
        if patched:
            smolvla_fast.patch(policy)
        policy.model.sample_actions(*model_inputs(policy, observation), noise=given).sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)
    now = smolvla_fast.status(policy)
    assert now.active and now.calls_stock == 1 and "autograd is on" in now.last_fallback


@pytest.mark.check(42)
@pytest.mark.usefixtures("recording")
def test_each_shape_of_call_has_a_graph() -> None:
    """Batch 1, 8, a ragged 3 and back; cameras; steps. The second round captures nothing."""
    pair = Captured(cameras=3, num_steps=2)
    for _ in range(2):
        for observation in (dict(batch=1), dict(batch=8), dict(batch=3), dict(cameras=1), dict(cameras=2)):
            assert pair.same(**observation), observation
    assert pair.driver.captures == 5, "the second round captured again"
    for policy in (pair.plain, pair.policy):
        policy.config.num_steps = 3
    assert pair.same() and pair.driver.captures == 6
    assert pair.status.graphs == 6


@pytest.mark.check(42)
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_batches_come_and_go(precision: str) -> None:
    stock = make_policy("tiny", num_steps=2)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision=precision)
    for batch in (1, 8, 1, 3):
        given, noise = make_observation(stock, batch=batch, seed=batch), make_noise(stock, batch=batch)
        ours, wanted = chunk(fast, given, noise), chunk(stock, given, noise)
        assert torch.equal(ours, wanted) if precision == "exact" else rel_l2(ours, wanted) <= FP32_BOUND
    assert smolvla_fast.status(fast).calls_stock == 0


def _padding_mask(given: dict[str, Tensor]) -> None:
    given["observation.images.camera2_padding_mask"] = torch.tensor([True, False])


def _five_dimensions(given: dict[str, Tensor]) -> None:
    for key in given:
        if "images" in key:
            given[key] = torch.stack([1 - given[key], given[key]], dim=1)


@pytest.mark.check(43)
@LEROBOT_ONLY
@pytest.mark.parametrize("precision", ["exact", "fp32"])
@pytest.mark.parametrize("empty", [0, 1])
def test_cameras_come_and_go(origin: str, precision: str, empty: int) -> None:
    stock = make_policy("tiny", num_steps=2, empty_cameras=empty)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision=precision)
    noise = make_noise(stock, batch=2)
    calls: list[tuple[int, Callable[[dict[str, Tensor]], None] | None]] = [
        (2, None), (1, None), (2, _padding_mask), (2, _five_dimensions), (2, None),
    ]  # fmt: skip
    chunks = []
    for cameras, change in calls:
        given = make_observation(stock, cameras=cameras, batch=2)
        if change is not None:
            change(given)
        ours, wanted = chunk(fast, given, noise), chunk(stock, given, noise)
        assert torch.equal(ours, wanted) if precision == "exact" else rel_l2(ours, wanted) <= FP32_BOUND
        chunks.append(ours)
    assert torch.equal(chunks[0], chunks[-1]) and torch.equal(chunks[0], chunks[3])
    assert rel_l2(chunks[2][1], chunks[0][1]) > 1e-3, "the mask has no effect: no test"
    none = {key: value for key, value in make_observation(stock).items() if "images" not in key}
    for policy in (stock, fast):
        with pytest.raises(ValueError, match="All image features are missing"):
            chunk(policy, none, make_noise(stock))
    assert smolvla_fast.status(fast).calls_stock == 0


@pytest.mark.check(44)
@pytest.mark.usefixtures("recording")
def test_prompts_of_other_lengths_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where language is padded to the configured maximum and not trimmed."""
    stage = inference.prepare_observation.__globals__
    monkeypatch.setitem(stage, "_trims", lambda device: False)
    pair = Captured("fp32", num_steps=2)
    for length, task in ((3, "go"), (20, "pick up the cube"), (8, "push it"), (48, "wave")):
        assert pair.same(language_length=length, task=task)
    assert pair.driver.captures == 1
