"""The CPU suite's promises: the peer computes stock's chunk, nothing red is timed, and the report says what was missed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.measure.rounds import error
from smolvla_fast.testing import policies
from smolvla_fast.verify import FP32_BOUND

pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the policy is LeRobot's")

from benchmarks.harness import checks
from benchmarks.harness import variants as contestants
from benchmarks.harness.gate import COMPILED_BOUND, Red
from benchmarks.harness.machine import Ceilings
from benchmarks.harness.roof import Roofs
from benchmarks.harness.variants import Arena, Contestant, chunk
from benchmarks.peers import openvino as openvino_peer
from benchmarks.peers import runner
from benchmarks.report import cpu as sections
from benchmarks.report import markdown as report
from benchmarks.suites import cpu as bench_cpu
from benchmarks.suites import overhead, scaling
from smolvla_fast.testing.outliers import OUTLIER, heavy_tailed


@pytest.fixture(scope="module")
def arena() -> Arena:
    return Arena("tiny", cameras=2, steps=3)


def run_by(policy: Any, make: Any, inputs: Any) -> torch.Tensor:
    other = contestants.twin(policy)
    other.model.__dict__["sample_actions"] = make(other.model)
    return chunk(other, inputs)


@pytest.mark.parametrize("config", [{}, {"self_attn_every_n_layers": 0}, {"attention_mode": "self_attn"}])
def test_restructured_modules_compute_stocks_chunk(config: dict[str, Any]) -> None:
    policy = policies.make_policy("tiny", cameras=2, num_steps=3, **config)
    tasks = ["go", "pick up the cube"]
    inputs = policies.make_observation(policy, batch=2, task=tasks), policies.make_noise(policy, batch=2)
    ours = run_by(policy, lambda model: runner.Runner(model, runner.plain), inputs)
    # The bound of our own fp32 tier: the same sums in another order.
    assert error(ours, chunk(policy, inputs))["rel_l2"] <= FP32_BOUND


def test_openvino_computes_stocks_chunk() -> None:
    pytest.importorskip("openvino", reason="the peer is OpenVINO")
    # A self and a cross layer; each further one only costs time of its compiler.
    policy = policies.make_policy("tiny", cameras=1, num_steps=2, num_vlm_layers=2)
    made: list[Any] = []

    def make(model: Any) -> Any:
        made.append(openvino_peer.make_runner(model, "fp32", threads=1))
        return made[0]

    for seed in range(2):  # the second on what was compiled for the first
        inputs = policies.make_observation(policy, seed=seed), policies.make_noise(policy, seed=seed)
        ours = run_by(policy, lambda model: made[0] if made else make(model), inputs)
        # It may reorder every sum and replace exp, tanh and rsqrt, as a compiler may.
        assert error(ours, chunk(policy, inputs))["rel_l2"] <= COMPILED_BOUND["fp32"]
    assert set(made[0].stage_ms) == {"vision", "prefix", "denoise"} and min(made[0].stage_ms.values()) > 0


def test_twins_share_weights_and_nothing_else(arena: Arena) -> None:
    other = contestants.twin(arena.policy)
    smolvla_fast.patch(other)
    assert all(a is b for a, b in zip(arena.policy.parameters(), other.parameters(), strict=True))
    assert smolvla_fast.status(other).active and not smolvla_fast.status(arena.policy).active


def test_heavy_tails_come_and_go_without_a_trace(arena: Arena) -> None:
    model = arena.policy.model
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


def test_outliers_alone_leave_the_function_what_it_was(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smolvla_fast.testing.outliers._tails", lambda *_: None)
    inputs = arena.inputs()
    before = chunk(arena.policy, inputs)
    with heavy_tailed(arena.policy.model):
        # Fifty times a number and a fiftieth of its weight: a rounding or two each, no more than another order of sums.
        assert 0 < error(chunk(arena.policy, inputs), before)["rel_l2"] <= FP32_BOUND


def contestant(policy: Any, precision: str, kind: str = "tier") -> Contestant:
    return Contestant(precision, kind, precision, policy)


def test_gates(arena: Arena) -> None:
    inputs = [arena.inputs(seed=seed) for seed in range(2)]
    stock = [chunk(arena.policy, each) for each in inputs]
    policy = smolvla_fast.patch(contestants.twin(arena.policy))
    ours = [chunk(policy, each) for each in inputs]
    green = contestant(policy, "fp32")
    checks.check_all(green, ours, stock, inputs, None)
    assert green.runs and green.facts["backend"] in ("cpu", "torch") and green.facts["extra_bytes"] > 0
    assert green.facts["rel_l2"] <= FP32_BOUND and green.facts["cosine"] > 0.999999

    def reason(precision: str, found: list[torch.Tensor], lost: float | None, kind: str = "tier") -> str:
        tried = contestant(policy, precision, kind)
        checks.check_all(tried, found, stock, inputs, lost)
        return tried.red or ""

    assert reason("fp32", [ours[0], 1.001 * ours[1]], None).startswith("rel L2 1.0e-03, allowed 1e-05")
    assert "not finite" in reason("fp32", [ours[0], torch.full_like(ours[1], torch.nan)], None)
    wrong = [1.03 * each for each in stock]
    assert reason("int8", [stock[0], stock[1].roll(1, dims=1)], None, "peer").startswith("cosine")
    assert "2.99 of bf16 stock's error" in reason("bf16", wrong, 0.03 / 2.99, "peer")
    assert not reason("bf16", wrong, 0.03 / 1.99, "peer")
    assert "could not be run" in reason("bf16", wrong, None, "peer")
    # Green by every bound, but not the chunk that the policy computes now.
    assert "other bits" in reason("fp32", [stock[0] * (1 + 1e-6), stock[1]], None)


def test_heavy_tails_turn_only_8_bits_red(arena: Arena) -> None:
    stock = torch.randn(1, 10, 6, generator=torch.Generator().manual_seed(0))
    found = {name: contestant(None, name) for name in ("bf16", "int8")}
    for each in found.values():
        checks.check_heavy(each, stock.roll(1, dims=1), stock)
        assert each.facts["heavy_cosine"] < 0.9
    assert found["bf16"].runs and "heavy-tailed" in str(found["int8"].red)
    lost = contestant(None, "int8")
    checks.check_heavy(lost, torch.full_like(stock, torch.nan), stock)
    assert not lost.runs, "a NaN is no cosine at all"


def test_rounds_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def policy(name: str) -> Any:
        def predict_action_chunk(*_: Any, **__: Any) -> None:
            called.append(name)

        return SimpleNamespace(predict_action_chunk=predict_action_chunk, model=SimpleNamespace())

    three = [Contestant(name, "peer", "fp32", policy(name)) for name in "abc"]
    inputs = ({}, torch.zeros(1))
    bench_cpu.alternate(three, inputs, rounds=4, seconds=60)
    assert "".join(called) == "abcbcacababc" and {len(each.rounds_ms) for each in three} == {4}
    bench_cpu.alternate(three, inputs, rounds=9, seconds=0)
    assert {len(each.rounds_ms) for each in three} == {4 + bench_cpu.LEAST_ROUNDS}


def test_roofs_are_of_no_narrower_dtype() -> None:
    rates = {torch.float32: 3e11, torch.bfloat16: 1e11, torch.int8: 9e11}
    roofs = Roofs(Ceilings(rates, bytes=1e10))
    assert [roofs.best(name) for name in ("stock", "fp32", "bf16", "int8")] == [3e11, 3e11, 3e11, 9e11]
    assert Roofs(Ceilings({**rates, torch.bfloat16: 6e11}, bytes=1e10)).best("bf16") == 6e11
    assert roofs.floor_ms(3e8, 1e9, "fp32") == pytest.approx(100) and roofs.itemsize("int8") == 1


def test_overhead_is_that_of_the_engine(arena: Arena) -> None:
    policy = smolvla_fast.patch(contestants.twin(arena.policy), precision="fp32")
    inputs = arena.inputs()
    chunk(policy, inputs)
    found = overhead.outside_ops(policy, inputs, rounds=3)
    layers, steps = arena.policy.config.num_vlm_layers, 3
    assert found["op_calls"] > 5 * layers * steps and 0 < found["outside_share"] < 1
    assert found["outside_ms"] < found["sample_actions_ms"]
    counted = overhead.step_allocations(policy, inputs)
    assert counted["chunk_allocations"] > 0 == counted["step_allocations"]
    assert arena.policy.config.num_steps == steps
    status = smolvla_fast.status(policy)
    assert status.calls_stock == 0, status.last_fallback


def test_a_step_that_allocates_more_shows(arena: Arena) -> None:
    policy = smolvla_fast.patch(contestants.twin(arena.policy), precision="fp32")
    inputs = arena.inputs()
    before = overhead.step_allocations(policy, inputs)
    engine = smolvla_fast.patch.__globals__["engine_of"](policy.model)
    step = engine.ops.euler_step

    def wasteful(*args: Any) -> Any:
        torch.empty(1000)
        return step(*args)

    engine.ops = smolvla_fast.ops.table.Ops(**{**vars(engine.ops), "euler_step": wasteful})
    after = overhead.step_allocations(policy, inputs)
    assert after["step_allocations"] == before["step_allocations"] + 1
    assert after["step_bytes"] >= before["step_bytes"] + 4000


def test_scaling_checks_every_point(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scaling,
        "points",
        lambda _: [scaling.Point(*each) for each in (("cameras", 4), ("steps", 1), ("batch", 2))],
    )
    policy = smolvla_fast.patch(contestants.twin(arena.policy), precision="fp32")
    wrong = contestants.twin(arena.policy)
    wrong.model.__dict__["sample_actions"] = lambda *args, **kwargs: (
        1.1 * policy.model.sample_actions(*args, **kwargs)
    )
    tiers = [contestant(policy, "fp32"), Contestant("wrong", "tier", "fp32", wrong)]
    rows, left_out = scaling.measure(arena, arena.stock(), tiers, 2, 60, lambda _: None)
    assert not left_out and arena.policy.config.num_steps == 3
    ours = {(row["axis"], row["value"]): row for row in rows if row["variant"] == "fp32"}
    assert list(ours) == [("cameras", 4), ("steps", 1), ("batch", 2)]
    assert all(row["rounds"] == 2 and row["rel_l2"] <= FP32_BOUND for row in ours.values())
    red = [row for row in rows if row["variant"] == "wrong"]
    assert len(red) == 3 and not any("p50_ms" in row for row in red) and "rel L2" in red[0]["red"]
    assert [row["axis"] for row in rows if row["variant"] == "stock"] == ["cameras", "steps"]
    rows, left_out = scaling.measure(arena, arena.stock(), tiers, 2, -1, lambda _: None)
    assert not rows and left_out == ["cameras 4", "steps 1", "batch 2"]
    with pytest.raises(Red, match="cosine"):
        checks.check_point("int8", torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1]))


def sample(**changes: Any) -> dict[str, Any]:
    """What the suite writes, cut to what the report reads."""
    facts = {
        "machine": "Box, 2 cores", "cpu": "Box", "cpu_features": ["AVX2"], "threads": 2, "cores": 2, "load": 0.1,
        "commit": None, "date": "2026-01-01", "driver": None, "lerobot_version": "0.6.1", "torch_version": "2.11.0",
        "openvino_version": "2026.4", "instruction_level": "avx512", "torch_capability": "AVX512",
    }  # fmt: skip

    def bench(variant: str, kind: str, precision: str, ms: float, **extra: Any) -> dict[str, Any]:
        info = dict(
            suite="cpu", variant=variant, kind=kind, precision=precision, cameras=2, p50_ms=ms, p95_ms=ms + 1,
            p99_ms=ms + 2, min_ms=ms - 1, rounds=20, ratio=3000 / ms, rel_l2=4e-7, cosine=0.9999999, gate="the gate",
            share_of_floor=0.5, extra_bytes=2**20, peak_bytes=2**32, added_bytes=2**21,
            stages={"vision": ms / 2, "prefix": ms / 4, "denoise": ms / 4},
        )  # fmt: skip
        return {"group": "cpu: full size", "name": f"cpu[{variant}]", "extra_info": {**info, **extra}}

    each = dict(
        sample_actions_ms=1000.0, outside_ms=20.0, outside_share=0.02, narrow_ms=50.0, narrow_share=0.05,
        op_calls=900, step_allocations=70.0, step_bytes=2.0**21, chunk_allocations=2000,
    )  # fmt: skip
    rows = [
        {"axis": axis, "value": value, "variant": "fp32", "p50_ms": 400.0 * value}
        for axis, value in (("cameras", 1), ("cameras", 2), ("batch", 1))
    ]
    reason = {"red": True, "kind": "tier", "reason": "cosine 0.99"}
    data = {
        "machine_info": {"smolvla_fast": facts},
        "benchmarks": [
            bench("stock", "stock", "stock", 3000.0),
            bench("fp32", "tier", "fp32", 1154.0, heavy_cosine=0.99999),
            bench("bf16", "tier", "bf16", 750.0, passed_over={"bf16 products": "too slow"}),
            bench("OpenVINO fp32", "peer", "fp32", 1500.0),
        ],
        "cpu": {"not_timed": {"int8": reason}, "overhead": {"fp32": each}, "scaling": rows, "left_out": ["batch 8"]},
    }  # fmt: skip
    data["cpu"].update(changes)
    return data


def test_report(tmp_path: Path) -> None:
    written = report.write(sample(), tmp_path / "box.json")
    text = (tmp_path / "box.md").read_text()
    assert "openvino 2026.4" in text and "level avx512" in text
    assert (
        "| fp32 | 2.60x | >= 2.5x, aim 2.7x: met | rel L2 4.0e-07; cosine 1.000000, 0.999990 on heavy" in text
    )
    assert "check: the gate | 1,154 | 1,155 | 1,156 | 1,153 | 20 | 50% | 1 MiB | 4,096 MiB | 2 MiB |" in text
    assert "| bf16 | 4.00x | >= 4.5x, aim 5x: missed |" in text and "| OpenVINO fp32 | 2.00x | – |" in text
    assert "bf16, bf16 products: too slow" in text and "Against OpenVINO fp32: 1.30x at fp32" in text
    assert "**int8 is red, so it has no number**: cosine 0.99" in text
    assert "| fp32 | 577 (2.60x) | 288 (2.60x) | 288 (2.60x) |" in text
    assert "| fp32 | 1,000 | 20.0 (2.0%) | 50.0 (5.0%) | 900 | 70 | 2 MiB |" in text
    assert "met by the first, missed by the upper bound" in text and "loop: missed: 70 a step" in text
    assert "| ms by cameras | 1 | 2 |" in text and "| fp32 | 400 | 800 |" in text and "spent: batch 8" in text
    if len(written) > 1:
        assert {path.name for path in written} == {"box.md", "box.png", "box-scaling.png"}
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
        assert "(box.png)" in text and "(box-scaling.png)" in text


def test_report_of_little(tmp_path: Path) -> None:
    data = sample(scaling=[], left_out=[], overhead={}, not_timed={})
    data["benchmarks"][1]["extra_info"].update(rounds=5, min_ms=500.0)
    text = report.markdown(data)
    assert "| fp32 | 2.60x† |" in text and "| 1,154 | – | – | 500 | 5 |" in text and "† unsteady" in text
    assert "overhead" not in text and "scaling" not in text
    assert sections.target({"kind": "tier", "precision": "fp8", "ratio": 9.0}) == "–"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `bench` would have run."""
    commands: list[list[str]] = []

    def record(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("smolvla_fast.cli.bench.subprocess", SimpleNamespace(run=record))
    return commands


def test_the_command_hands_on_its_options(started: list[list[str]], tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    assert main(["bench", "--suite", "cpu", "--json", path]) == 2, "nothing was timed"
    assert started[0][1:] == ["-m", "benchmarks.suites.cpu", f"--json={path}", "--cameras=2", "--threads=2"]
    options = [
        "--cameras",
        "3",
        "--threads",
        "1",
        "--steps",
        "4",
        "--rounds",
        "5",
        "--size",
        "tiny",
        "--full",
    ]
    assert main(["bench", "ops", "cpu", *options, "--no-scaling", "--with-compile", "--json", path]) == 2
    assert [Path(word).name for word in started[1] if word.endswith(".py")] == ["ops.py"]
    given = bench_cpu.parse(started[2][3:])
    assert (given.cameras, given.threads, given.steps, given.rounds, given.size) == (3, 1, 4, 5, "tiny")
    assert given.full and given.with_compile and not given.scaling
    assert main(["bench", "--json", path]) == 2 and "benchmarks.suites.cpu" not in " ".join(started[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: suite cpu runs on the CPU; accepted are auto and cpu"),
        (["--layout", "mixed"], "--layout mixed: suite cpu compares with stock in fp32; accepted is fp32"),
        (["--cameras", "1,2"], "--cameras 1,2: suite cpu takes one count from 1 to 4"),
        (["--cameras", "5"], "--cameras 5: suite cpu takes one count from 1 to 4"),
        (["-k", "fp32"], "-k: suite cpu takes its rounds in turn"),
    ],
)
def test_the_command_refuses(
    started: list[list[str]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "--suite", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err and not started


def test_results_of_two_suites_are_joined() -> None:
    from smolvla_fast.cli.bench import _joined

    first = {"machine_info": {"cpu": {}, "smolvla_fast": {"load": 1}}, "benchmarks": [1], "version": "5"}
    second = {"machine_info": {"smolvla_fast": {"load": 2, "level": "x"}}, "benchmarks": [2], "cpu": {}}
    assert _joined(first, second) == {
        "machine_info": {"cpu": {}, "smolvla_fast": {"load": 1, "level": "x"}},
        "benchmarks": [1, 2],
        "version": "5",
        "cpu": {},
    }


@pytest.fixture
def keep_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.long
def test_a_red_engine_is_not_timed(
    keep_threads: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from smolvla_fast.inference import Engine

    act = Engine.act
    monkeypatch.setattr(Engine, "act", lambda *args, **kwargs: 1.1 * act(*args, **kwargs))
    monkeypatch.setattr(openvino_peer, "why_missing", lambda: "openvino is not installed")
    path = tmp_path / "red.json"
    options = ["--size", "tiny", "--rounds", "1", "--steps", "2", "--threads", "1"]
    assert bench_cpu.main([f"--json={path}", *options]) == 1
    data = json.loads(path.read_text())
    assert [bench["extra_info"]["variant"] for bench in data["benchmarks"]] == ["stock"]
    assert data["cpu"]["not_timed"]["fp32"]["reason"].startswith("rel L2 1.0e-01, allowed 1e-05")
    assert data["cpu"]["not_timed"]["OpenVINO fp32"]["reason"] == "openvino is not installed"
    assert not data["cpu"]["overhead"] and {row["variant"] for row in data["cpu"]["scaling"]} == {"stock"}
    assert "red, so it is not timed: fp32: rel L2" in capsys.readouterr().out
    assert "**fp32 is red, so it has no number**" in report.markdown(data)


@pytest.mark.long
@pytest.mark.slow
def test_the_whole_suite_on_a_tiny_policy(tmp_path: Path) -> None:
    path = tmp_path / "results" / "tiny.json"
    options = ["--size", "tiny", "--rounds", "2", "--steps", "2", "--threads", "1"]
    assert main(["bench", "--suite", "cpu", *options, "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    found = {bench["extra_info"]["variant"]: bench["extra_info"] for bench in data["benchmarks"]}
    assert {"stock", "fp32", "bf16"} <= set(found) and found["stock"]["ratio"] == 1
    assert found["fp32"]["rel_l2"] <= FP32_BOUND and found["fp32"]["heavy_cosine"] > 0.9999
    assert found["bf16"]["rel_l2_to_stock_bf16"] <= checks.LOSS_OF_STOCK
    assert all(each["rounds"] == 2 and each["share_of_floor"] > 0 for each in found.values())
    assert found["fp32"]["stages"]["denoise"] > 0
    if openvino_peer.why_missing() is None:
        assert found["OpenVINO fp32"]["rel_l2"] <= COMPILED_BOUND["fp32"]
    # Five ops a layer and step, of 4 layers and 2 steps, and those of the prefix and of vision.
    assert data["cpu"]["overhead"]["fp32"]["op_calls"] > 5 * 4 * 2
    values = {(row["axis"], row["value"]) for row in data["cpu"]["scaling"] if row["variant"] == "fp32"}
    assert {("cameras", 4), ("steps", 10), ("threads", 1), ("batch", 8)} <= values
    text = path.with_suffix(".md").read_text()
    assert "## CPU\n" in text and "## CPU, scaling" in text
