"""`make gpu-report` and `make gpu-peers`, rehearsed on a CPU: arguments, parts, what is red, the result and its Markdown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_run import peers as gpu_peers
from benchmarks.gpu_run import report as gpu_report
from benchmarks.gpu_run import result, run
from benchmarks.gpu_run.run import Context, Outcome, Part
from smolvla_fast.ops.extension import available, why_missing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def rehearse(
    script: str, out: Path, *arguments: str, path: Path | None = None
) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what was printed, and the result file."""
    before = sorted(RESULTS.glob("*.json"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, filter(None, [path, ROOT])))}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.gpu_run.{script}", "--rehearse", "--out", str(out), *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
    )  # fmt: skip
    assert sorted(RESULTS.glob("*.json")) == before, "a rehearsal has no place in benchmarks/results"
    files = list(out.glob("*.json"))
    assert len(files) == 1, done.stdout
    return done.returncode, done.stdout, json.loads(files[0].read_text())


def parts_of(data: dict[str, Any]) -> dict[str, str]:
    return {part["name"]: part["status"] for part in data["parts"]}


def variants(data: dict[str, Any], suite: str) -> list[str]:
    return [b["extra_info"]["variant"] for b in data["benchmarks"] if b["extra_info"]["suite"] == suite]


@pytest.mark.slow
@pytest.mark.processor
@pytest.mark.skipif(not available("cpu"), reason=why_missing("cpu"))
def test_report_rehearsed(tmp_path: Path) -> None:
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    chosen = ("sanitizer", "chunk", "stages", "denoise", "ops")
    status, said, data = rehearse("report", tmp_path, *(f"--part={name}" for name in chosen))
    assert status == 0, said
    assert tuple(parts_of(data)) == chosen and "red" not in parts_of(data).values()
    assert result.problems(data) == [] and data["rehearsal"] is True
    tiers = ["stock", "exact", "fp32", "bf16"]
    loops = [f"bf16, {backend}" for backend in ("torch", "cpu", "torch again")]
    assert variants(data, "chunk") == 2 * tiers and variants(data, "stages") == [*tiers, *loops, *loops]
    chunks = [b["extra_info"] for b in data["benchmarks"] if b["extra_info"]["suite"] == "chunk"]
    assert [b["batch"] for b in chunks] == 4 * [1] + 4 * [2]
    assert all(b["max_abs"] == b["bound"] == 0 for b in chunks if b["variant"] in ("stock", "exact"))
    assert all(
        0 < b["rel_l2"] <= b["bound"] and b["first_chunk_ms"] > 0 for b in chunks if b["variant"] in tiers[2:]
    )
    stages = next(
        b
        for b in data["benchmarks"]
        if b["extra_info"].get("variant") == "bf16" and "stages" in b["extra_info"]
    )
    figures = stages["extra_info"]["stages"]
    assert set(figures) == {"vision", "prefix", "denoise", "total"}
    assert (
        sum(figures[s]["p50_ms"] for s in ("vision", "prefix", "denoise")) <= 1.5 * figures["total"]["p50_ms"]
    )
    assert data["parts"][1]["left_out"][0].startswith("fp8, 2 cameras, batch 1: precision='fp8' cannot serve")
    facts = data["machine_info"]["smolvla_fast"]
    assert facts["ceilings"]["copy_bytes"] > 0 and facts["torch_version"] == torch.__version__.split("+")[0]
    text = next(tmp_path.glob("*.md")).read_text()
    assert "**A rehearsal**" in text
    for title in ("## Parts", "## Chunk", "## Device and host", "## Stages", "## Denoise loop", "## Ops"):
        assert title in text
    pytest.importorskip("matplotlib")
    assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.processor
def test_peers_rehearsed(tmp_path: Path) -> None:
    """Compiling takes a minute or more on a CPU: here only that the mode which a rehearsal leaves out says so."""
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    chosen = ("--part=beside", "--part=compiled-max-autotune")
    status, said, data = rehearse("peers", tmp_path, *chosen)
    assert status == 0, said
    assert parts_of(data) == {"beside": "green", "compiled-max-autotune": "skipped"}
    assert result.problems(data) == [] and variants(data, "chunk") == ["stock", "exact", "fp32", "bf16"]
    assert "| compiled-max-autotune | skipped |" in next(tmp_path.glob("*peers*.md")).read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_red_engine_has_no_figure_and_costs_no_other(tmp_path: Path) -> None:
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import smolvla_fast.inference as inference\n"
        "act = inference.Engine.act\n"
        "inference.Engine.act = lambda *args, **kwargs: 1.5 * act(*args, **kwargs)\n"
    )
    status, said, data = rehearse("report", tmp_path / "out", "--part=chunk", "--part=ops", path=broken)
    assert status == 1 and "red: chunk" in said
    assert parts_of(data) == {"chunk": "red", "ops": "green"}
    assert set(variants(data, "chunk")) == {"stock"}
    red = data["parts"][0]["red"]
    assert {r["name"].split(",")[0] for r in red} == {"exact", "fp32", "bf16"}
    assert "not timed: bits differ from stock's" in red[0]["reason"]
    assert any(b["extra_info"]["suite"] == "ops" for b in data["benchmarks"])
    assert "| chunk | red |" in next((tmp_path / "out").glob("*.md")).read_text()


