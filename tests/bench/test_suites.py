"""The suites' own pieces: stock is held to other code, peers compute stock's chunk, weights with tails leave no trace."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import pytest
import torch

import smolvla_fast
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure.rounds import error
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int16
from smolvla_fast.testing import policies
from smolvla_fast.verify import FP32_BOUND

pytest.importorskip("pytest_benchmark")
pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the policy is LeRobot's")

from benchmarks.harness import gate
from benchmarks.harness.gate import COMPILED_BOUND, CheckFailed, act
from benchmarks.harness.outliers import OUTLIER, heavy_tailed
from benchmarks.harness.roof import Ceilings
from benchmarks.harness.setup import BenchmarkSetup, Case, twin
from benchmarks.peers import openvino as openvino_peer
from benchmarks.report import markdown
from benchmarks.suites import cpu as cpu_suite

ROOT = Path(__file__).resolve().parents[2]
NARROW = [name for name, tier in TIERS.items() if tier.quantized]
CEILINGS = Ceilings({"float32": 1e12, "bfloat16": 1e12, "int8": 1e12}, 1e10)
TINY = ("--device=cpu", "--size=tiny", "--steps=2", "--rounds=2", "--threads=1")


@pytest.fixture(scope="module")
def setup() -> BenchmarkSetup:
    return BenchmarkSetup(torch.device("cpu"), CEILINGS, "tiny", steps=3)


def run_suites(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The suites in this process, where torch and LeRobot are loaded; exit status and result."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    quiet = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "benchmarks.harness.plugin",
        "--benchmark-quiet",
    ]
    status = pytest.main([*arguments, *quiet, f"--rootdir={ROOT}", *TINY, f"--results={path}"])
    return int(status), json.loads(path.read_text())


def run_by(policy: Any, make: Any, inputs: Any) -> torch.Tensor:
    other = twin(policy)
    other.model.__dict__["sample_actions"] = make(other.model)
    return act(other, inputs)


ALONE = "SMOLVLA_FAST_OPENVINO_ALONE"


def plainly(module: torch.nn.Module, example: Any) -> Any:
    """Torch itself in OpenVINO's place."""

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    return run


@pytest.mark.parametrize("config", [{}, {"self_attn_every_n_layers": 0}, {"attention_mode": "self_attn"}])
def test_what_openvino_is_given_computes_stocks_chunk(config: dict[str, Any]) -> None:
    policy = policies.make_policy("tiny", cameras=2, num_steps=3, **config)
    tasks = ["go", "pick up the cube"]
    inputs = policies.make_observation(policy, batch=2, task=tasks), policies.make_noise(policy, batch=2)
    ours = run_by(policy, lambda model: openvino_peer.Runner(model, plainly), inputs)
    # The bound of our own fp32 tier: the same sums in another order.
    assert error(ours, act(policy, inputs))["rel_l2"] <= FP32_BOUND


@pytest.mark.long
def test_openvino_computes_stocks_chunk() -> None:
    if openvino_peer.why_missing():
        pytest.skip(str(openvino_peer.why_missing()))
    if (
        ALONE not in os.environ
    ):  # a process that has OpenVINO's threads and is forked later, to read data, may crash
        test = f"{__file__}::test_openvino_computes_stocks_chunk"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", test]
        done = subprocess.run(command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        return
    # A self and a cross layer; each further one only costs time of its compiler.
    policy = policies.make_policy("tiny", cameras=1, num_steps=2, num_vlm_layers=2)
    made: list[Any] = []

    def make(model: Any) -> Any:
        made.append(openvino_peer.Runner(model, openvino_peer.compile_for_cpu("fp32", threads=1)))
        return made[0]

    for seed in range(2):  # the second on what was compiled for the first
        inputs = policies.make_observation(policy, seed=seed), policies.make_noise(policy, seed=seed)
        ours = run_by(policy, lambda model: made[0] if made else make(model), inputs)
        # It may reorder every sum and replace exp, tanh and rsqrt, as a compiler may.
        assert error(ours, act(policy, inputs))["rel_l2"] <= COMPILED_BOUND["fp32"]
    other = twin(policy)
    other.model.__dict__["sample_actions"] = made[0]
    # The best of several: what else runs on the machine counts as the rest.
    every = [stage_times(other, *inputs) for _ in range(7)]
    times = {stage: min(each[stage] for each in every) for stage in every[0]}
    assert min(times[stage] for stage in ("vision", "prefix", "denoise")) > 0.5 * times["other"] / 3
    # What it compiled is let go of; a signal, such as the alarm of the next time limit, still finds its stack.
    del other.model.__dict__["sample_actions"]
    made.clear()
    gc.collect()
    signals: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: signals.append(number))
    signal.raise_signal(signal.SIGALRM)
    signal.signal(signal.SIGALRM, before)
    assert signals == [signal.SIGALRM]


