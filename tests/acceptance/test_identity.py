"""Checks 8 to 19: the policy stays what it is, and all of the patch can be undone."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.captured import Captured
from support.policies import BOTH, LEROBOT_ONLY, chunk, make_policy
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation

PATCHED = ("model", "model.vlm_with_expert")
"""What ``patch`` gives a subclass of its class."""


def _seen(policy: Any) -> tuple[Any, ...]:
    state = policy.state_dict()
    return (
        type(policy),
        policy.name,
        policy.config_class,
        sorted(vars(policy)),
        inspect.signature(policy.predict_action_chunk),
        inspect.signature(policy.select_action),
        [(key, value.data_ptr(), value.dtype) for key, value in state.items()],
        [(name, type(module)) for name, module in policy.named_modules() if name not in PATCHED],
        [(name, id(parameter)) for name, parameter in policy.named_parameters()],
        [name for name, _ in policy.named_buffers()],
    )


@pytest.mark.check(10, 11)
@LEROBOT_ONLY
def test_identity_and_interface_are_unchanged(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    from lerobot.policies.pretrained import PreTrainedPolicy
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy, VLAFlowMatching

    before = _seen(policy)
    smolvla_fast.patch(policy)
    assert _seen(policy) == before
    chunk(policy, observation, noise)
    assert _seen(policy) == before
    assert isinstance(policy, PreTrainedPolicy) and isinstance(policy, SmolVLAPolicy)
    assert isinstance(policy.model, VLAFlowMatching) and policy.supports_rtc()
    # What the RTC engine asks before it starts.
    inspect.signature(policy.predict_action_chunk).bind({}, inference_delay=0, prev_chunk_left_over=None)


@BOTH
@pytest.mark.check(8, 9)
def test_unpatch_restores_class_attributes_and_bits(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    stock = chunk(policy, observation, noise)
    modules = [policy.get_submodule(name) for name in PATCHED]
    own, before = [(type(each), list(each.__dict__)) for each in modules], _seen(policy)
    smolvla_fast.unpatch(policy)  # of an unpatched policy: nothing
    for _ in range(2):
        smolvla_fast.patch(policy, precision="bf16")
        smolvla_fast.patch(policy, precision="bf16")
        chunk(policy, observation, noise)
        assert smolvla_fast.status(policy).calls_fast == 1
        assert smolvla_fast.unpatch(policy) is policy
    assert [(type(each), list(each.__dict__)) for each in modules] == own and _seen(policy) == before
    assert torch.equal(chunk(policy, observation, noise), stock)


@pytest.mark.check(8, 54)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("how", ["unpatch", "delete"])
def test_graphs_go_with_the_patch_or_the_policy(how: str) -> None:
    pair = Captured(num_steps=2)
    assert pair.same()
    engine, model = weakref.ref(pair.engine_of(pair.policy)), weakref.ref(pair.policy.model)
    if how == "unpatch":
        smolvla_fast.unpatch(pair.policy)
    else:
        del pair.policy
    gc.collect()
    assert engine() is None, "captured memory outlives the patch"
    assert (model() is None) is (how == "delete")


@pytest.mark.check(12, 13)
def test_saves_and_loads_without_us(tmp_path: Any, python: Callable[..., str]) -> None:
    policy = make_policy("tiny", folder=tmp_path / "vlm", num_steps=2)
    observation, noise = make_observation(policy), make_noise(policy)
    wanted = chunk(policy, observation, noise)
    policy.save_pretrained(tmp_path / "before")
    smolvla_fast.patch(policy).save_pretrained(tmp_path / "after")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    torch.save((observation, noise, wanted), tmp_path / "chunk.pt")
    code = f"""
