"""What another thread may do at the worst moment of a chunk: each test puts it there.

Where a lock keeps the other thread out, it is given a moment and goes on afterwards.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.captured import Captured, recording
from support.policies import LEROBOT_ONLY, chunk, make_policy, rel_l2
from support.recorder import RecorderDriver
from support.threads import MOMENT, PATIENCE, Elsewhere, elsewhere, once_after
from torch import nn

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine import quantized_weights
from smolvla_fast.patch import engine_of
from smolvla_fast.patching import chunk_forward, layer_runtime, runtime
from smolvla_fast.patching.change_detector import ChangeDetector
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

__all__ = ["recording"]
pytestmark = [LEROBOT_ONLY, pytest.mark.check(47)]
patch_module: Any = sys.modules["smolvla_fast.patch"]


def patched(precision: str = "fp32", **settings: Any) -> tuple[Any, Any, Any]:
    policy = make_policy("tiny", num_steps=2, **settings)
    smolvla_fast.patch(policy, precision=precision)
    return policy, make_observation(policy), make_noise(policy)


def stock_of(policy: Any) -> Any:
    return smolvla_fast.unpatch(copy.deepcopy(policy))


class Doubled(nn.Linear):
    def forward(self, input: Any) -> Any:
        return 2 * super().forward(input)


def test_a_module_replaced_while_the_model_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("tiny", num_steps=2)
    mlp = policy.model.vlm_with_expert.lm_expert.layers[1].mlp

    def adapt() -> None:
        adapted = Doubled(mlp.down_proj.in_features, mlp.down_proj.out_features, bias=False)
        adapted.weight = mlp.down_proj.weight
        mlp.down_proj = adapted.eval()

    once_after(monkeypatch, layer_runtime, "probe", adapt)
    smolvla_fast.patch(policy)
    given, noise = make_observation(policy), make_noise(policy)
    assert torch.equal(chunk(policy, given, noise), chunk(stock_of(policy), given, noise))
    assert "not the plain module" in str(smolvla_fast.status(policy).last_fallback)


@pytest.mark.usefixtures("recording")
def test_a_capture_between_two_parameters_of_a_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thread A captures into graphs that C has just cleared, and a loader replaces the last parameter before C is done."""
    pair = Captured(num_steps=2)
    policy, given, noise = pair.policy, make_observation(pair.policy), make_noise(pair.policy)
    chunk(policy, given, noise)
    layers = policy.model.vlm_with_expert.lm_expert.layers

    def load(index: int) -> None:
        mlp = layers[index].mlp
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach() * 3)

    at, go, captured = threading.Event(), threading.Event(), threading.Event()
    act = inference.Engine.act

    def waiting(self: Any, *args: Any, **checks: Any) -> Any:
        if threading.current_thread() is not worker:
            return act(self, *args, **checks)
        at.set()
        assert go.wait(PATIENCE)
        found = act(self, *args)
        captured.set()
        return found

    monkeypatch.setattr(inference.Engine, "act", waiting)
    worker = threading.Thread(target=lambda: chunk(policy, given, noise), daemon=True)
    worker.start()
    assert at.wait(PATIENCE)
    load(0)
    clear, done = inference.GraphCache.clear, []

    def cleared(self: Any) -> None:
        clear(self)
        if not done:
            done.append(None)
            go.set()
            assert captured.wait(PATIENCE)
            load(1)

    monkeypatch.setattr(inference.GraphCache, "clear", cleared)
    smolvla_fast.status(policy)
    worker.join(PATIENCE)
    monkeypatch.setattr(inference.Engine, "act", act)
    for _ in range(2):
        assert torch.equal(chunk(policy, given, noise), chunk(stock_of(policy), given, noise))


def test_settings_change_while_an_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """``refresh`` makes a chunk under way build an engine; ``patch`` comes in between."""
    policy, given, noise = patched("fp32")
    at, go = threading.Event(), threading.Event()
    read = layer_runtime.probed_code

    def slow(model: Any) -> Any:
        found = read(model)
        if threading.current_thread() is worker and not at.is_set():
            at.set()
            go.wait(MOMENT)
        return found

    def refreshed_chunk() -> None:
        smolvla_fast.refresh(policy)
        chunk(policy, given, noise)

    monkeypatch.setattr(layer_runtime, "probed_code", slow)
    worker = threading.Thread(target=refreshed_chunk, daemon=True)
    worker.start()
    assert at.wait(PATIENCE)
    smolvla_fast.patch(policy, precision="exact")
    go.set()
    worker.join(PATIENCE)
    assert smolvla_fast.status(policy).precision == "exact"
    assert torch.equal(chunk(policy, given, noise), chunk(stock_of(policy), given, noise))


