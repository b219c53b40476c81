"""Captured chunks without a GPU: the graph cache, its keys and its end, against a driver that records on the CPU."""

from __future__ import annotations

import gc
import itertools
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import recorder
from support.captured import Captured, recording
from support.policies import chunk, make_policy
from support.recorder import RecorderDriver
from torch import nn

import smolvla_fast
from smolvla_fast.engine import cuda_driver
from smolvla_fast.engine import cuda_graphs as graphs
from smolvla_fast.engine.side_stream import side_stream
from smolvla_fast.kernels import counters
from smolvla_fast.patch import engine_of
from smolvla_fast.patching import call_rules
from smolvla_fast.testing.policies import make_noise, make_observation

TIERS = ["exact", "fp32", "bf16"]
pytestmark = pytest.mark.usefixtures("recording")
__all__ = ["recording"]


@pytest.mark.parametrize("precision", TIERS)
@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_a_replay_has_the_bits_of_a_plain_run(precision: str, layout: str) -> None:
    pair = Captured(precision, layout=layout)
    for seed in range(3):
        assert pair.same(seed=seed)
    assert (pair.driver.captures, pair.driver.replays) == (1, 3)
    assert pair.status.calls_fast == 3 and pair.status.graphs == 1 and pair.status.graph_nodes > 100


def test_channels_last_frames_have_a_graph_of_their_own() -> None:
    """Stock convolves them in another order, whose bits ``exact`` owes."""
    pair = Captured()
    given, noise = make_observation(pair.plain), make_noise(pair.plain)
    frames = {name: x.to(memory_format=torch.channels_last) for name, x in given.items() if x.ndim == 4}
    for each in (given, given | frames, given):
        assert torch.equal(chunk(pair.policy, each, noise), chunk(pair.plain, each, noise))
    assert (pair.driver.captures, pair.driver.replays) == (2, 3)


def _edit(policy: Any) -> Any:
    return policy.model.vlm_with_expert.lm_expert.layers[1].mlp.up_proj


def _parameter(policy: Any) -> None:
    _edit(policy).weight = nn.Parameter(_edit(policy).weight.detach() * 1.5)


@pytest.mark.check(19)
def test_a_hook_sends_the_call_under_way_to_stock() -> None:
    """It is found behind the replay; the chunk is thrown away and noise is not drawn twice."""
    pair = Captured()
    assert pair.same()
    hooks = [
        policy.model.vlm_with_expert.lm_expert.norm.register_forward_hook(lambda *_: None)
        for policy in (pair.plain, pair.policy)
    ]
    given = make_observation(pair.plain)
    chunks = []
    for policy in (pair.plain, pair.policy):
        torch.manual_seed(3)
        chunks += [chunk(policy, given), chunk(policy, given)]
    assert torch.equal(chunks[0], chunks[2]) and torch.equal(chunks[1], chunks[3])
    assert pair.status.calls_stock == 2 and "hook" in pair.status.last_fallback
    for hook in hooks:
        hook.remove()
    assert pair.same() and pair.status.calls_fast == 2


def test_stale_graphs_do_not_come_back() -> None:
    """Fast, then stock while a weight moves, then fast again."""
    pair = Captured()
    assert pair.same()
    norm = pair.policy.model.vlm_with_expert.lm_expert.norm
    hook = norm.register_forward_hook(lambda *_: None)
    assert pair.same()
    for policy in (pair.plain, pair.policy):
        _parameter(policy)
    hook.remove()
    assert pair.same() and pair.driver.captures == 2


