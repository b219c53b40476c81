"""The first denoise step beside the prefix: the same bits, in an order that is right on a GPU's streams and allocator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy
from support.recorder import RecorderDriver
from support.streams import Race, Streams

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine.side_stream import SideStream, offered, side_stream
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.kernels import launch_order
from smolvla_fast.ops.plan import FIRST_STEP, LAUNCHES, Plan
from smolvla_fast.ops.table import NAMES
from smolvla_fast.patch import engine_of
from smolvla_fast.patching.inputs import made_inputs
from smolvla_fast.stages.wavefront import BESIDE_ROWS
from smolvla_fast.testing.policies import make_noise, make_observation

pytestmark = LEROBOT_ONLY  # whose policy it is changes nothing here
SMALL: dict[str, Any] = dict(cameras=1, num_vlm_layers=4, num_steps=2, tokenizer_max_length=8)


class Driver(RecorderDriver):
    """A recorder under which calls have streams."""

    def __init__(self, streams: Streams) -> None:
        super().__init__(side=streams.side)
        self.streams = streams

    def capture(self, run: Callable[[], Any]) -> Any:
        self.streams.synchronize()
        with self.streams:
            return super().capture(run)


class Chunks:
    """A policy whose chunks are captured by a recorder with a side stream, beside a plain one with its weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, precision: str = "fp32", **settings: Any) -> None:
        self.plain = make_policy("tiny", **{**SMALL, **settings})
        self.policy = copy.deepcopy(self.plain)
        smolvla_fast.patch(self.plain, precision=precision, backend="torch")
        self.streams = Streams(monkeypatch)
        monkeypatch.setattr(inference, "driver_for", lambda device: Driver(self.streams))
        smolvla_fast.patch(self.policy, precision=precision, backend="torch")
        self.engine = engine_of(self.policy.model)
        self.ops: list[tuple[str, str]] = []
        self.engine.ops = replace(self.engine.ops, **{name: self._noted(name) for name in NAMES})

    def _noted(self, name: str) -> Callable[..., Any] | None:
        function = getattr(self.engine.ops, name)

        def op(*args: Any, **kwargs: Any) -> Any:
            self.ops.append((self.streams.current.name, name))
            return function(*args, **kwargs)

        return None if function is None else op

    def __call__(self, batch: int = 1, **kwargs: Any) -> bool:
        """Whether both give the same bits."""
        given, noise = make_observation(self.plain, batch=batch), make_noise(self.plain, batch=batch)
        wanted = chunk(self.plain, given, noise, **kwargs)
        found = chunk(self.policy, given, noise, **kwargs)
        status = smolvla_fast.status(self.policy)
        assert status.last_fallback is None, status.last_fallback
        assert self.streams.current is self.streams.main
        return torch.equal(found, wanted)

    @property
    def on_the_side(self) -> bool:
        return any(stream == "side" for stream, _ in self.ops)


def inputs(chunks: Chunks) -> tuple[Any, ...]:
    return (chunks.policy.model, *made_inputs(chunks.policy.model), make_noise(chunks.policy))