def test_twins_share_weights_and_nothing_else(setup: BenchmarkSetup) -> None:
    other = twin(setup.policy)
    smolvla_fast.patch(other)
    assert all(a is b for a, b in zip(setup.policy.parameters(), other.parameters(), strict=True))
    assert smolvla_fast.status(other).active and not smolvla_fast.status(setup.policy).active


def test_heavy_tails_come_and_go_without_a_trace(setup: BenchmarkSetup) -> None:
    model = setup.policy.model
    layer = model.vlm_with_expert.get_vlm_model().text_model.layers[0]
    weight = layer.mlp.up_proj.weight
    saved = copy.deepcopy(model.state_dict())

    def kurtosis() -> float:
        return float((weight.double() ** 4).mean() / (weight.double() ** 2).mean() ** 2)

    before, spread = kurtosis(), float(weight.detach().std())
    with heavy_tailed(model):
        # Of normal values 3; the fourth moment of t with 4 degrees is infinite, so a sample's is far above.
        assert before < 3.5 and kurtosis() > 5
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.2)
        assert float(layer.input_layernorm.weight.abs().max()) > 0.3 * OUTLIER
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_outliers_alone_leave_the_function_what_it_was(
    setup: BenchmarkSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.outliers._tails", lambda *_: None)
    inputs = setup.inputs(2)
    before = act(setup.policy, inputs)
    with heavy_tailed(setup.policy.model):
        # Fifty times a number and a fiftieth of its weight: a rounding or two each, no more than another order of sums.
        assert 0 < error(act(setup.policy, inputs), before)["rel_l2"] <= FP32_BOUND


def test_overhead_is_that_of_the_engine(setup: BenchmarkSetup) -> None:
    policy = smolvla_fast.patch(twin(setup.policy), precision="fp32")
    inputs = setup.inputs(2)
    act(policy, inputs)
    found = cpu_suite.outside_ops(policy, inputs, 3)
    layers, steps = setup.policy.config.num_vlm_layers, 3
    assert found["op_calls"] > 5 * layers * steps and 0 < found["outside_share"] < 1
    assert found["outside_ms"] < found["sample_actions_ms"]
    counted = cpu_suite.step_allocations(policy, inputs)
    assert counted["chunk_allocations"] > 0 == counted["step_allocations"]
    assert setup.policy.config.num_steps == steps
    status = smolvla_fast.status(policy)
    assert status.calls_stock == 0, status.last_fallback


@pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built")
def test_attention_of_a_tier_of_integers_is_no_overhead(
    setup: BenchmarkSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the table's, and counts as an op all the same."""
    monkeypatch.setattr(int16, "why_slow", lambda: None)  # fp32 would serve
    calls = []
    for precision in ("fp32", "int16"):
        policy = smolvla_fast.patch(twin(setup.policy), precision=precision, backend="cpu")
        calls.append(cpu_suite.outside_ops(policy, setup.inputs(2), 1)["op_calls"])
    assert calls[0] == calls[1]


def test_a_step_that_allocates_more_shows(setup: BenchmarkSetup) -> None:
    policy = smolvla_fast.patch(twin(setup.policy), precision="fp32")
    inputs = setup.inputs(2)
    before = cpu_suite.step_allocations(policy, inputs)
    engine = smolvla_fast.patch.__globals__["engine_of"](policy.model)
    step = engine.ops.euler_step

    def wasteful(*args: Any, **kwargs: Any) -> Any:
        torch.empty(1000)
        return step(*args, **kwargs)

    engine.ops = smolvla_fast.ops.table.Ops(**{**vars(engine.ops), "euler_step": wasteful})
    after = cpu_suite.step_allocations(policy, inputs)
    assert after["step_allocations"] == before["step_allocations"] + 1
    assert after["step_bytes"] >= before["step_bytes"] + 4000


def test_stock_is_held_to_other_code(setup: BenchmarkSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called stock and is not, on every observation alike, agrees with itself."""
    case = Case(2)
    facts = setup.stock(case).check()
    assert facts["rel_l2"] <= facts["bound"] == COMPILED_BOUND["fp32"] and "plain PyTorch" in facts["against"]
    other = BenchmarkSetup(torch.device("cpu"), CEILINGS, "tiny", steps=3)
    sample = type(other.policy.model).sample_actions
    monkeypatch.setattr(
        type(other.policy.model), "sample_actions", lambda *args, **kw: 1.1 * sample(*args, **kw)
    )
    with pytest.raises(CheckFailed, match="rel L2 1.0e-01, allowed 1e-04"):
        other.stock(case).check()


def test_gates(setup: BenchmarkSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, observations=2)
    inputs, stock = setup.every(case), setup.stock_chunks(case)
    policy = smolvla_fast.patch(twin(setup.policy))
    ours = [act(policy, each) for each in inputs]
    green = gate.check_tier(setup, policy, "fp32", case, ours)
    assert green["backend"] in ("cpu", "torch") and green["extra_bytes"] > 0
    assert green["rel_l2"] <= FP32_BOUND == green["bound"] and green["cosine"] > 0.999999

    def tier(found: list[torch.Tensor]) -> Any:
        return gate.check_tier(setup, policy, "fp32", case, found)

    def reason(found: list[torch.Tensor], check: Any = tier) -> str:
        with pytest.raises(CheckFailed) as failed:
            check(found)
        return str(failed.value)

    def peer(precision: str, lost: float | None = None) -> Any:
        def check(found: list[torch.Tensor]) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(setup, "lost", {} if lost is None else {case: lost})
                return gate.check_peer(setup, policy, precision, case, found)

        return check

    assert reason([ours[0], 1.001 * ours[1]]).startswith("rel L2 1.0e-03, allowed 1e-05")
    assert "not finite" in reason([ours[0], torch.full_like(ours[1], torch.nan)])
    # Right by every bound, but not the chunk that the policy computes now.
    assert "other bits" in reason([stock[0] * (1 + 1e-6), stock[1]])
    assert "cosine 1.00000" in reason([1.5 * each for each in stock], peer("int8")), "a cosine sees no scale"
    wrong = [1.03 * each for each in stock]
    assert reason([stock[0], stock[1].roll(1, dims=1)], peer("int8")).startswith("cosine")
    assert "2.99 of bf16 stock's error" in reason(wrong, peer("bf16", 0.03 / 2.99))
    assert "could not be run" in reason(wrong, peer("bf16"))
    assert peer("bf16", 0.03 / 1.99)(wrong)["rel_l2_to_stock_bf16"] == pytest.approx(1.99, rel=1e-4)
    with pytest.raises(CheckFailed, match="bits differ"):
        gate.within(gate.compare(stock[0] * (1 + 1e-6), stock[0]), 0.0)
    setup.policy.model.action_out_proj.register_forward_hook(lambda *_: None)
    try:
        act(policy, inputs[0])
        with pytest.raises(CheckFailed, match="stock ran in its place: .*forward hook"):
            gate.check_late(policy)
    finally:
        setup.policy.model.action_out_proj._forward_hooks.clear()


def test_a_point_of_the_curves_is_checked(setup: BenchmarkSetup) -> None:
    """The first and the last sample of a batch, against stock's of each alone."""
    case = Case(2, batch=3)
    stock = act(setup.policy, setup.inputs(2, batch=3))

    def check(precision: str, found: torch.Tensor) -> Any:
        return gate.check_point(setup, None, precision, case, [found])

    assert check("fp32", stock)["rel_l2"] <= FP32_BOUND
    turned = torch.cat([stock[:2], stock[2:].roll(1, dims=1)])
    for precision, found, reason in (
        ("int8", turned, "cosine"),
        ("int16", 1.05 * stock, "rel L2 0.05, allowed 0.028"),
        ("fp32", turned, "rel L2"),
        ("bf16", 1.1 * stock, "rel L2"),
    ):
        with pytest.raises(CheckFailed, match=reason):
            check(precision, found)
    other = setup.policy.config.num_steps - 1
    with patched.object(setup.policy.config, "num_steps", other), pytest.raises(CheckFailed, match="rel L2"):
        check("fp32", stock)


def test_a_tier_is_held_to_its_own_promise() -> None:
    stock = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    across = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(1))
    across = across - (across * stock).sum() / (stock * stock).sum() * stock
    for cosine, kept in ((0.98, set()), (0.995, {"fp8"}), (0.9995, {"fp8", "int8"}), (0.99995, set(NARROW))):
        found = cosine * stock + (1 - cosine**2) ** 0.5 * stock.norm() / across.norm() * across
        for name in NARROW:
            for check in (
                partial(gate.aligned, gate.compare(found, stock), name),
                partial(gate.check_heavy, {"precision": name}, found, stock, "full"),
            ):
                with nullcontext() if name in kept else pytest.raises(CheckFailed, match="cosine"):
                    check()


def test_heavy_tails_fail_only_8_bits() -> None:
    stock = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0))
    facts = {"precision": "bf16"}
    gate.check_heavy(facts, stock.roll(1, dims=1), stock, "full")
    assert facts["heavy_cosine"] < 0.9
    for found in (stock.roll(1, dims=1), torch.full_like(stock, torch.nan)):
        with pytest.raises(CheckFailed, match="heavy-tailed"):
            gate.check_heavy({"precision": "int8"}, found, stock, "tiny")
    nearly = stock + 0.05 * stock.roll(1, dims=1)  # cosine 0.9987: enough for rows of 48 columns alone
    gate.check_heavy({"precision": "int8"}, nearly, stock, "tiny")
    with pytest.raises(CheckFailed, match="at least 0.999"):
        gate.check_heavy({"precision": "int8"}, nearly, stock, "full")