def test_waiting_for_the_device_or_host_constants_would_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder is as strict as a capture: else the tests here prove nothing."""
    for illegal in (
        lambda: torch.ones(1).item(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.ones(2).nonzero(),
    ):
        driver = RecorderDriver()
        with pytest.raises(RuntimeError, match="waits for|host constant|depends on data"):
            driver.capture(lambda illegal=illegal: (illegal(), torch.ones(1))[1])


def test_inside_a_callers_own_capture_nothing_is_captured() -> None:
    pair = Captured()
    pair.driver.capturing = True
    assert pair.same() and pair.driver.captures == 0 and pair.status.calls_fast == 1


def test_reading_a_timed_or_verified_chunk_captures_nothing() -> None:
    pair = Captured("fp32")
    report = smolvla_fast.verify(pair.policy, make_observation(pair.plain))
    assert report.passed and len(report.velocity_rel_l2) == pair.policy.config.num_steps


def test_the_driver_of_a_cpu_is_none() -> None:
    assert graphs.driver_for(torch.device("cpu")) is None


def test_nothing_but_ops_runs_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ops a layer and one at each end of a step, and not a single torch kernel between them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from smolvla_fast.ops.select import select
    from smolvla_fast.ops.table import NAMES

    ops = select("torch", torch.device("cpu"), False)
    inside = [0]
    counts: dict[str, int] = {}
    between: list[str] = []

    class Between(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            views = func.is_view or func.namespace == "prim"
            if not inside[0] and not views and watching[0]:
                between.append(str(func))
            return func(*args, **(kwargs or {}))

    watching = [False]

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(ops, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            if name == "suffix_embed":
                watching[0] = True
            counts[name] = counts.get(name, 0) + watching[0]
            inside[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                inside[0] -= 1

        return run

    import dataclasses

    policy = make_policy("tiny")
    own = {name: counted(name) for name in NAMES if getattr(ops, name) is not None}
    counting = dataclasses.replace(ops, **own, layer_launches=lambda rows: 5)
    smolvla_fast.patch(policy, precision="fp32", backend="torch")
    engine = engine_of(policy.model)
    engine.graphs, engine.ops = None, counting
    monkeypatch.setattr(call_rules, "_get_current_dispatch_mode_stack", list)  # this one only looks
    with Between():
        chunk(policy, make_observation(policy), make_noise(policy))
    steps, layers = policy.config.num_steps, 4
    assert between == []
    assert (
        sum(counts.values()) == steps * (2 + 5 * layers) == steps * smolvla_fast.status(policy).step_launches
    )


@pytest.mark.check(53)
@pytest.mark.parametrize("broken", [False, True], ids=["capture survives", "capture broken"])
def test_recording_tells_what_broke_it(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the work, not that of ending the capture; what a broken one leaves behind is undone once."""

    class Graph:
        begun = ended = 0

        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local" and pool == "pool"
            self.begun += 1

        def capture_end(self) -> None:
            self.ended += 1
            if broken:
                raise RuntimeError("operation failed due to a previous error during capture")

    mended: list[Any] = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(cuda_driver.CudaDriver, "_mend", lambda self, pool: mended.append(pool))
    driver = cuda_driver.CudaDriver(torch.device("cuda", 0))

    def fails() -> torch.Tensor:
        raise ValueError("a tile that does not fit")

    graph = Graph()
    with pytest.raises(ValueError, match="does not fit"):
        driver._record(graph, fails)  # type: ignore[arg-type]
    assert (graph.begun, graph.ended, mended) == (1, 1, ["pool"] if broken else [])
    graph = Graph()
    if broken:
        with pytest.raises(RuntimeError, match="previous error"):
            driver._record(graph, lambda: torch.ones(1))  # type: ignore[arg-type]
    else:
        assert driver._record(graph, lambda: torch.ones(1)) is not None  # type: ignore[arg-type]


def no_device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """``cuda_driver`` without a GPU: what it asks of torch is noted, and there are streams."""
    asked: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: asked.append("clear"), raising=False)
    monkeypatch.setattr(cuda_driver, "_idle", defaultdict(list))
    monkeypatch.setattr(cuda_driver, "_new_graph", SimpleNamespace)
    return asked


