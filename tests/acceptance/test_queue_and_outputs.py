"""Checks 20 to 24: the action queue, and what goes in and comes out of a chunk."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from support.captured import Captured
from support.policies import BOTH, LEROBOT_ONLY, TIERS, chunk, make_policy
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation


@BOTH
@pytest.mark.check(20)
def test_the_queue_runs_the_model_once_a_chunk(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    twin = copy.deepcopy(policy)
    smolvla_fast.patch(policy, precision="exact")
    for chunks in (1, 2):
        for _ in range(policy.config.n_action_steps):
            assert torch.equal(
                policy.select_action(dict(observation), noise=noise),
                twin.select_action(dict(observation), noise=noise),
            )
        assert smolvla_fast.status(policy).calls_fast == chunks
    policy.select_action(dict(observation), noise=noise)
    assert len(policy._queues["action"]) == policy.config.n_action_steps - 1
    policy.reset()
    assert len(policy._queues["action"]) == 0
    policy.select_action(dict(observation), noise=noise)
    assert smolvla_fast.status(policy).calls_fast == 4
    if hasattr(policy, "drop_queued_actions"):  # LeRobot after 0.6.1
        policy.drop_queued_actions()
        assert len(policy._queues["action"]) == 0


def _kept_and_computed_again(policy: Any, other: Any) -> None:
    """A chunk and a queue of views of one, while more chunks are computed here, in another policy and another thread."""
    noise = make_noise(policy)
    given = [make_observation(policy, seed=seed) for seed in range(3)]
    policy.reset()
    first_action = policy.select_action(dict(given[0]), noise=noise)
    queue = list(policy._queues["action"])
    kept = chunk(policy, given[0], noise)
    values, queued = kept.clone(), [each.clone() for each in queue]
    second = chunk(policy, given[1], noise)
    thread = threading.Thread(target=lambda: (chunk(policy, given[2], noise), chunk(other, given[2], noise)))
    thread.start()
    thread.join()
    assert torch.equal(kept, values) and not torch.equal(second, values)
    assert all(torch.equal(a, b) for a, b in zip(queue, queued, strict=True))
    assert torch.equal(first_action, values[:, 0])
    assert kept.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.check(21)
@pytest.mark.parametrize("precision", TIERS)
def test_kept_chunks_and_queues_do_not_change(precision: str) -> None:
    policy = smolvla_fast.patch(make_policy("tiny"), precision=precision)
    _kept_and_computed_again(policy, smolvla_fast.patch(make_policy("tiny", seed=1)))
    assert smolvla_fast.status(policy).calls_stock == 0


@pytest.mark.check(21)
@pytest.mark.usefixtures("recording")
def test_replays_leave_kept_chunks_alone() -> None:
    pair = Captured(num_steps=2)
    _kept_and_computed_again(pair.policy, pair.plain)
    assert (pair.driver.captures, pair.driver.replays) == (1, 4)


@pytest.mark.check(22, 24)
@pytest.mark.parametrize("precision", TIERS)
def test_a_chunk_keeps_the_output_contract(
    policy: Any, observation: dict[str, Tensor], noise: Tensor, precision: str
) -> None:
    smolvla_fast.patch(policy, precision=precision)
    kept_noise = noise.clone()
    first = chunk(policy, observation, noise)
    assert first.shape == (1, policy.config.chunk_size, 6) and first.dtype is torch.float32
    assert first.device == observation["observation.state"].device
    assert not first.requires_grad and not first.is_inference()
    assert torch.equal(noise, kept_noise)
    first.mul_(2)  # Aloha's encoding writes in place


@pytest.mark.check(22)
@pytest.mark.usefixtures("recording")
def test_a_replay_keeps_the_output_contract() -> None:
    pair = Captured(num_steps=2)
    given, noise = make_observation(pair.plain), make_noise(pair.plain)
    for inference in (False, True, False):
        with torch.inference_mode(inference):
            first, stock = chunk(pair.policy, given, noise), chunk(pair.plain, given, noise)
            assert first.is_inference() is stock.is_inference() is inference
            assert not first.requires_grad and first.dtype is torch.float32 and first.shape == stock.shape
            first.mul_(2)
    assert pair.status.calls_stock == 0 and pair.driver.captures == 1


@pytest.mark.check(23)
@pytest.mark.parametrize("precision", TIERS)
def test_the_batch_is_left_alone_and_let_go(precision: str) -> None:
    policy = smolvla_fast.patch(make_policy("tiny"), precision=precision)
    _left_alone_and_let_go(policy)
    assert smolvla_fast.status(policy).calls_fast == 1


@pytest.mark.check(23)
@pytest.mark.usefixtures("recording")
def test_a_replay_leaves_the_batch_alone_and_lets_it_go() -> None:
    pair = Captured(num_steps=2)
    for _ in range(2):
        _left_alone_and_let_go(pair.policy)
    assert pair.driver.captures == 1


def _left_alone_and_let_go(policy: Any) -> None:
    noise = make_noise(policy)
    # Frames of the tower's own size reach the engine as they are.
    batch = make_observation(policy, image_size=(32, 32))
    kept = {key: value.clone() for key, value in batch.items()}
    policy.predict_action_chunk(batch, noise=noise)
    assert list(batch) == list(kept) and all(torch.equal(batch[key], kept[key]) for key in kept)
    held = [weakref.ref(tensor) for tensor in (*batch.values(), noise)]
    del batch, noise
    gc.collect()
    assert all(each() is None for each in held), "a camera buffer is kept"


@pytest.mark.check(23)
@LEROBOT_ONLY
def test_aloha_flips_the_state_as_stock_does(origin: str) -> None:
    """Stock's documented exception: the state of the batch is changed in place, once a call."""
    stock = make_policy("tiny", state_dim=14, action_dim=14, adapt_to_pi_aloha=True)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision="exact")
    batches = [make_observation(stock), make_observation(stock)]
    chunks = [
        policy.predict_action_chunk(batch, noise=make_noise(stock))
        for policy, batch in zip((stock, fast), batches, strict=True)
    ]
    assert torch.equal(*chunks)
    assert torch.equal(batches[0]["observation.state"], batches[1]["observation.state"])
    assert not torch.equal(batches[0]["observation.state"], make_observation(stock)["observation.state"])