@pytest.mark.long
@pytest.mark.check(62)
def test_chunk_stages_and_ops_on_a_tiny_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [f"benchmarks/suites/{name}.py" for name in ("chunk", "stages", "ops")]
    # One op, one camera; of two backends the loop. int8 depends on the processor.
    choose = "stock or exact or fp32 or bf16-torch or bf16-cpu or test_denoise or euler_step and not triton"
    flags = ["--cameras=1", "--batch=1,2", "--layout=mixed", f"--choose={choose}"]
    status, data = run_suites(tmp_path / "a.json", monkeypatch, *files, *flags)
    assert status == 0 and not data["red"] and not data["interrupted"] and not data["left_out"]
    found = {(b["group"], b["extra_info"]["variant"]): b for b in data["benchmarks"]}
    chunks = {v: b["extra_info"] for (g, v), b in found.items() if g.startswith("chunk") and "batch 2" in g}
    assert (
        list(chunks) == ["stock", "exact", "fp32"]
        and chunks["exact"]["bound"] == chunks["exact"]["max_abs"] == 0
    )
    assert chunks["stock"]["ratio"] == 1 and chunks["fp32"]["floor_ms"] > 0 and chunks["fp32"]["batch"] == 2
    by_stage = [b["extra_info"] for (g, v), b in found.items() if g.startswith("stages") and v == "fp32"]
    assert set(by_stage[0]["stages"]) == {"vision", "prefix", "denoise", "other", "total"}
    assert by_stage[0]["stages"]["denoise"]["share_of_floor"] > 0 and len(by_stage[0]["stage_rounds_ms"]) == 2
    loops = [b["extra_info"] for b in data["benchmarks"] if "loop_backend" in b["extra_info"]]
    assert [each["batch"] for each in loops] == [1] * (len(loops) // 2) + [2] * (len(loops) // 2) and loops
    assert {b["extra_info"]["op"] for b in data["benchmarks"] if b["group"].startswith("op")} == {
        "euler_step"
    }
    text = markdown.markdown({**data, "kind": "gpu-report", "rehearsal": True})
    assert all(title in text for title in ("## Chunk", "## Stages", "## Denoise loop", "## Ops"))
    for bench in data["benchmarks"]:
        assert (
            len(bench["stats"]["data"]) == bench["extra_info"]["rounds"] == 2
            and bench["extra_info"]["p50_ms"] > 0
        )


def test_a_wrong_engine_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And costs stock none; of the curves, whose points are checked apart, only stock's are left."""
    from smolvla_fast.inference import Engine

    real = Engine.act
    monkeypatch.setattr(Engine, "act", lambda *args, **kwargs: 1.1 * real(*args, **kwargs))
    monkeypatch.setattr(cpu_suite, "AXES", {"cameras": (1,), "batch": (2,)})
    files, flags = ["benchmarks/suites/cpu.py"], ["--choose=stock or fp32 and not OpenVINO"]
    status, data = run_suites(tmp_path / "a.json", monkeypatch, *files, *flags)
    assert status == 1 and {b["extra_info"]["variant"] for b in data["benchmarks"]} == {"stock"}
    assert {each["variant"] for each in data["red"]} == {"fp32"} and len(data["red"]) == 1
    assert "rel L2 1.0e-01" in data["red"][0]["reason"]


def test_compiled_stock_is_timed_beside_stock_and_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how) or function)
    monkeypatch.setattr(cpu_suite, "AXES", {"steps": (1,)})
    files, flags = (
        ["benchmarks/suites/cpu.py"],
        ["--with-compile", "--choose=compiled or fp32 and not OpenVINO"],
    )
    status, data = run_suites(tmp_path / "a.json", monkeypatch, *files, *flags)
    rows = [each for each in data["benchmarks"] if each["extra_info"].get("beside")]
    assert status == 0 and asked == [{"mode": "default"}]
    assert [each["extra_info"]["variant"] for each in rows] == ["stock", "fp32", "stock compiled"]
    assert all(each["extra_info"]["ratio"] > 0 and each["group"] == rows[0]["group"] for each in rows)
    assert len(data["benchmarks"]) == len(rows) + 2, "fp32 among the tiers, and a point"


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_cpu_suite_on_a_tiny_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = run_suites(tmp_path / "a.json", monkeypatch, "benchmarks/suites/cpu.py")
    found = {
        b["extra_info"]["variant"]: b["extra_info"]
        for b in data["benchmarks"]
        if b["group"].startswith("cpu") and "beside" not in b["extra_info"]
    }
    assert found.pop("roof")["best_ms"] > 0 and all(each["share_in_turn"] > 0 for each in found.values())
    assert {"stock", "fp32", "bf16"} <= set(found) and found["stock"]["ratio"] == 1
    assert found["fp32"]["rel_l2"] <= FP32_BOUND and found["fp32"]["heavy_cosine"] > 0.9999
    assert found["bf16"]["gate"].startswith("verify: rel L2")
    assert all(each["rounds"] == 2 and each["share_of_floor"] > 0 for each in found.values())
    assert found["fp32"]["stages"]["denoise"]["p50_ms"] > 0
    if openvino_peer.why_missing() is None:
        assert found["OpenVINO fp32"]["rel_l2"] <= COMPILED_BOUND["fp32"]
    # Five ops a layer and step, of 4 layers and 2 steps, and those of the prefix and of vision.
    assert found["fp32"]["overhead"]["op_calls"] > 5 * 4 * 2
    points = [b["extra_info"] for b in data["benchmarks"] if b["extra_info"]["suite"] == "scaling"]
    values = {(each["axis"], each["value"]) for each in points if each["variant"] == "fp32"}
    assert {("cameras", 4), ("steps", 10), ("threads", 1), ("batch", 8)} <= values


def test_latency_alone_and_beside_cameras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round beside cameras decodes frames, and ends its threads."""
    from benchmarks.suites import latency

    decoded: list[int] = []
    decode = latency.cv2.imdecode
    monkeypatch.setattr(latency.cv2, "imdecode", lambda *given: decoded.append(1) or decode(*given))
    before = threading.active_count()
    flags = ("-k", "latency", "--choose", "fp32")
    status, data = run_suites(tmp_path / "a.json", monkeypatch, "benchmarks/suites/latency.py", *flags)
    rows = {each["extra_info"]["variant"]: each["extra_info"] for each in data["benchmarks"]}
    assert status == 0 and rows.keys() == {"fp32", "fp32 beside 2 cameras"}
    assert rows["fp32 beside 2 cameras"]["ratio_to"] == "fp32" and all(
        each["rounds"] == 2 for each in rows.values()
    )
    assert decoded
    assert threading.active_count() == before
    assert "## Latency" in markdown.markdown(data)
