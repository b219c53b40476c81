"""Checks 45 to 48 and 51 to 56: threads, contexts, captures, processes. Servers: test_callers.py."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.captured import Captured
from support.policies import chunk, make_policy
from support.recorder import RecorderDriver
from torch import Tensor

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine import cuda_graphs as graphs
from smolvla_fast.testing.policies import make_noise, make_observation

PATIENCE = 60
"""Seconds after which a thread or a process counts as locked up; the machine may be busy."""


def _in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` returns, computed in a daemon thread that has to end."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "locked up"
    return found[0]


@pytest.mark.check(45)
def test_patched_here_and_run_in_a_daemon_thread(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="exact")
    assert torch.equal(_in_thread(lambda: chunk(policy, observation, noise)), stock)
    assert smolvla_fast.status(policy).calls_fast == 1


@pytest.mark.check(45)
@pytest.mark.usefixtures("recording")
def test_captured_in_one_worker_and_replayed_in_another() -> None:
    pair = Captured(num_steps=2)
    assert all(_in_thread(lambda seed=seed: pair.same(seed=seed)) for seed in range(3))
    assert (pair.driver.captures, pair.driver.replays) == (1, 3)


def _pausing(policy: Any) -> tuple[threading.Event, threading.Event]:
    """Events: a chunk has begun, and it may end. Stops where the noise is drawn."""
    begun, may_end = threading.Event(), threading.Event()
    stock = policy.model.sample_noise

    def sample_noise(*args: Any) -> Any:
        begun.set()
        assert may_end.wait(PATIENCE)
        return stock(*args)

    policy.model.__dict__["sample_noise"] = sample_noise
    return begun, may_end


@pytest.mark.check(46)
def test_a_reset_leaves_the_chunk_under_way_alone(observation: dict[str, Tensor]) -> None:
    """As the RTC engine's main thread does: the chunk under way ends as if nothing had been, the queue is new."""
    policy = make_policy("tiny")
    smolvla_fast.patch(policy, precision="exact")
    torch.manual_seed(3)
    wanted = chunk(policy, observation)
    policy.select_action(dict(observation))
    begun, may_end = _pausing(policy)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(chunk(policy, observation)), daemon=True)
    torch.manual_seed(3)
    thread.start()
    assert begun.wait(PATIENCE)
    for _ in range(10):
        policy.reset()
        smolvla_fast.status(policy)
    may_end.set()
    thread.join(PATIENCE)
    assert not thread.is_alive() and torch.equal(found[0], wanted)
    assert len(policy._queues["action"]) == 0