def run(chunks: Chunks) -> None:
    """The warm-up of a capture, past the cache and the fallback, which would say what it raises in words of their own."""
    chunks.engine.graphs = None
    with chunks.streams, offered(chunks.streams.side):
        chunks.engine.act(*inputs(chunks))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(attention_mode="self_attn"), dict(self_attn_every_n_layers=0), dict(num_vlm_layers=1), dict(num_steps=1)],
    ids=lambda settings: ",".join(map(str, settings.values())) or "default",
)  # fmt: skip
def test_bits_are_those_of_the_plain_order(
    settings: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = Chunks(monkeypatch, precision, **settings)
    assert chunks() and chunks.on_the_side
    assert chunks(), "a replay"


def test_bits_of_a_guided_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from smolvla_fast.smolvla.rtc import RTCConfig

    chunks = Chunks(monkeypatch, rtc_config=RTCConfig(execution_horizon=4))
    for policy in (chunks.plain, chunks.policy):
        policy.init_rtc_processor()
    left = torch.ones(4, 6)
    assert chunks(inference_delay=2, prev_chunk_left_over=left, execution_horizon=3) and chunks.on_the_side


def test_order_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole first step is on the side, as far as its last layer, which has nothing left to run beside."""
    chunks = Chunks(monkeypatch)
    assert chunks()
    ops = [each for each in chunks.ops[: len(chunks.ops) // 2] if each[1] != "prepare_mask"]  # of the warm-up
    assert ops == [each for each in chunks.ops[len(chunks.ops) // 2 :] if each[1] != "prepare_mask"]
    text = own = ["norm_qkv_rope", "masked_attention", "linear_residual", "norm_swiglu", "linear_residual"]
    first = next(place for place, (_, name) in enumerate(ops) if name == "rope_masks")
    turns = [
        (stream, [name for _, name in each]) for stream, each in groupby(ops[first:], lambda each: each[0])
    ]
    step = ["suffix_embed", *text * 4, "euler_step"]
    assert turns == [
        ("main", ["rope_masks"]),
        ("side", ["suffix_fold", "suffix_embed"]),
        ("main", text), ("side", own),
        ("main", text), ("side", ["cross_kv", *own]),
        ("main", text), ("side", own),
        ("main", ["norm_qkv_rope", "cross_kv", *own, "euler_step", *step]),
    ]  # fmt: skip


def test_a_block_that_is_let_go_early_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a text layer that only the side reads: the next text layer would be given their memory."""

    @contextmanager
    def without_holding(self: SideStream, *read: Any) -> Iterator[None]:
        self._side.wait_stream(self._main)
        with torch.cuda.stream(self._side):
            yield

    chunks = Chunks(monkeypatch)
    monkeypatch.setattr(SideStream, "beside", without_holding)
    with pytest.raises(Race, match="may be given memory"):
        run(chunks)


@pytest.mark.parametrize(
    ("waits", "seen"),
    [("side", "on the side stream"), ("main", "given memory .* call .* of the side stream")],
)
def test_a_missing_wait_is_a_race(waits: str, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A main stream that never waits is found as soon as it makes a tensor where the side's may still be read."""
    chunks = Chunks(monkeypatch)
    stream = chunks.streams.main if waits == "main" else chunks.streams.beside
    monkeypatch.setattr(stream, "wait_stream", lambda other: None, raising=False)
    with pytest.raises(Race, match=seen):
        run(chunks)


def test_what_crosses_is_held_until_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(monkeypatch)
    held: list[int] = []
    join = SideStream.join

    def joined(self: SideStream) -> None:
        held.append(len(self._held))
        join(self)
        assert not self._held

    monkeypatch.setattr(SideStream, "join", joined)
    assert chunks()
    assert held == [3 + 2 * 3] * 2, "masks, noise and times; keys and values of three layers; twice"


def test_a_failure_on_the_side_leaves_the_stream_current_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(monkeypatch)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if chunks.streams.current is chunks.streams.beside:
            raise ValueError("on purpose")
        return chunks.engine.products.ops.norm_swiglu(*args, **kwargs)

    chunks.engine.ops = replace(chunks.engine.ops, norm_swiglu=failing)
    try:
        run(chunks)
    except ValueError as error:
        # The traceback holds every frame of the chunk, so nothing is put right by a collection of garbage.
        assert str(error) == "on purpose" and chunks.streams.current is chunks.streams.main
    else:
        pytest.fail("nothing ran on the side")


def test_a_capture_that_fails_with_the_branch_is_tried_without(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(monkeypatch)
    own = chunks.engine.ops.norm_swiglu

    def failing(*args: Any, **kwargs: Any) -> Any:
        if chunks.streams.current is chunks.streams.beside:
            raise ValueError("on purpose")
        return own(*args, **kwargs)

    chunks.engine.ops = replace(chunks.engine.ops, norm_swiglu=failing)
    reasons = smolvla_fast.status(chunks.policy).fallback_reasons
    assert chunks() and chunks.on_the_side and "first step beside the prefix" not in reasons
    said = smolvla_fast.status(chunks.policy).fallback_reasons["first step beside the prefix"]
    assert said == "CUDA graph capture failed: ValueError: on purpose; it runs behind the prefix"
    graphs = chunks.engine.graphs
    assert graphs is not None and graphs.count == 1
    assert len(graphs.failures) == 1 and "ValueError: on purpose" in graphs.failures[0]
    chunks.ops.clear()
    assert chunks() and not chunks.ops, "a replay"
    assert chunks(batch=2) and not chunks.on_the_side and graphs.count == 2, "another shape"


def test_a_capture_that_fails_either_way_blames_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(monkeypatch)
    calls: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(chunks.streams.current.name)
        raise ValueError("on purpose")

    chunks.engine.ops = replace(chunks.engine.ops, euler_step=failing)
    for _ in range(2):
        chunk(chunks.policy, make_observation(chunks.plain), make_noise(chunks.plain))
        status = smolvla_fast.status(chunks.policy)
        assert "CUDA graph capture failed: ValueError: on purpose" in str(status.last_fallback)
        assert "first step beside the prefix" not in status.fallback_reasons
    assert calls == ["main"] * 2, "with a branch, without, and never again"


PLAIN: dict[str, Callable[[Chunks], Any]] = {
    "many rows": lambda chunks: chunks(batch=BESIDE_ROWS // chunks.plain.config.chunk_size + 1),
    "a plan": lambda chunks: (
        setattr(chunks.engine.products, "plan", Plan({FIRST_STEP: "behind_prefix"})) or chunks()
    ),
    "observed": lambda chunks: chunks.engine.act(*inputs(chunks), observe=lambda x, v: None),
    "timed": lambda chunks: stage_times(
        chunks.policy, make_observation(chunks.plain), make_noise(chunks.plain)
    ),
}


@pytest.mark.parametrize("why", PLAIN)
def test_the_plain_order(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a side is offered to what is not captured on its own: inside a captured function of a user."""
    chunks = Chunks(monkeypatch)
    with offered(chunks.streams.side):
        assert PLAIN[why](chunks) is not False
    assert chunks.ops and not chunks.on_the_side


def test_the_plain_order_of_exact_and_of_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(monkeypatch, "exact")
    assert chunks() and chunks.ops and not chunks.on_the_side
    chunks = Chunks(monkeypatch)
    ops = chunks.engine.ops
    chunks.engine.ops = replace(
        ops, denoise_persistent=lambda *given: None, why_not_persistent=lambda *given: "not on this device"
    )
    assert chunks() and chunks.ops and not chunks.on_the_side


def test_the_launch_behind_an_event_is_as_ever() -> None:
    pytest.importorskip("triton")
    from smolvla_fast.kernels import dependent_launch

    if dependent_launch.gdc_wait is None:
        pytest.skip("no programmatic dependent launch before Triton 3.4")
    launch_order.next_launch_in_order()
    found = [dependent_launch.dependent_launch(90)["DEPENDENT"] for _ in range(3)]
    assert found == [False, True, True]
    with launch_order.dependent_launches(False):
        assert not dependent_launch.dependent_launch(90)["DEPENDENT"]


@pytest.mark.parametrize("order", ["early", "in_order"])
def test_a_plan_has_launches_in_their_order(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, early = Chunks(monkeypatch), set[bool]()
    own = chunks.engine.ops.euler_step

    def euler_step(*args: Any, **kwargs: Any) -> Any:
        early.add(launch_order.take_may_begin_early())
        return own(*args, **kwargs)

    chunks.engine.ops = replace(chunks.engine.ops, euler_step=euler_step)
    chunks.engine.products.plan = Plan({LAUNCHES: order})
    assert chunks() and (True in early) is (order == "early")
    with launch_order.dependent_launches(False), launch_order.dependent_launches(True):
        assert not launch_order.take_may_begin_early()


def test_a_stream_that_a_captured_function_has_forked_has_no_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The side would wait for another stream than the one that computes."""
    streams = Streams(monkeypatch)
    with offered(streams.side):
        assert side_stream() is streams.side
        with torch.cuda.stream(streams.beside):
            assert side_stream() is None