import sys
sys.modules["smolvla_fast"] = None  # importing it raises
import torch
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
torch.set_num_threads(1)
policy = SmolVLAPolicy.from_pretrained({str(tmp_path / "after")!r}).eval()
observation, noise, wanted = torch.load({str(tmp_path / "chunk.pt")!r})
print("equal" if torch.equal(policy.predict_action_chunk(observation, noise=noise), wanted) else "different")
"""
    assert python(code).splitlines()[-1] == "equal"


@BOTH
@pytest.mark.check(14)
def test_only_this_policy_changes(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    other, third = make_policy("tiny", num_steps=3), make_policy("tiny", seed=1)
    stock = chunk(third, observation, noise)
    smolvla_fast.patch(policy)
    assert not smolvla_fast.status(other).active
    smolvla_fast.patch(other, precision="exact")
    first, second = chunk(policy, observation, noise), chunk(other, observation, noise)
    assert torch.equal(chunk(third, observation, noise), stock)
    assert torch.equal(first, chunk(policy, observation, noise))
    assert torch.equal(second, chunk(other, observation, noise))
    assert smolvla_fast.status(policy).precision == "fp32" and smolvla_fast.status(other).precision == "exact"
    assert not smolvla_fast.status(third).active


@BOTH
@pytest.mark.check(15)
def test_a_shallow_copy_has_its_own_queue(policy: Any, observation: dict[str, Tensor], noise: Tensor) -> None:
    smolvla_fast.patch(policy)
    twin = copy.copy(policy)
    twin.reset()
    first = policy.select_action(dict(observation), noise=noise)
    assert len(policy._queues["action"]) == policy.config.n_action_steps - 1
    assert len(twin._queues["action"]) == 0
    assert torch.equal(twin.select_action(dict(observation), noise=noise), first)
    assert smolvla_fast.status(twin).active


def _pickled(policy: Any) -> Any:
    return pickle.loads(pickle.dumps(policy))


def _saved(policy: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(policy, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@BOTH
@pytest.mark.check(16)
@pytest.mark.parametrize("make", [copy.deepcopy, _pickled, _saved])
def test_copies_run_fast_and_apart(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, make: Any
) -> None:
    smolvla_fast.patch(policy)
    wanted = chunk(policy, observation, noise)
    twin = make(policy)
    assert torch.equal(chunk(twin, observation, noise), wanted)
    assert smolvla_fast.status(twin).calls_fast == 1 and smolvla_fast.status(policy).calls_fast == 1
    for parameter in twin.parameters():
        parameter.data.mul_(1.1)
    chunk(twin, observation, noise)
    assert torch.equal(chunk(policy, observation, noise), wanted)
    assert type(smolvla_fast.unpatch(twin).model) is type(policy.model).stock_class
    assert smolvla_fast.status(policy).active


@BOTH
@pytest.mark.check(16)
def test_a_copy_that_shares_parameters_follows_them(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    smolvla_fast.patch(policy)
    twin = copy.deepcopy(policy, {id(p): p for p in policy.parameters()})
    for parameter in policy.parameters():
        parameter.data.mul_(1.05)
    assert torch.equal(chunk(twin, observation, noise), chunk(policy, observation, noise))


@pytest.mark.check(16)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("make", [copy.deepcopy, _pickled])
def test_a_copy_captures_for_itself(make: Any) -> None:
    pair = Captured(num_steps=2)
    assert pair.same()
    twin = make(pair.policy)
    assert smolvla_fast.status(twin).graphs == 0 and pair.status.graphs == 1
    for parameter in twin.parameters():
        parameter.data.mul_(1.1)
    given, noise = make_observation(pair.plain), make_noise(pair.plain)
    stock = smolvla_fast.unpatch(copy.deepcopy(twin))
    for _ in range(2):
        assert torch.equal(chunk(twin, given, noise), chunk(stock, given, noise))
        assert pair.same() and not torch.equal(chunk(twin, given, noise), chunk(pair.plain, given, noise))
    for policy in (twin, pair.policy):
        assert (pair.engine_of(policy).graphs.count, pair.engine_of(policy).graphs._driver.captures) == (1, 1)
    assert pair.engine_of(twin) is not pair.engine_of(pair.policy)
