"""The harness's promises: no number without a check, rounds in turn, an end in time, and what was measured is kept."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks.harness import roof, run
from benchmarks.harness.gate import CheckFailed, Unavailable
from benchmarks.harness.measure import (
    LEAST_ROUNDS,
    LEAST_SECONDS,
    Measure,
    Variant,
    derive,
    limited,
)
from benchmarks.harness.roof import Ceilings
from benchmarks.harness.run import Ended, Part
from smolvla_fast.cli import main
from smolvla_fast.ops.reference import Cost

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def measure(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """With pytest-benchmark's own fixture, and a list of its own for what it records."""
    benchmark._mode = "in a test"
    recorded: list[Any] = []
    monkeypatch.setattr(benchmark, "_add_stats", recorded.append)
    session = SimpleNamespace(benchmarks=recorded)
    config: Any = SimpleNamespace(
        hook=SimpleNamespace(pytest_benchmark_generate_json=written), _benchmarksession=session
    )
    found = Measure(config, None, {}, 60.0, "")
    found.benchmark = benchmark
    return found


def written(benchmarks: list[Any], **_: Any) -> dict[str, Any]:
    return {"benchmarks": [each.as_dict() for each in benchmarks if not each.has_error]}


def variant(name: str, called: list[str], check: Any = dict, fails: int = 0, policy: Any = None) -> Variant:
    def round_() -> None:
        called.append(name)
        if called.count(name) == fails:
            raise RuntimeError("CUDA error\nmore")

    return Variant(name, check, round_, policy=policy, facts={"variant": name, "ratio_to": "a"})


def numbers(measure: Measure) -> dict[str, Any]:
    return {each["extra_info"]["variant"]: each["extra_info"] for each in measure.data()["benchmarks"]}


def test_rounds_are_taken_in_turn(measure: Measure) -> None:
    called: list[str] = []
    measure("g", [variant(name, called) for name in "abc"], rounds=4, suite="s")
    assert "".join(called) == "abcbcacababc"
    found = numbers(measure)
    assert {name: each["rounds"] for name, each in found.items()} == dict(a=4, b=4, c=4)
    assert (
        found["a"]["ratio"] == 1
        and found["b"]["suite"] == "s"
        and found["b"]["p99_ms"] >= found["b"]["p50_ms"] > 0
    )