def context(folder: Path, **environment: str) -> Context:
    return Context(folder, True, None, {**os.environ, **environment})


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_command_is_ended_with_all_it_started(tmp_path: Path) -> None:
    leaf = "import time, pathlib; time.sleep(3); pathlib.Path('left').write_text('')"
    code = f"import subprocess, sys, os; print('begun', flush=True); os.chdir({str(tmp_path)!r}); "
    code += f"subprocess.run([sys.executable, '-c', {leaf!r}])"
    outcome, status = context(tmp_path).execute("slow", python(code), 1.0)
    assert status is None and outcome.status == "red" and outcome.reason == "not done after 1 s"
    assert outcome.tail == ["begun"]
    time.sleep(3)
    assert not (tmp_path / "left").exists()
    outcome, status = context(tmp_path).execute("good", python("print('x')"), 30.0)
    assert (status, outcome.status, outcome.tail) == (0, "green", ["x"])


def test_what_a_part_measured_before_it_crashed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = run.measuring("chunk", 10, 5)
    found = {"benchmarks": [{"name": "stock"}], "red": [], "left_out": ["late"]}
    code = f"import json; open({str(tmp_path / 'chunk.json')!r}, 'w').write({json.dumps(found)!r}); raise SystemExit('boom')"
    monkeypatch.setattr(
        Context,
        "execute",
        lambda self, name, command, seconds, execute=Context.execute: execute(self, name, python(code), 30),
    )
    outcome = part.work(context(tmp_path), 5)
    assert (outcome.status, outcome.reason) == ("red", "ended with status 1: boom")
    assert outcome.left_out == ["late"] and run._found(tmp_path, "chunk") == found
    (tmp_path / "chunk.json").unlink()
    monkeypatch.setattr(Context, "execute", lambda self, name, command, seconds: (Outcome(name), 0))
    assert part.work(context(tmp_path), 5).reason == "nothing was measured"


def test_shares_of_the_time() -> None:
    def part(limit: float, least: float) -> Part:
        return Part("p", limit, least, lambda context, seconds: Outcome("p"))

    parts = [part(100, 10), part(50, 20), part(50, 30)]
    assert run.shares(parts, 450) == 100
    assert run.shares(parts, 90) == 40  # 20 and 30 are kept for those behind it
    assert run.shares(parts, 15) == 10
    assert run.shares(parts[2:], 500) == 50
    for script in (gpu_report, gpu_peers):
        assert sum(part.least for part in script.PARTS) <= 60 * run.MINUTES <= 480


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parsed(*arguments: str) -> Any:
        return run.arguments_of("gpu-report", gpu_report.PARTS, arguments)

    assert parsed().out == RESULTS and parsed("--part", "chunk").out == ROOT / "build"
    assert parsed("--rehearse").out == ROOT / "build" / "gpu-rehearsal"
    assert parsed("--only", "linear").part == ["ops"]
    for wrong, reason in (
        (["--part", "stagse"], "invalid choice: 'stagse'"),
        (["--rehearse", "--out", str(RESULTS)], "a rehearsal has no place in benchmarks/results"),
    ):
        with pytest.raises(SystemExit):
            parsed(*wrong)
        assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main("gpu-report", gpu_report.PARTS, []) == 1
    assert "no CUDA GPU here, or no driver for it" in capsys.readouterr().out


def test_lerobot_comes_along_as_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WHEELS", tmp_path / ".whl")
    monkeypatch.setattr(run, "SITE", tmp_path / "site")
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    assert run.bring_lerobot({}) is None
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert "run `make gpu-wheels` on a machine with a network" in str(run.bring_lerobot({}))
    (tmp_path / ".whl").mkdir()
    assert "the wheels in .whl/ do not install" in str(run.bring_lerobot({}))
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = {"PYTHONPATH": "before"}
    assert run.bring_lerobot(environment) is None
    assert sys.path[0] == str(tmp_path / "site")  # for the version in the result's head
    assert environment["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}before"
    lines = [line for line in run.REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    assert "lerobot==0.6.1" in lines and all(line.count("==") == 1 for line in lines)


def test_state_of_the_gpu_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.gpu_state() is None
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '1980 MHz, 2619 MHz, 1980 MHz'\n")
    program.chmod(0o755)
    assert run.gpu_state() == {"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz", "clocks.max.sm": "1980 MHz"}
    asked = (tmp_path / "asked").read_text().split()
    assert [word.split("=")[0] for word in asked] == ["--query-gpu", "--format"]


def test_verdict_on_pytest() -> None:
    closing = "3 passed, 2 deselected in 1.52s"
    failed = ["FAILED tests/gpu/a.py::b - AssertionError", "1 failed, 2 passed in 3.00s"]
    assert gpu_report.judged(Outcome("tests", tail=["...", closing]), 0).reason == closing
    assert gpu_report.judged(Outcome("tests", tail=[]), 5).status == "skipped"
    assert gpu_report.judged(Outcome("sanitizer", tail=["3 skipped in 2.01s"]), 0).status == "skipped"
    red = gpu_report.judged(Outcome("tests", tail=failed), 1)
    assert red.status == "red" and "1 failed" in red.reason and "tests/gpu/a.py::b" in red.reason
    late = gpu_report.judged(Outcome("tests", "red", "not done after 9 s"), None)
    assert (late.status, late.reason) == ("red", "not done after 9 s")
    good = Outcome("tests", reason=closing)
    assert gpu_report.together([good, good]).reason == "6 passed, 4 deselected"
    whole = gpu_report.together([good, red, late])
    assert whole.status == "red" and "5 passed" in whole.reason and "not done after 9 s" in whole.reason
    assert gpu_report.together([Outcome("tests", "skipped", "no test is marked so")]).status == "skipped"


def test_shards_run_every_test_once(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test_it(i):\n    open(f'{i}', 'x')\n"
    )
    for number in range(3):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_run.shard", "-k", "not 9", "."], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "SMOLVLA_SHARD": f"{number}/3"}, text=True, capture_output=True,
        )  # fmt: skip
        assert "3 passed" in done.stdout, done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == set("012345678")