def test_a_look_in_the_middle_of_a_move_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """``policy.to`` goes from parameter to parameter. What a chunk in between finds must not stand for the moved model."""
    policy, given, noise = patched("auto")
    projection = policy.model.vlm_with_expert.get_vlm_model().text_model.layers[0].mlp.up_proj
    move = projection._apply

    def slow(*args: Any, **kwargs: Any) -> Any:
        with pytest.raises(RuntimeError, match="dtype"):  # half in bf16: stock cannot compute it either
            chunk(policy, given, noise)
        return move(*args, **kwargs)

    monkeypatch.setattr(projection, "_apply", slow, raising=False)
    elsewhere(lambda: policy.to(torch.bfloat16))
    monkeypatch.undo()
    heads = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
    for name in heads:  # fp32 in LeRobot's layout: stock casts states and actions to that
        getattr(policy.model, name).float()
    chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert now.active and now.precision == "bf16" and now.calls_fast == 1


def weight(seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)))


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.data.float(), other.data.float()) and torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("anew", [False, True])
def test_a_load_while_a_copy_is_made_is_seen(anew: bool) -> None:
    made, loaded, matrix = quantized_weights.QuantizedWeights(torch.bfloat16), weight(1), weight(0)
    if anew:
        made.of(matrix)
        matrix.data.mul_(2)
    plain, done = quantized_weights.FLOATS.make, []

    def make(source: Any, dtype: torch.dtype) -> Any:
        found = plain(source, dtype)
        if not done:
            done.append(None)
            elsewhere(lambda: matrix.data.copy_(loaded.data))
        return found

    made.kind = replace(quantized_weights.FLOATS, make=make)
    if anew:
        assert made.refreshed()
    else:
        made.of(matrix)
    assert done and made.refreshed()
    assert same(made.of(matrix), plain(loaded.detach(), torch.bfloat16))


def test_copies_are_made_while_others_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    made, matrices = quantized_weights.QuantizedWeights(torch.bfloat16), [weight(seed) for seed in range(4)]
    made.of(matrices[0])
    made.of(matrices[1])
    once_after(monkeypatch, quantized_weights._Made, "live", lambda: made.of(matrices[2]), MOMENT)
    assert not made.refreshed()
    kept = made.of(matrices[2])
    assert made.of(matrices[2]) is kept and made.bytes == 3 * kept.nbytes