def test_what_fails_has_no_number_and_costs_no_other(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(policy: str) -> None:
        raise CheckFailed(policy)

    monkeypatch.setattr("benchmarks.harness.measure.check_late", late)

    def wrong() -> Any:
        raise CheckFailed("off by one")

    def missing() -> Any:
        raise Unavailable("no GPU")

    called: list[str] = []
    variants = [
        variant("a", called), variant("wrong", called, wrong), variant("missing", called, missing),
        variant("breaks", called, fails=2), variant("late", called, policy="stock ran in its place"),
    ]  # fmt: skip
    measure("g", variants, rounds=3)
    assert "wrong" not in called and list(numbers(measure)) == ["a"]
    reasons = {each["variant"]: each["reason"] for each in measure.red}
    assert reasons == dict(
        wrong="off by one", breaks="RuntimeError: CUDA error", late="stock ran in its place"
    )
    assert [each["reason"] for each in measure.skipped] == ["no GPU"]


def test_rounds_and_preparations_end_in_time(measure: Measure) -> None:
    called: list[str] = []
    measure.end, measure.cases = time.perf_counter() + 1.0, 2
    slow = variant("slow", called, check=lambda: time.sleep(5) or {})
    start = time.perf_counter()
    # Of one second all is this case's, for that is less than LEAST_SECONDS, and of that 0.6 are for preparing.
    measure("g", [variant("a", called), slow, variant("behind", called)], rounds=10**9)
    assert (
        time.perf_counter() - start < 2
        and list(numbers(measure)) == ["a"]
        and called.count("a") > LEAST_ROUNDS
    )
    assert [each.split(",")[0] for each in measure.left_out] == ["slow", "behind"]
    assert "its preparation took more than" in measure.left_out[0]
    measure.end = 0.0
    with pytest.raises(pytest.skip.Exception, match="no time"):
        measure("late", [variant("a", called)], rounds=1)
    assert measure.left_out[-1] == "late: no time was left"


def test_a_case_has_its_share_of_the_time_and_no_less_than_the_least() -> None:
    measure = Measure(None, None, {}, 600.0, "")
    measure.cases = 60
    assert measure.next_case(None) == pytest.approx(LEAST_SECONDS)
    assert measure.next_case(0.5) == pytest.approx(300, abs=5)
    measure.cases = 2
    assert measure.next_case(None) == pytest.approx(300, abs=5)
    measure.end -= 590
    assert 0 < measure.next_case(None) < 10


def test_a_result_names_files_from_the_repository_on() -> None:
    ended = run.execute(
        [sys.executable, "-c", "import os; print(os.getcwd() + '/benchmarks/a.py')"], 60, dict(os.environ)
    )
    assert ended.status == 0 and ended.tail == ["benchmarks/a.py"]


def test_limits_nest_into_nothing_else() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with limited(60):
        pass
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_k_chooses_variants(measure: Measure) -> None:
    called: list[str] = []
    measure.choose = "fp32 and not openvino"
    measure("g", [variant(name, called) for name in ("stock", "fp32", "OpenVINO fp32")], rounds=1)
    assert called == ["fp32"] and "ratio" not in numbers(measure)["fp32"], "there is nothing to compare with"


def test_figures_follow_from_raw_rounds() -> None:
    def bench(name: str, ms: list[float], **info: Any) -> dict[str, Any]:
        facts = {"variant": name, "ratio_to": "stock", **info}
        return {"group": "g", "extra_info": facts, "stats": {"data": [1e-3 * each for each in ms]}}

    rounds = [{"vision": each, "total": 2 * each} for each in (1.0, 2.0, 3.0)]
    found = [
        bench("stock", [30, 20, 40]), bench("fp32", [10, 20, 40, 7], floor_ms=6.0),
        bench("op", [float(each) for each in range(1, 102)], calls_a_round=2, flops=1e6, bytes=1e3),
        bench("stages", [1], stage_rounds_ms=rounds, stage_floors={"vision": {"floor_ms": 1.0}}),
        bench("gpu", [9], floor_ms=1.0, device_ms={"p50_ms": 4.0}),
        bench("roof", [4, 8, 12, 99], best_ms=2.0, calls_a_round=2),
    ]  # fmt: skip
    derive(found)
    stock, fp32, op, stages, gpu, _ = (each["extra_info"] for each in found)
    assert fp32["ratio"] == pytest.approx(1.0)  # 3, 1, 1 side by side; medians alone would say 2
    assert (
        fp32["share_of_floor"] == pytest.approx(0.4) and stock["ratio"] == 1 and "share_of_floor" not in stock
    )
    # 6/10, 12/20, 18/40 and more: the roof's product took 2, 4, 6 ms a call in those rounds and 2 at best.
    assert fp32["share_in_turn"] == pytest.approx(0.6) and "share_in_turn" not in stock
    assert [op[f"p{p}_ms"] for p in (50, 95, 99)] == pytest.approx([25.5, 48.0, 50.0])
    assert op["gflops_per_s"] == pytest.approx(1e6 / 25.5 / 1e6)
    assert stages["stages"]["vision"]["share_of_floor"] == 0.5 and stages["stages"]["total"]["p50_ms"] == 4.0
    assert gpu["share_of_floor"] == 0.25


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    ceilings = Ceilings({"float32": 1e12, "bfloat16": 4e12}, 1e10)
    assert ceilings.floor(Cost(2e9, 1e6), torch.float32)["floor_ms"] == pytest.approx(2.0)
    assert ceilings.floor(Cost(2e9, 1e6), torch.bfloat16)["floor_ms"] == pytest.approx(0.5)
    assert ceilings.floor(Cost(2e9, 1e8), torch.float32)["floor_ms"] == pytest.approx(10.0)
    rates = {"float32": 3e11, "bfloat16": 1e11, "int8": 9e11}
    assert [Ceilings(rates, 1e10).best(getattr(torch, name)) for name in rates] == [3e11, 3e11, 9e11], (
        "of no narrower dtype"
    )
    slow = Ceilings({"float32": 1e12, "bfloat16": 1e11}, 1e10)  # there fp32 serves bf16
    assert slow.floor(Cost(2e9, 1e6), torch.bfloat16)["floor_ms"] == pytest.approx(2.0)


def test_stage_costs_at_full_size() -> None:
    """The design's figures: vision 428 GFLOP, prefix 55 GFLOP / 298 MB, a denoise step 10.3 GFLOP / 198 MB."""
    from benchmarks.harness.roof import stage_costs

    found = stage_costs(full_size_model(), cameras=2, language=48, itemsize=2)
    # 2 %: the design rounds, and leaves the patch embedding out.
    assert found["vision"].flops == pytest.approx(428e9, rel=0.02)
    assert found["prefix"].flops == pytest.approx(55e9, rel=0.02)
    assert found["prefix"].bytes == pytest.approx(298e6, rel=0.02)
    assert found["denoise"].flops / 10 == pytest.approx(10.3e9, rel=0.02)
    assert found["denoise"].bytes / 10 == pytest.approx(198e6, rel=0.03)


def full_size_model() -> Any:
    """The shapes of the full-size model, without its memory."""

    def weight(*shape: int) -> Any:
        return SimpleNamespace(weight=torch.empty(shape, device="meta"))

    def space(**fields: Any) -> Any:
        return SimpleNamespace(**fields)

    text = space(
        self_attn=space(head_dim=64, q_proj=weight(960, 960)),
        mlp=space(gate_proj=weight(2560, 960)),
    )
    expert = space(mlp=space(gate_proj=weight(2048, 720)))
    tower = space(self_attn=space(num_heads=12), mlp=space(fc1=weight(3072, 768)))
    vlm = space(
        text_model=space(layers=[text] * 16),
        vision_model=space(
            embeddings=space(image_size=512, patch_size=16),
            encoder=space(layers=[tower] * 12),
            post_layernorm=weight(768),
        ),
        connector=space(scale_factor=4),
    )
    pair = space(
        get_vlm_model=lambda: vlm,
        lm_expert=space(layers=[expert] * 16, norm=weight(720)),
        num_attention_heads=15,
        num_key_value_heads=5,
        attention_mode="cross_attn",
        self_attn_every_n_layers=2,
    )
    return space(
        vlm_with_expert=pair,
        action_in_proj=weight(720, 32),
        state_proj=weight(960, 32),
        config=space(chunk_size=50, num_steps=10),
    )


def test_ceilings_are_measured_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []
    best = Ceilings({"float32": 1e12, "bfloat16": 4e12}, 1e10)
    monkeypatch.setattr(roof, "measure_ceilings", lambda device, small: (asked.append(None), best)[1])
    cpu = torch.device("cpu")
    assert roof.ceilings_once(tmp_path / "c.json", cpu, True) == roof.ceilings_once(
        tmp_path / "c.json", cpu, True
    )
    assert len(asked) == 1


def test_stage_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.suites import chunk, stages
    from smolvla_fast import inference

    class Event(float):
        def elapsed_time(self, other: float) -> float:
            return other - self

    times, plain = iter(range(100)), inference.section
    monkeypatch.setattr(stages, "mark", lambda: Event(next(times)))

    def run(*names: str) -> None:
        for stage in names:
            with inference.section(stage):
                next(times)

    with pytest.raises(AssertionError, match="no marks around prefix, denoise"):
        stages.times_inside(lambda: run("vision"), {})
    marks: dict[str, Any] = {}
    wanted = {"vision": 2.0, "prefix": 2.0, "denoise": 2.0, "total": 8.0}
    assert stages.times_inside(lambda: run("vision", "prefix", "denoise"), marks) == wanted
    assert stages.times_inside(lambda: None, marks) == wanted, "a replay has the marks of its capture"
    assert inference.section is plain
    assert chunk.device_rounds(lambda: None, torch.device("cpu"), 3, 1.0, 1.0) is None


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GRACE", 0.5)
    leaf = "import fcntl, pathlib, time; lock = open('lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); "
    leaf += "time.sleep(3); pathlib.Path('left').write_text('')"
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # it hangs, and does not end when it is asked to
    code += f"import subprocess, sys, os; print('begun', flush=True); os.chdir({str(tmp_path)!r}); "
    code += f"subprocess.run([sys.executable, '-c', {leaf!r}])"
    ended = run.execute(python(code), 1.0, dict(os.environ))
    assert (ended.status, ended.reason, ended.tail) == (None, "not done after 1 s", ["begun"])
    assert run.judged(Part("slow", 1, 1), ended, run.EMPTY) == ("red", "not done after 1 s")
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # free when the leaf is gone
    assert not (tmp_path / "left").exists()
    good = run.execute(python("print('x')"), 30.0, dict(os.environ))
    assert (good.status, good.reason, good.tail) == (0, "", ["x"])
    assert run.judged(Part("good", 1, 1), good, run.EMPTY) == ("green", "x")


def test_what_a_suite_measured_before_it_crashed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"name": "stock", "group": "chunk", "extra_info": {"variant": "stock"}}
    found = {
        "benchmarks": [row],
        "red": [],
        "skipped": [],
        "left_out": ["late"],
        "interrupted": False,
    }
    execute = run.execute

    def crash(command: Any, seconds: float, environment: dict[str, str]) -> Any:
        [results] = [word.removeprefix("--results=") for word in command if word.startswith("--results=")]
        code = f"open({results!r}, 'w').write({json.dumps(found)!r}); raise SystemExit('boom')"
        return execute(python(code), 30, environment)

    monkeypatch.setattr(run, "execute", crash)
    one = run.suite("chunk", 10, 5)
    data = run.visit([one], tmp_path / "out" / "a.json", 1, dict(os.environ), {})
    [part] = data["parts"]
    assert (part["status"], part["reason"]) == ("red", "ended with status 1: boom") and part["left_out"] == [
        "late"
    ]
    assert json.loads((tmp_path / "out" / "a.json").read_text())["benchmarks"] == [row]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.json"], (
        "a bench leaves its result alone"
    )
    assert run.judged(one, Ended(0, 1.0, ["x"]), run.EMPTY) == ("red", "nothing was measured")