def test_a_stream_serves_one_graph_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So no two graphs share a cuBLAS workspace, and nobody else's is ever cleared."""
    asked, made, used = no_device(monkeypatch), itertools.count(), []
    monkeypatch.setattr(
        cuda_driver,
        "_new_stream",
        lambda _: SimpleNamespace(number=next(made), wait_stream=lambda _: used.append(1)),
    )
    on: list[int] = []
    current = [torch.cuda.current_stream()]

    def stream(s: Any) -> Any:
        on.append(s.number)
        current[0] = s
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[0])
    monkeypatch.setattr(cuda_driver.CudaDriver, "_record", lambda self, graph, run: run())
    driver = cuda_driver.CudaDriver(torch.device("cuda", 0))
    graphs_held = [driver.capture(lambda: torch.ones(1)) for _ in range(2)]
    assert on == [0, 0, 2, 2], (
        "warm-up and capture on one stream, each graph on its own and with one beside it"
    )
    graphs_held.pop(0)
    gc.collect()
    with pytest.raises(ZeroDivisionError):
        driver.capture(lambda: torch.ones(1 // 0))
    sides: list[Any] = []
    graphs_held.append(driver.capture(lambda: (sides.append(side_stream()), torch.ones(1))[1]))
    assert on[4:] == [0, 0, 0], "the stream of a graph that went, and of a capture that failed, serves again"
    assert [(side._main.number, side._side.number) for side in sides] == [
        (0, 1)
    ] * 2 and side_stream() is None
    assert "clear" not in asked and asked[0] == "synchronize"


def test_giving_memory_back_passes_over_an_error_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    no_device(monkeypatch)
    asked = []

    def fails(*_: Any) -> None:
        asked.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, fails)
    cuda_driver.CudaDriver(torch.device("cuda", 0)).release()
    assert len(asked) == 2


def cache_of(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A cache over the recorder, and a chunk whose launch takes counters as a split-K launch on a GPU does."""
    zeros = torch.zeros
    stream = SimpleNamespace(cuda_stream=1, synchronize=lambda: None)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recorder._under_way))
    monkeypatch.setattr(counters, "_of_device", {})

    def compute(inputs: list[torch.Tensor]) -> Any:
        assert counters.arrivals(300, torch.device("cuda", 0)) is not None, "a launch would zero its own"
        return inputs[0] + 1, None

    return graphs.GraphCache(RecorderDriver(), capacity=2), compute


def test_counters_come_back_with_their_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a policy is captured anew: evicted, refreshed, dropped, failed."""
    cache, compute = cache_of(monkeypatch)
    monkeypatch.setattr(counters.Counters, "NUMBER", 2048)  # 1024 of the stream, and three graphs'
    for size in range(1, 20):
        cache.run("evicted", [torch.ones(size)], compute)
    for _ in range(10):
        cache.run("refreshed", [torch.ones(1)], compute)
        cache.clear()
    for _ in range(10):
        graphs.GraphCache(RecorderDriver()).run("dropped", [torch.ones(1)], compute)
    held = counters._of_device[0]
    assert held.used == 1024 + 3 * 320 and sum(map(len, held.returned.values())) == 3
    failing = graphs.GraphCache(RecorderDriver(fail_at=0))
    for size in range(1, 20):
        with pytest.raises(graphs.CaptureFailed):
            failing.run("failed", [torch.ones(size)], compute)
    assert sum(map(len, held.returned.values())) == 3


def test_a_failed_capture_keeps_its_traceback_and_names_the_kernel() -> None:
    source = "@triton.jit\ndef _norm_swiglu(x, N: tl.constexpr):\n    tl.dot(x, x)\n"

    class CompilationError(Exception):
        src, error_message = source, "input and other must have equal ranks"

    def broken(inputs: list[torch.Tensor]) -> Any:
        raise CompilationError(f"at 3:4:\n{source}")

    cache = graphs.GraphCache(RecorderDriver())
    for _ in range(2):  # the second time without a try
        with pytest.raises(graphs.CaptureFailed) as failure:
            cache.run("a", [torch.ones(1)], broken)
        said = "CompilationError in _norm_swiglu: input and other must have equal ranks"
        assert str(failure.value) == f"CUDA graph capture failed: {said}"
        assert "in broken" in failure.value.details and "Traceback" in failure.value.details
    assert cache.failures == [failure.value.details]
    cache.clear()
    assert cache.failures == []
