"""Captured chunks without a GPU: the graph cache, its keys and its end, against a driver that records on the CPU."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import RecorderDriver
from torch import nn

import smolvla_fast
from smolvla_fast import graphs, inference
from smolvla_fast.testing import make_noise, make_observation

from .conftest import chunk, make_policy

seam = smolvla_fast.patch.__globals__
TIERS = ["exact", "fp32", "bf16"]


class Captured:
    """A patched policy whose engine captures, beside a plain one with the same weights."""

    def __init__(self, precision: str = "exact", **settings: Any) -> None:
        self.plain = make_policy("tiny", **settings)
        self.policy = copy.deepcopy(self.plain)
        smolvla_fast.patch(self.policy, precision=precision, backend="torch")
        if precision != "exact":
            smolvla_fast.patch(self.plain, precision=precision, backend="torch")
            self.engine_of(self.plain).graphs = None

    @staticmethod
    def engine_of(policy: Any) -> Any:
        return seam["engine_of"](policy.model)

    @property
    def driver(self) -> RecorderDriver:
        return self.engine_of(self.policy).graphs._driver

    def same(self, **observation: Any) -> bool:
        """Whether both give the same bits for one observation."""
        kwargs = {name: observation.pop(name) for name in list(observation) if name in RTC}
        noise = make_noise(self.plain, batch=observation.get("batch", 1))
        given = make_observation(self.plain, **observation)
        return torch.equal(
            chunk(self.policy, given, noise, **kwargs), chunk(self.plain, given, noise, **kwargs)
        )

    @property
    def status(self) -> Any:
        return smolvla_fast.status(self.policy)


RTC = ("inference_delay", "prev_chunk_left_over", "execution_horizon")


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())
    monkeypatch.setitem(seam, "_CHECK_LATE", True)


@pytest.mark.parametrize("precision", TIERS)
@pytest.mark.parametrize("layout", ["fp32", "mixed"])
def test_a_replay_has_the_bits_of_a_plain_run(precision: str, layout: str) -> None:
    pair = Captured(precision, layout=layout)
    for seed in range(3):
        assert pair.same(seed=seed)
    assert (pair.driver.captures, pair.driver.replays) == (1, 3)
    assert pair.status.calls_fast == 3 and pair.status.graphs == 1 and pair.status.graph_nodes > 100


def test_each_shape_of_call_has_a_graph() -> None:
    pair = Captured(cameras=3)
    for _ in range(2):
        for observation in (dict(cameras=1), dict(cameras=3), dict(batch=2), dict(batch=5, cameras=2)):
            assert pair.same(**observation), observation
    assert pair.driver.captures == 4, "the second round captured again"
    for policy in (pair.plain, pair.policy):
        policy.config.num_steps = 3
    assert pair.same() and pair.driver.captures == 5
    assert pair.status.graphs == 5


def test_the_oldest_graph_goes_first() -> None:
    pair = Captured()
    pair.engine_of(pair.policy).graphs._capacity = 2
    for batch in (1, 2, 1, 3, 1):
        assert pair.same(batch=batch)
    assert pair.driver.captures == 3, "batch 1 was in use and must stay"
    assert pair.status.graphs == 2 and pair.driver.releases == 1
    assert pair.same(batch=2) and pair.driver.captures == 4
    assert pair.status.graph_bytes > 2 * 1000, "pool and static inputs of both"
    assert pair.status.extra_bytes >= pair.status.graph_bytes


def test_rtc_is_data() -> None:
    """Delay, horizon, length and values of the previous chunk change from call to call; the graph does not."""
    configuration = pytest.importorskip("lerobot.policies.rtc.configuration_rtc")
    pair = Captured(rtc_config=configuration.RTCConfig(execution_horizon=6))
    for policy in (pair.plain, pair.policy):
        policy.init_rtc_processor()
    assert pair.same()
    for delay, length, horizon in ((0, 8, None), (3, 8, 5), (7, 4, 9)):
        previous = torch.randn(length, 6, generator=torch.Generator().manual_seed(delay))
        assert pair.same(inference_delay=delay, prev_chunk_left_over=previous, execution_horizon=horizon)
    assert pair.driver.captures == 2, "one with guidance, one without"
    for policy in (pair.plain, pair.policy):
        policy.config.rtc_config.max_guidance_weight = 1.5
    assert pair.same(inference_delay=2, prev_chunk_left_over=torch.ones(8, 6)) and pair.driver.captures == 2


def test_prompts_of_other_lengths_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where language is padded to the configured maximum and not trimmed."""
    stage = inference.prepare_observation.__globals__
    monkeypatch.setitem(stage, "_trims", lambda device: False)
    pair = Captured("fp32")
    for length, task in ((3, "go"), (20, "pick up the cube"), (8, "push it")):
        assert pair.same(language_length=length, task=task)
    assert pair.driver.captures == 1


