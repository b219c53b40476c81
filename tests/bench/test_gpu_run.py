"""`make gpu-report` and `make gpu-peers`, rehearsed on a CPU: arguments, parts, what is red, the result and its Markdown.

tests/bench/test_gpu_contact.py has `make gpu-contact` and `make gpu-bring`.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.contract import ONE_BACKENDS, OPS

from benchmarks.gpu_run import __main__ as visit
from benchmarks.gpu_run import bring, plans
from benchmarks.harness import run
from benchmarks.harness.run import EMPTY, Ended, Part
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops.table import STAGES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = {
    "chunk": "variant cameras batch layers layout steps p50_ms p95_ms p99_ms min_ms rounds rel_l2 max_abs floor_ms "
    "share_of_floor peak_bytes first_chunk_ms",
    "ops": "op case dtype backend p50_ms min_ms flops bytes floor_ms share_of_floor gflops_per_s gbytes_per_s",
}
"""What every figure of a suite says beside itself."""


def rehearse(kind: str, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and result of a rehearsal."""
    before = sorted(RESULTS.glob("*.json"))
    status = visit.main([kind, "--rehearse", "--out", str(out), *arguments])
    assert sorted(RESULTS.glob("*.json")) == before, "a rehearsal has no place in benchmarks/results"
    [path] = out.glob("*.json")
    return status, json.loads(path.read_text())


@pytest.mark.long
def test_report_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite in this process, where torch is loaded; one of its own is in tests/acceptance/test_speed_claims.py."""
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    for name in (*run.UNWANTED, "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(name, raising=False)
    suite = lambda command, *_: Ended(int(pytest.main([*command[3:], "-p", "no:xdist"])), 1.0, [])  # noqa: E731
    monkeypatch.setattr(run, "execute", suite)
    status, data = rehearse("report", tmp_path, "--part=build", "--part=ops")
    statuses = [(part["name"], part["status"]) for part in data["parts"]]
    assert status == 0 and statuses == [("build", "skipped"), ("build", "skipped"), ("ops", "green")]
    assert data["rehearsal"] is True
    for each in data["benchmarks"]:
        info = each["extra_info"]
        wanted = NEEDED[info["suite"]].split()
        assert [key for key in wanted if key not in info] == []
        assert len(each["stats"]["data"]) == info["rounds"] > 0
    assert data["benchmarks"]
    facts = data["machine_info"]["smolvla_fast"]
    assert facts["ceilings"]["copy_bytes"] > 0 and facts["torch_version"] == torch.__version__.split("+")[0]
    text = next(tmp_path.glob("*.md")).read_text()
    assert "**A rehearsal**" in text and "## Parts" in text and "## Ops" in text


@pytest.mark.long
@pytest.mark.slow
def test_peers_rehearsed_with_a_broken_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock keeps its figures, what is wrong has none, the others go on."""
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import smolvla_fast.inference as inference\n"
        "act = inference.Engine.act\n"
        "inference.Engine.act = lambda *args, **kwargs: 1.5 * act(*args, **kwargs)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(broken), str(ROOT)]))
    status, data = rehearse("peers", tmp_path / "out")
    assert status == 1
    assert {part["name"]: part["status"] for part in data["parts"]} == {
        "beside": "red", "compiled-default": "skipped", "compiled-max-autotune": "skipped",
    }  # fmt: skip
    assert [each["extra_info"]["variant"] for each in data["benchmarks"]] == ["stock"]
    assert all(key in data["benchmarks"][0]["extra_info"] for key in NEEDED["chunk"].split())
    red = {each["variant"]: each["reason"] for each in data["parts"][0]["red"]}
    assert {"exact", "fp32", "bf16"} <= set(red) and red["exact"].startswith("bits differ from stock's")
    assert "| compiled-max-autotune | skipped |" in next((tmp_path / "out").glob("*peers*.md")).read_text()


def report_parts() -> list[Part]:
    return plans.report(Namespace(rehearse=False, only=None, part=None))