def test_two_threads_get_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may have captured either, so both have to follow the weight."""
    made, matrix, found = quantized_weights.QuantizedWeights(torch.bfloat16), weight(0), []
    plain, threads = quantized_weights.FLOATS.make, []

    def make(source: Any, dtype: torch.dtype) -> Any:
        if not threads:
            threads.append(None)
            threads.append(elsewhere(lambda: found.append(made.of(matrix)), MOMENT))
        return plain(source, dtype)

    made.kind = replace(quantized_weights.FLOATS, make=make)
    found.append(made.of(matrix))
    threads[1].ended()
    assert len(found) == 2 and found[0] is found[1]


class _Replays:
    """A graph cache to which every chunk is a replay, so that weights are looked at behind it."""

    count, bytes, nodes = 0, 0, None

    def clear(self) -> None:
        pass

    def replays(self, key: Any, inputs: Any) -> bool:
        return True

    def run(self, key: Any, inputs: Any, compute: Callable[[Any], Any]) -> Any:
        return compute(inputs)


@pytest.mark.usefixtures("products")
def test_a_change_that_another_thread_saw_first(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, given, noise = patched("int8")
    before = chunk(policy, given, noise)
    engine_of(policy.model).graphs = _Replays()  # type: ignore[assignment]
    policy.load_state_dict(make_policy("tiny", num_steps=2, seed=1).state_dict())
    other: list[Any] = []
    once_after(monkeypatch, _Replays, "run", lambda: other.append(chunk(policy, given, noise)))
    mine = chunk(policy, given, noise)
    assert torch.equal(mine, other[0]) and not torch.equal(mine, before)


@pytest.mark.usefixtures("recording")
def test_a_replay_that_a_new_tier_overtakes_runs_on_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread asks for another tier while the GPU works: the chunk of the old engine is thrown away."""
    pair, other = Captured(num_steps=2), Captured("fp32", num_steps=2)
    given, noise = make_observation(pair.plain), make_noise(pair.plain)
    exact, wanted = chunk(pair.policy, given, noise), chunk(other.plain, given, noise)
    assert not torch.equal(exact, wanted), "tiers with the same bits: no test"
    fp32 = dict(precision="fp32", backend="torch")
    once_after(monkeypatch, inference.GraphCache, "run", lambda: smolvla_fast.patch(pair.policy, **fp32))
    assert torch.equal(chunk(pair.policy, given, noise), wanted)
    assert (pair.status.precision, pair.status.calls_fast, pair.status.calls_stock) == ("fp32", 2, 0)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_unpatched_as_a_chunk_begins(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, given, noise = patched()
    wanted = chunk(stock_of(policy), given, noise)
    find, done = chunk_forward.runtime_of, []

    def found(model: Any) -> Any:
        runtime = find(model) if moment == "after" else None
        if not done:
            done.append(None)
            elsewhere(lambda: smolvla_fast.unpatch(policy))
        return runtime or find(model)

    monkeypatch.setattr(chunk_forward, "runtime_of", found)
    got = chunk(policy, given, noise)
    # Of stock, or of the engine that was there as it began.
    assert done and rel_l2(got, wanted) <= FP32_BOUND
    assert not smolvla_fast.status(policy).active
    assert torch.equal(chunk(policy, given, noise), wanted)


def test_unpatched_while_its_status_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, *_ = patched()
    find = patch_module.runtime_of
    monkeypatch.setattr(
        patch_module,
        "runtime_of",
        lambda model: (elsewhere(lambda: smolvla_fast.unpatch(policy)), find(model))[1],
    )
    now = smolvla_fast.status(policy)
    assert not now.active and now.last_fallback == "the policy was unpatched meanwhile"


def test_an_attribute_that_comes_while_the_model_is_noted() -> None:
    """At any step of a loop over them another thread may add one; here the comparison inside the loop does."""
    policy, *_ = patched()
    attributes = vars(policy.model)

    class Comparing(str):
        __hash__ = str.__hash__

        def __ne__(self, other: object) -> bool:
            attributes[f"added_{len(attributes)}"] = None
            return str.__ne__(self, other)

        def __eq__(self, other: object) -> bool:
            return str.__eq__(self, other)

    attributes[Comparing("telling")] = None
    detector = ChangeDetector(policy.model)
    assert not detector.same(policy.model)


def _use(policy: Any, given: Any, noise: Any) -> None:
    torch.set_num_threads(1)
    chunk(policy, given, noise)
    smolvla_fast.refresh(policy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", ["table", "model", "training", "copies"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.usefixtures("products")
def test_forked_while_a_thread_holds_a_lock(name: str) -> None:
    policy, given, noise = patched("int8" if name == "copies" else "fp32")
    own = runtime.runtime_of(policy.model)
    if name == "copies":
        lock = engine_of(policy.model).quantized_weights._lock  # type: ignore[union-attr]
    else:
        locks = {"table": runtime.RUNTIMES.lock, "model": own.lock, "training": own.training.lock}
        lock = locks[name]
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(PATIENCE)
    child = multiprocessing.get_context("fork").Process(target=_use, args=(policy, given, noise), daemon=True)
    child.start()
    child.join(PATIENCE)
    done.set()
    code = child.exitcode
    child.kill()
    assert code == 0, "the child failed, or waits for a thread that it does not have"


def test_garbage_that_unpatches_is_collected_while_another_policy_is_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A robot's session that ends in ``__del__``, whenever Python collects it: here inside the table's lock."""
    policy, *_ = patched()
    other = make_policy("tiny")
    make = runtime.Runtime.__init__

    def collecting(self: Any) -> None:
        monkeypatch.setattr(runtime.Runtime, "__init__", make)
        smolvla_fast.unpatch(policy)
        make(self)

    monkeypatch.setattr(runtime.Runtime, "__init__", collecting)
    elsewhere(lambda: smolvla_fast.patch(other))
    assert smolvla_fast.status(other).active and not smolvla_fast.status(policy).active


def test_chunks_served_during_a_warm_up_count(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, given, noise = patched()
    once_after(monkeypatch, inference.Engine, "act", lambda: [chunk(policy, given, noise) for _ in range(3)])
    smolvla_fast.patch(policy, warmup=True)
    assert smolvla_fast.status(policy).calls_fast == 3


def test_a_warm_up_that_fails_undoes_its_own_patch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("tiny")

    def failing(*_: Any) -> None:
        elsewhere(lambda: smolvla_fast.patch(policy, precision="exact"))
        raise ValueError("on purpose")

    monkeypatch.setattr(patch_module, "warm_up", failing)
    with pytest.raises(ValueError, match="on purpose"):
        smolvla_fast.patch(policy, precision="fp32", warmup=True)
    assert smolvla_fast.status(policy).precision == "exact"


@pytest.mark.usefixtures("recording")
def test_no_memory_is_given_back_while_another_policy_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, released = threading.Event(), threading.Event(), []

    class Slow(RecorderDriver):
        def capture(self, run: Callable[[], Any]) -> Any:
            begun.set()
            may_end.wait(PATIENCE)
            return super().capture(run)

        def release(self) -> None:
            released.append(begun.is_set() and not may_end.is_set())
            super().release()

    done = Captured(num_steps=2)
    assert done.same()
    engine_of(done.policy.model).graphs._driver = Slow()  # type: ignore[union-attr]
    monkeypatch.setattr(inference, "driver_for", lambda device: Slow())
    slow = Captured(num_steps=2)
    right: list[bool] = []
    capturing = Elsewhere(lambda: right.append(slow.same()))
    assert begun.wait(PATIENCE)
    clearing = elsewhere(lambda: smolvla_fast.unpatch(done.policy), MOMENT)
    may_end.set()
    for thread in (capturing, clearing):
        thread.ended()
    assert right == [True] and released and not any(released)


@pytest.mark.usefixtures("recording")
def test_nothing_is_given_back_inside_a_capture() -> None:
    """Garbage that unpatches another policy may be collected there."""
    done, slow = Captured(num_steps=2), Captured(num_steps=2)
    assert done.same()
    driver = done.driver
    driver.capturing = True
    before = driver.releases
    smolvla_fast.unpatch(done.policy)
    assert driver.releases == before and slow.same()


@pytest.mark.usefixtures("recording")
def test_garbage_that_unpatches_a_policy_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected while another policy's graphs are dropped, it waits for a chunk, which must not wait for the drop."""
    used, dropped = Captured(num_steps=2), Captured(num_steps=2)
    assert used.same() and dropped.same()
    cache = engine_of(used.policy.model).graphs
    assert cache is not None
    held, go = threading.Event(), threading.Event()
    capture = used.driver.capture

    def slow(run: Callable[[], Any]) -> Any:
        held.set()
        assert go.wait(PATIENCE)
        return capture(run)

    def collect() -> None:
        go.set()
        elsewhere(lambda: smolvla_fast.unpatch(used.policy))

    monkeypatch.setattr(used.driver, "capture", slow)
    monkeypatch.setattr(dropped.driver, "collect", collect)
    chunk_of_another_shape = Elsewhere(lambda: used.same(batch=2))
    assert held.wait(PATIENCE)
    elsewhere(lambda: smolvla_fast.unpatch(dropped.policy))
    chunk_of_another_shape.ended()


def test_a_load_in_the_middle_of_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen as a difference between the modules and ours, it must not send the policy to stock for good."""
    answers = ["of two checkpoints"]
    monkeypatch.setattr(layer_runtime, "probe", lambda *_, **__: answers.pop() if answers else None)
    policy, given, noise = patched()
    chunk(policy, given, noise)
    assert smolvla_fast.status(policy).calls_fast == 1 and not answers