def _edit(policy: Any) -> Any:
    return policy.model.vlm_with_expert.lm_expert.layers[1].mlp.up_proj


def _copy_(policy: Any) -> None:
    for parameter in policy.parameters():
        parameter.data.copy_(parameter.data * 1.01)


def _load(policy: Any) -> None:
    policy.load_state_dict({name: value * 1.01 for name, value in policy.state_dict().items()})


def _step(policy: Any) -> None:
    layer = _edit(policy)
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.SGD([layer.weight], lr=0.01).step()
    layer.weight.grad = None


def _data(policy: Any) -> None:
    _edit(policy).weight.data = _edit(policy).weight.data * 1.5


def _parameter(policy: Any) -> None:
    _edit(policy).weight = nn.Parameter(_edit(policy).weight.detach() * 1.5)


def _assign(policy: Any) -> None:
    policy.load_state_dict({n: v * 1.01 for n, v in policy.state_dict().items()}, assign=True)


def _module(policy: Any) -> None:
    mlp = policy.model.vlm_with_expert.lm_expert.layers[1].mlp
    with torch.no_grad():
        new = nn.Linear(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
        new.weight.copy_(mlp.up_proj.weight * 1.5)
    mlp.up_proj = new.eval()


def _double_and_back(policy: Any) -> None:
    policy.double()
    policy.float()


def _eps(policy: Any) -> None:
    for layer in policy.model.vlm_with_expert.lm_expert.layers:
        layer.input_layernorm.variance_epsilon = 0.1


@pytest.mark.parametrize(
    ("change", "captures"),
    [(_copy_, 1), (_load, 1), (_step, 1)]
    + [(change, 2) for change in (_data, _parameter, _assign, _module, _double_and_back)]
    + [(_eps, 1)],  # another setting of a layer: another engine, with graphs of its own
)
def test_every_way_weights_change(change: Callable[[Any], None], captures: int) -> None:
    """Values in place are read live; what moves or is replaced asks for another capture. Never an old chunk."""
    pair = Captured()
    assert pair.same()
    before = chunk(pair.policy, make_observation(pair.plain), make_noise(pair.plain))
    for policy in (pair.plain, pair.policy):
        change(policy)
    assert pair.same() and pair.driver.captures == captures
    after = chunk(pair.policy, make_observation(pair.plain), make_noise(pair.plain))
    assert torch.equal(before, after) is (change is _double_and_back), "the change has no effect: no test"
    assert pair.status.calls_stock == 0


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


@pytest.mark.parametrize("fail_at", ["warmup", 0, 1, 57, 400])
def test_a_failed_capture_is_stock_once_said(fail_at: str | int, caplog: pytest.LogCaptureFixture) -> None:
    pair = Captured("fp32")
    stock = make_policy("tiny")
    pair.driver.fail_at = fail_at
    given, noise = make_observation(stock), make_noise(stock)
    with caplog.at_level(logging.WARNING, logger="smolvla_fast"):
        for _ in range(3):
            assert torch.equal(chunk(pair.policy, given, noise), chunk(stock, given, noise))
    assert len([record for record in caplog.records if "capture failed" in record.message]) == 1
    assert pair.driver.captures == (0 if fail_at == "warmup" else 1), "tried again and again"
    assert pair.driver.releases == 1 and pair.status.graphs == 0 and pair.status.calls_stock == 3
    assert "OutOfMemoryError: out of memory" in pair.status.last_fallback
    assert pair.same(batch=2) is False or pair.status.calls_stock == 4
    pair.driver.fail_at = None
    smolvla_fast.refresh(pair.policy)
    assert pair.same() and pair.status.graphs == 1


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


def test_inference_mode_and_plain_calls_share_a_graph() -> None:
    pair = Captured()
    with torch.inference_mode():
        assert pair.same()
    assert pair.same()
    with torch.inference_mode():
        assert pair.same(seed=4)
    assert pair.driver.captures == 1


def test_chunks_are_fresh_tensors() -> None:
    """A queue keeps views of a chunk while the next is computed."""
    pair = Captured()
    noise = make_noise(pair.plain)
    first = chunk(pair.policy, make_observation(pair.plain, seed=1), noise)
    kept = first.clone()
    second = chunk(pair.policy, make_observation(pair.plain, seed=2), noise)
    assert torch.equal(first, kept) and not torch.equal(first, second)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_four_threads_share_a_policy() -> None:
    pair = Captured()
    noise = make_noise(pair.plain)
    given = [make_observation(pair.plain, seed=seed, batch=1) for seed in range(4)]
    wanted = [chunk(pair.plain, each, noise) for each in given]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for _ in range(4):
            if not torch.equal(chunk(pair.policy, given[i], noise), wanted[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong and pair.driver.captures == 1 and pair.status.calls_fast == 16


def test_copies_capture_for_themselves() -> None:
    pair = Captured()
    assert pair.same()
    twin = copy.deepcopy(pair.policy)
    _parameter(twin)
    given, noise = make_observation(pair.plain), make_noise(pair.plain)
    assert not torch.equal(chunk(twin, given, noise), chunk(pair.plain, given, noise))
    assert pair.same() and pair.driver.captures == 1


@pytest.mark.parametrize("how", ["unpatch", "delete"])
def test_graphs_go_with_the_patch_or_the_policy(how: str) -> None:
    pair = Captured()
    assert pair.same()
    engine, model = weakref.ref(pair.engine_of(pair.policy)), weakref.ref(pair.policy.model)
    if how == "unpatch":
        smolvla_fast.unpatch(pair.policy)
    else:
        del pair.policy
    gc.collect()
    assert engine() is None, "captured memory outlives the patch"
    assert (model() is None) is (how == "delete")


def test_warmup_captures() -> None:
    pair = Captured()
    smolvla_fast.patch(pair.policy, precision="exact", backend="torch", warmup=True)
    assert pair.status.graphs == 1 and pair.status.calls_fast == 0
    smolvla_fast.patch(pair.policy, precision="exact", backend="torch", warmup=make_observation(pair.plain))
    assert pair.same() and pair.driver.captures <= 2


def test_reading_a_timed_or_verified_chunk_captures_nothing() -> None:
    pair = Captured("fp32")
    report = smolvla_fast.verify(pair.policy, make_observation(pair.plain))
    assert report.passed and len(report.velocity_rel_l2) == pair.policy.config.num_steps


def test_the_driver_of_a_cpu_is_none() -> None:
    assert graphs.driver_for(torch.device("cpu")) is None


def test_nothing_but_ops_runs_in_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ops a layer and one at each end of a step, and not a single torch kernel between them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from smolvla_fast.backends import select
    from smolvla_fast.ops import NAMES

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
    counting = dataclasses.replace(ops, **own, single_launch=True, leaves_to_torch=lambda *_: False)
    smolvla_fast.patch(policy, precision="fp32", backend="torch")
    engine = seam["engine_of"](policy.model)
    engine.graphs, engine.ops = None, counting
    with Between():
        chunk(policy, make_observation(policy), make_noise(policy))
    steps, layers = policy.config.num_steps, 4
    assert between == []
    assert (
        sum(counts.values()) == steps * (2 + 5 * layers) == steps * smolvla_fast.status(policy).step_launches
    )


@pytest.mark.parametrize("broken", [False, True], ids=["capture survives", "capture broken"])
def test_recording_tells_what_broke_it(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the work, not that of ending the capture; what a broken one leaves behind is undone once."""
    from smolvla_fast import cuda_driver

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