INTERRUPTED = """
import pathlib, sys, time
[results] = [word.removeprefix("--results=") for word in sys.argv if word.startswith("--results=")]
try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(600)
except KeyboardInterrupt:
    pathlib.Path(results).write_text(sys.argv[2])
"""


def test_an_interrupted_visit_keeps_what_it_has(tmp_path: Path) -> None:
    """SIGINT while the first part is under way; the command itself is below."""
    begun, found = tmp_path / "begun", {**run.EMPTY, "figures": {"ms": 1.0}, "interrupted": True}

    def interrupt() -> None:
        end = time.monotonic() + 60
        while not begun.exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    command = [*python(INTERRUPTED), str(begun), json.dumps(found)]
    parts = [Part("first", 60, 0, command, measures=True), Part("second", 60, 0, python(""), measures=True)]
    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    try:
        thread.start()
        data = run.visit(parts, tmp_path / "out" / "a.json", 5, dict(os.environ), {})
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    first, second = data["parts"]
    assert data["interrupted"] and first["figures"] == {"ms": 1.0}
    assert first["reason"].startswith("interrupted") and second["status"] == "skipped"
    assert json.loads((tmp_path / "out" / "a.json").read_text())["interrupted"]


@pytest.mark.long
def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    """SIGINT while the second case is under way: the file, its Markdown, and what was not begun by name."""
    path, environment = tmp_path / "a.json", {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # "ops" ends without a policy; the second suite is not begun.
    command = [
        sys.executable,
        "-m",
        "smolvla_fast.cli",
        "bench",
        "ops",
        "chunk",
        "--size=tiny",
        "--device=cpu",
    ]
    process = subprocess.Popen(
        [*command, "--rounds=3000", "-k", "euler_step and reference", "--json", str(path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    while "p50" not in said:
        line = process.stdout.readline()
        assert line, said
        said = said + line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    data = json.loads(path.read_text())
    assert (
        data["interrupted"]
        and data["benchmarks"]
        and [part["name"] for part in data["parts"]] == ["ops", "chunk"]
    )
    assert data["parts"][0]["reason"].startswith("interrupted") and data["parts"][1]["status"] == "skipped"
    assert "**Interrupted**" in path.with_suffix(".md").read_text()
    assert "2 parts, within 20.0 minutes" in said, "it says beforehand how long it may take"


def test_shares_of_the_time() -> None:
    def part(limit: float, least: float) -> Part:
        return Part("p", limit, least)

    parts = [part(100, 10), part(50, 20), part(50, 30)]
    assert run.shares(parts, 450) == 100
    assert run.shares(parts, 90) == 40  # 20 and 30 are kept for those behind it
    assert run.shares(parts, 15) == 10
    assert run.shares(parts[2:], 500) == 50


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that `bench` would have run."""
    commands: list[list[str]] = []
    monkeypatch.setattr(run, "execute", lambda command, *_: (commands.append(command), Ended(0, 1.0, []))[1])
    return commands


def test_the_command_hands_on_its_options(started: list[list[str]], tmp_path: Path) -> None:
    path = str(tmp_path / "a.json")
    assert main(["bench", "--suite", "cpu", "--json", path]) == 2, "nothing was timed"
    assert "benchmarks/suites/cpu.py" in started[0] and {
        "--device=cpu",
        "--threads=2",
        "--seconds=506",  # 0.85 of what is left of ten minutes without the GRACE of the last process
    } <= set(started[0])
    common = [
        "--cameras=3",
        "--threads=1",
        "--steps=4",
        "--rounds=5",
        "--size=tiny",
        "--full",
        "--no-scaling",
    ]
    options = [*common, "--with-compile", "-k", "fp32"]
    assert main(["bench", "ops", "cpu", *options, "--json", path]) == 2
    given = {*common, "--with-compile", "--choose", "fp32", "--seconds=2040"}
    assert [Path(word).stem for command in started[1:] for word in command if word.endswith(".py")] == [
        "ops",
        "cpu",
    ]
    assert all(given <= set(command) for command in started[1:])
    assert main(["bench", "--json", path]) == 2
    assert [Path(word).stem for command in started[3:] for word in command if word.endswith(".py")] == [
        "chunk", "stages", "ops",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: suite cpu runs on the CPU; accepted are auto and cpu"),
        (["--layout", "mixed"], "--layout mixed: suite cpu compares with stock in fp32; accepted is fp32"),
        (["--cameras", "1,2"], "--cameras 1,2: suite cpu takes one count from 1 to 4"),
        (["--cameras", "5"], "--cameras 5: suite cpu takes one count from 1 to 4"),
        (["--batch", "x"], "--batch x: not counts of batch; accepted are whole numbers above 0"),
    ],
)
def test_the_command_refuses(
    started: list[list[str]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "--suite", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err and not started