def _four_threads(policy: Any, wanted: Callable[[dict[str, Tensor], Tensor], Tensor]) -> None:
    given = [(make_observation(policy, seed=seed), make_noise(policy, seed=seed)) for seed in range(4)]
    right = [wanted(*each) for each in given]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(2):
            if not torch.equal(chunk(policy, *given[i]), right[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "locked up"
    assert not wrong and smolvla_fast.status(policy).calls_stock == 0


@pytest.mark.check(47)
def test_threads_get_their_own_right_answer(policy: Any) -> None:
    twin = smolvla_fast.patch(copy.deepcopy(policy))
    _four_threads(smolvla_fast.patch(policy), lambda given, noise: chunk(twin, given, noise))
    assert smolvla_fast.status(policy).calls_fast == 8


@pytest.mark.check(47)
@pytest.mark.usefixtures("recording")
def test_four_threads_share_a_graph() -> None:
    pair = Captured(num_steps=2)
    _four_threads(pair.policy, lambda given, noise: chunk(pair.plain, given, noise))
    assert pair.driver.captures == 1 and pair.status.calls_fast == 8


class _Waiting(RecorderDriver):
    """A capture that is under way until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()

    def capture(self, run: Callable[[], Tensor]) -> Any:
        self.begun.set()
        assert self.may_end.wait(PATIENCE)
        return super().capture(run)


@pytest.mark.check(48)
@pytest.mark.usefixtures("recording")
def test_another_policy_works_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes with noise it is given; to draw noise, which torch refuses during a capture, it waits for the end."""
    monkeypatch.setattr(inference, "driver_for", lambda device: _Waiting())
    pair = Captured(num_steps=2)
    monkeypatch.setattr(inference, "driver_for", lambda device: None)
    other = smolvla_fast.patch(make_policy("tiny", num_steps=2))
    given, noise = make_observation(other), make_noise(other)
    torch.manual_seed(3)
    drawn = chunk(other, given)
    found: dict[str, Any] = {}
    capturing = threading.Thread(target=lambda: found.update(same=pair.same()), daemon=True)
    drawing = threading.Thread(target=lambda: found.update(drawn=chunk(other, given)), daemon=True)
    capturing.start()
    assert pair.driver.begun.wait(PATIENCE)
    assert torch.isfinite(chunk(other, given, noise)).all()
    torch.manual_seed(3)
    drawing.start()
    drawing.join(0.3)
    assert drawing.is_alive(), "random numbers are drawn while a graph is captured"
    pair.driver.may_end.set()
    for thread in (capturing, drawing):
        thread.join(PATIENCE)
        assert not thread.is_alive(), "locked up"
    assert found["same"] and torch.equal(found["drawn"], drawn)
    assert pair.status.calls_stock == smolvla_fast.status(other).calls_stock == 0


@pytest.mark.check(51)
def test_contexts_of_lerobots_loops_change_no_bit(
    policy: Any, observation: dict[str, Tensor], noise: Tensor
) -> None:
    stock = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="exact")
    for context in (nullcontext(), torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(chunk(policy, observation, noise), stock)
    assert smolvla_fast.status(policy).calls_fast == 3


@pytest.mark.check(51)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("first", [torch.inference_mode, nullcontext])
def test_calls_under_inference_mode_and_outside_share_a_graph(first: Callable[[], Any]) -> None:
    """Its buffers are no inference tensors, whoever captures it: outside nobody could write to those."""
    pair = Captured(num_steps=2)
    for seed, context in enumerate((first, nullcontext, torch.inference_mode, torch.no_grad)):
        with context():
            assert pair.same(seed=seed), context
    assert (pair.driver.captures, pair.driver.replays, pair.status.calls_stock) == (1, 4, 0)


@pytest.mark.check(52)
def test_compile_model_is_said_once_and_claims_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """LeRobot's compiled method hides ours. Called without dynamo: only who serves is asked here."""
    precision = torch.get_float32_matmul_precision()  # LeRobot sets it
    try:
        policy = make_policy("tiny", compile_model=True)
    finally:
        torch.set_float32_matmul_precision(precision)
    stock = make_policy("tiny")
    given, noise = make_observation(stock), make_noise(stock)
    smolvla_fast.patch(policy)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(chunk(policy, given, noise), chunk(stock, given, noise))
    now = smolvla_fast.status(policy)
    assert not now.active and now.precision == now.backend == "stock" and now.calls_fast == 0
    assert "sample_actions is replaced on the instance (torch.compile does this)" in str(now.last_fallback)
    assert len(caplog.records) == 1 and str(now.last_fallback) in caplog.text


@pytest.mark.check(53)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("fail_at", ["warmup", 0, 57])
def test_a_failed_capture_is_stock_once_said(fail_at: str | int, caplog: pytest.LogCaptureFixture) -> None:
    pair = Captured("fp32", num_steps=2)
    stock = make_policy("tiny", num_steps=2)
    pair.driver.fail_at = fail_at
    given, noise = make_observation(stock), make_noise(stock)
    with caplog.at_level(logging.WARNING, logger="smolvla_fast"):
        for _ in range(3):
            assert torch.equal(chunk(pair.policy, given, noise), chunk(stock, given, noise))
    assert len([record for record in caplog.records if "capture failed" in record.message]) == 1
    assert pair.driver.captures == (0 if fail_at == "warmup" else 1), "tried again and again"
    assert pair.driver.releases == 1 and pair.status.graphs == 0 and pair.status.calls_stock == 3
    assert "OutOfMemoryError: out of memory" in pair.status.last_fallback
    chunk(pair.policy, make_observation(stock, batch=2), make_noise(stock, batch=2))
    assert pair.status.calls_stock == 4, "another shape is tried for itself"
    pair.driver.fail_at = None
    smolvla_fast.refresh(pair.policy)
    assert pair.same() and pair.status.graphs == 1


@pytest.mark.check(54)
@pytest.mark.usefixtures("recording")
def test_graphs_are_few_and_the_oldest_goes_first() -> None:
    pair = Captured(num_steps=2)
    pair.engine_of(pair.policy).graphs._capacity = 2
    for batch in (1, 2, 1, 3, 1):
        assert pair.same(batch=batch)
    assert pair.driver.captures == 3, "batch 1 was in use and must stay"
    assert pair.status.graphs == 2 and pair.driver.releases == 1
    assert pair.same(batch=2) and pair.driver.captures == 4
    assert pair.status.graph_bytes > 2 * 1000, "pool and static inputs of both"
    assert pair.status.extra_bytes >= pair.status.graph_bytes


def _child(pipe: Any, policy: Any, given: dict[str, Tensor], noise: Tensor) -> None:
    """Runs in another process: what is captured there, before and after a chunk, and the chunk."""
    torch.set_num_threads(1)
    captured = smolvla_fast.status(policy).graphs
    actions = policy.predict_action_chunk(dict(given), noise=noise)
    pipe.send((captured, smolvla_fast.status(policy).to_dict(), actions.tolist()))


@pytest.mark.check(56)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_computes_the_parents_chunk(method: str) -> None:
    """On a CPU, where nothing is captured, both compute the parent's chunk. A CUDA context does not survive a fork: there
    the child fails as stock does (test_on_a_gpu.py); what is spawned captures for itself."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system does not {method}")
    policy = make_policy("tiny", num_steps=2)
    given, noise = make_observation(policy), make_noise(policy)
    smolvla_fast.patch(policy, warmup=given)
    wanted = chunk(policy, given, noise)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, policy, given, noise), daemon=True)
    child.start()
    assert ours.poll(3 * PATIENCE), "locked up"  # a spawned process imports torch and LeRobot first
    captured, after, actions = ours.recv()
    child.join(PATIENCE)
    assert child.exitcode == 0 and captured == 0
    assert torch.equal(torch.tensor(actions), wanted)
    assert after["active"] and after["calls_fast"] == (1 if method == "spawn" else 2)


def _forked_child(pipe: Any, pair: Captured) -> None:
    """Runs in a forked process: what is captured there; whether two chunks are right; who computed them."""
    captured, replays = pair.status.graphs, pair.driver.replays
    same = pair.same() and pair.same(seed=1)
    pipe.send((captured, same, pair.driver.captures, pair.driver.replays - replays, pair.driver.releases))


@pytest.mark.check(56)
@pytest.mark.usefixtures("recording")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_captures_for_itself() -> None:
    """No graph of the parent is replayed in the child, nor destroyed; a capture under way in the parent holds nobody up."""
    pair = Captured(num_steps=2)
    assert pair.same() and (pair.driver.captures, pair.driver.replays, pair.status.graphs) == (1, 1, 1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_forked_child, args=(theirs, pair), daemon=True)
    with graphs.not_capturing():
        child.start()
    assert ours.poll(PATIENCE), "locked up"
    captured, same, captures, replays, releases = ours.recv()
    child.join(PATIENCE)
    assert child.exitcode == 0 and same
    assert (captured, captures, replays, releases) == (0, 2, 2, 0), "one capture of its own, replayed twice"
    assert pair.same() and (pair.driver.captures, pair.driver.replays, pair.status.graphs) == (1, 2, 1)


@pytest.mark.check(9, 57)
@pytest.mark.usefixtures("recording")
def test_after_a_warm_up_nothing_is_captured() -> None:
    """Nor when the same patch is asked for again."""
    pair = Captured(num_steps=2)
    for warmup in (True, make_observation(pair.plain)):
        smolvla_fast.patch(pair.policy, precision="exact", backend="torch", warmup=warmup)
        assert pair.status.graphs == 1 and pair.status.calls_fast == 0
    captures = pair.driver.captures
    assert pair.same() and pair.driver.captures == captures == 1


@pytest.mark.check(49, 57)
@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("example", [False, True], ids=["warmup=True", "warmup=batch"])
def test_after_a_warm_up_guided_chunks_capture_nothing(example: bool) -> None:
    """A robot's first chunk is not guided and all others are, by leftovers of any length: two graphs, made beforehand.

    The RTC processor and the random state are as before.
    """
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    pair = Captured(num_steps=2)
    for policy in (pair.plain, pair.policy):
        policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=6)
        policy.init_rtc_processor()
    processor, drawn = pair.policy.model.rtc_processor, torch.get_rng_state()
    before = dict(vars(processor))
    warmup = make_observation(pair.plain) if example else True
    smolvla_fast.patch(pair.policy, precision="exact", backend="torch", warmup=warmup)
    assert pair.driver.captures == pair.status.graphs == 2 and pair.status.calls_fast == 0
    assert pair.policy.model.rtc_processor is processor and vars(processor) == before
    assert torch.equal(torch.get_rng_state(), drawn)
    assert pair.same(inference_delay=0, prev_chunk_left_over=None)
    for shape in ((6, 6), (1, 6), (10, 6), (1, 3, 6), (10, 32)):
        left_over = torch.randn(shape, generator=torch.Generator().manual_seed(9))
        assert pair.same(inference_delay=2, prev_chunk_left_over=left_over), shape
    assert pair.driver.captures == 2 and pair.status.calls_fast == 6


@pytest.mark.check(50, 57)
def test_a_warm_up_leaves_no_record_in_the_debug_tracker() -> None:
    """While the tracker is on, stock serves and every chunk is recorded, guided or not."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = make_policy("tiny", num_steps=2)
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=6, debug=True)
    policy.init_rtc_processor()
    smolvla_fast.patch(policy, warmup=True)
    assert policy.rtc_processor.get_all_debug_steps() == []
    chunk(policy, make_observation(policy), inference_delay=0, prev_chunk_left_over=None)
    assert len(policy.rtc_processor.get_all_debug_steps()) == 2
    assert smolvla_fast.status(policy).calls_stock == 1