def test_the_parts_fit_into_the_time() -> None:
    for kind, make in plans.PLANS.items():
        parts = make(Namespace(rehearse=False, only=None, part=None))
        assert sum(part.least for part in parts) <= 60 * plans.MINUTES[kind] <= 480


def test_what_matters_most_comes_first() -> None:
    """bf16 before all, tests behind what is measured, the sanitizer last; nothing slow, a variant of the chunk a process."""
    parts = report_parts()
    names = [part.name for part in parts]
    assert names[0] == "chunk" and "--choose=stock or bf16" in parts[0].command
    assert names.index("stages") < names.index("ops") < names.index("contract") < names.index("tests")
    assert max(i for i, name in enumerate(names) if name == "chunk") < names.index("contract")
    assert names[-1] == "sanitizer"
    chosen = [word for part in parts if part.name == "chunk" for word in part.command if "--choose" in word]
    assert set(chosen) == {f"--choose=stock or {tier}" for tier in TIERS if tier not in ("int8", "int16")}
    marks = [
        part.command[part.command.index("-m", 3) + 1] for part in parts if part.name in ("contract", "tests")
    ]
    assert marks == ["gpu and not slow"] * 3
    denoise = tuple(op for op in STAGES["denoise"] if op not in ONE_BACKENDS)
    assert OPS[: len(denoise)] == denoise


def test_a_visit_measures_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Flags of every part, without a GPU: pytest takes them, and they name the device."""
    commands: list[list[str]] = []
    monkeypatch.setattr(run, "execute", lambda command, *_: (commands.append(command), Ended(0, 1.0, []))[1])
    args = Namespace(rehearse=False, only=None, part=None)
    parts = [part for part in [*plans.report(args), *plans.peers(args)] if part.measures]
    run.visit(parts, tmp_path / "a.json", 60, {}, {})
    assert len(commands) == 10 and all("--device=cuda" in command for command in commands)
    assert "--compile-mode=max-autotune" in commands[-1] and "--layers=16" in commands[0]
    from benchmarks.harness import flags

    known = {*flags.FLAGS, "--results", "--rootdir", "--benchmark-quiet"}
    given = {word.split("=")[0] for command in commands for word in command if word.startswith("--")}
    assert given - known <= {"--choose"}


def test_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def parsed(*arguments: str) -> Any:
        return visit.parse(["report", *arguments])

    assert parsed().out == RESULTS and parsed("--part", "chunk").out == ROOT / "build" / "gpu-report"
    assert parsed("--rehearse").out == ROOT / "build" / "gpu-rehearsal"
    assert parsed("--only", "linear").part == ["ops"]
    for wrong, reason in (
        (
            ["--part", "stagse"],
            "no part stagse; accepted are chunk, build, stages, ops, contract, tests, sanitizer",
        ),
        (["--rehearse", "--out", str(RESULTS)], "a rehearsal has no place in benchmarks/results"),
    ):
        with pytest.raises(SystemExit):
            parsed(*wrong)
        assert reason in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert visit.main(["report"]) == 1
    assert "no CUDA GPU here, or no driver for it" in capsys.readouterr().out


def test_lerobot_comes_along_as_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visit, "WHEELS", tmp_path / ".whl")
    monkeypatch.setattr(visit, "SITE", tmp_path / "site")
    monkeypatch.setattr(visit, "find_spec", lambda name: object())
    assert visit.bring_lerobot({}) is None
    monkeypatch.setattr(visit, "find_spec", lambda name: None)
    assert "run `make gpu-bring` on a machine with a network" in str(visit.bring_lerobot({}))
    (tmp_path / ".whl").mkdir()
    assert "the wheels in .whl/ do not install" in str(visit.bring_lerobot({}))
    (tmp_path / "site").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    environment = {"PYTHONPATH": "before"}
    assert visit.bring_lerobot(environment) is None
    assert sys.path[0] == str(tmp_path / "site")  # for the version in the result's head
    assert environment["PYTHONPATH"] == f"{tmp_path / 'site'}{os.pathsep}before"
    lines = [
        line for line in bring.REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")
    ]
    assert "lerobot==0.6.1" in lines and all(line.count("==") == 1 for line in lines)


def test_state_of_the_gpu_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visit.gpu_state() is None
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '1980 MHz, 2619 MHz, 1980 MHz'\n")
    program.chmod(0o755)
    assert visit.gpu_state() == {
        "clocks.sm": "1980 MHz",
        "clocks.mem": "2619 MHz",
        "clocks.max.sm": "1980 MHz",
    }
    asked = (tmp_path / "asked").read_text().split()
    assert [word.split("=")[0] for word in asked] == ["--query-gpu", "--format"]


def test_verdict_on_pytest() -> None:
    def judged(status: int | None, *tail: str, reason: str = "") -> tuple[str, str]:
        return run.judged(Part("tests", 1, 1), Ended(status, 1.0, list(tail), reason), EMPTY)

    closing = "3 passed, 2 deselected in 1.52s"
    assert judged(0, "...", f"== {closing} ==") == ("green", closing)
    assert judged(5, "2 deselected in 0.10s")[0] == judged(0, "3 skipped in 2.01s")[0] == "skipped"
    status, reason = judged(1, "FAILED tests/gpu/a.py::b - AssertionError", "1 failed, 2 passed in 3.00s")
    assert status == "red" and "1 failed" in reason and "tests/gpu/a.py::b" in reason
    assert judged(None, closing, reason="not done after 9 s") == ("red", "not done after 9 s")


def test_stocks_row_stands_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every process times stock beside its variant; the rows of a part that ended without a result are nobody's."""

    def execute(command: list[str], seconds: float, environment: dict[str, str]) -> Ended:
        path = Path(command[-1].removeprefix("--results="))
        if "crash" not in command:
            rows = [{"group": "chunk", "extra_info": {"variant": each}} for each in ("stock", command[0])]
            path.write_text(json.dumps({**EMPTY, "benchmarks": rows}))
        return Ended(-11 if "crash" in command else 0, 1.0, [])

    monkeypatch.setattr(run, "execute", execute)
    parts = [Part("chunk", 60, 0, (name,), measures=True) for name in ("bf16", "crash", "fp32")]
    data = run.visit(parts, tmp_path / "a.json", 5, {}, {})
    assert [each["extra_info"]["variant"] for each in data["benchmarks"]] == ["stock", "bf16", "fp32"]
    assert [part["status"] for part in data["parts"]] == ["green", "red", "green"]


def test_a_killed_run_of_tests_names_them(tmp_path: Path) -> None:
    """A line for each as it begins and ends, with its traceback; what was under way is known."""
    test = tmp_path / "test_three.py"
    test.write_text(
        "import os\ndef test_good(): pass\ndef test_wrong():\n    assert 1 == 2\ndef test_dies(): os._exit(9)\n"
    )
    part = Part("tests", 60, 0, run.pytest_of(str(test), f"--rootdir={tmp_path}"))
    data = run.visit([part], tmp_path / "a.json", 2, dict(os.environ), {}, logs=tmp_path)
    [found] = data["parts"]
    figures = found["figures"]
    assert found["status"] == "red" and figures["passed"] == figures["failed"] == 1
    assert "assert 1 == 2" in figures["tracebacks"]["test_three.py::test_wrong"]
    assert figures["under way"] == ["test_three.py::test_dies"]
    with tarfile.open(tmp_path / "a.tar.gz") as tar:
        [name] = (name for name in tar.getnames() if name.endswith("-tests.jsonl"))
        lines = [json.loads(line) for line in tar.extractfile(name).read().decode().splitlines()]  # type: ignore[union-attr]
    assert [line["outcome"] for line in lines] == ["begins", "passed", "begins", "failed", "begins"]
    assert "assert 1 == 2" in lines[3]["traceback"]
