"""`make gpu-contact` and `make gpu-bring` without a GPU: rehearsed, and with failures planted into its stages."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import recorder

from benchmarks.gpu_run import __main__ as visit
from benchmarks.gpu_run import bring, page, plans, predictions
from benchmarks.gpu_run.stage import Stage
from benchmarks.gpu_run.stages import STAGES
from benchmarks.harness import run
from benchmarks.harness.run import GRACE, Part
from smolvla_fast import inference

ROOT = Path(__file__).resolve().parents[2]
PLANTED = """
import os, signal, sys, time
from benchmarks.gpu_run import stage

def sticky(found):
    found.add(before=1)
    for name in ("first", "second"):
        with found.attempt(name):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

def killed(found):
    found.add(before=2)
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(found):
    found.add(before=3)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)

def policy(found, backend):
    from support.recorder import RecorderDriver
    from benchmarks.gpu_run import stages
    import support.recorder
    support.recorder.RecorderDriver = lambda: RecorderDriver(fail_at=40)
    stages.policy(found, backend)

sys.exit(stage.main(sys.argv[1:], dict(sticky=sticky, killed=killed, hangs=hangs, policy=policy)))
"""
"""Stages with something wrong in each."""


def contact(out: Path, make: Any, *arguments: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit status, lines of the log, result."""
    status = visit.main(["contact", "--rehearse", "--out", str(out), *arguments], {"contact": make})
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return status, lines, json.loads((out / "contact.json").read_text())


def in_tar(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "gpu-contact.tar.gz") as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]


def test_every_part_calls_a_stage_with_what_it_takes() -> None:
    asked = Namespace(rehearse=False, part=["all"])
    commands = [command for part in plans.contact(asked) for command in part.commands.values()]
    words = [command[3:] for command in commands if command[2:3] == ("benchmarks.gpu_run.stage",)]
    assert {"policy", "profile", "loop", "lerobot"} < {name for name, *_ in words}
    for name, *given in words:
        inspect.signature(STAGES[name]).bind("stage", *given)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("build", "contract"), pytest.param(("constants",), marks=pytest.mark.long)], ids="-".join
)
def test_contact_rehearsed(names: tuple[str, ...], tmp_path: Path) -> None:
    """Parts as they are run on a GPU, in processes of their own: tests, and a stage whose kernels are interpreted there."""
    parts = [part for part in plans.contact(Namespace(rehearse=True, part=None)) if part.name in names]
    status, lines, data = contact(tmp_path, lambda args: parts)
    assert status == 0, [(line["name"], line["reason"], line.get("traceback")) for line in lines]
    assert [line["name"] for line in lines] == [*names]
    if names == ("constants",):
        assert lines[0]["figures"]["hbm_gb_per_s"] > 0
    assert "**A rehearsal**" in (tmp_path / "contact.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "contact.json", "contact.md", "gpu-contact.tar.gz", "log.jsonl",
    ]  # fmt: skip
    assert json.loads(in_tar(tmp_path)["contact.json"]) == data


@pytest.fixture
def rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """rehearsed(stage) -> its figures. In this process, where torch is loaded; of its own is one in the test below."""
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the baseline is LeRobot's")
    monkeypatch.setattr(inference, "driver_for", inference.driver_for)  # a rehearsal puts a recorder there
    parts = {part.name: part for part in plans.contact(Namespace(rehearse=True, part=None))}

    def figures(name: str, of: str = "") -> dict[str, Any]:
        stage = Stage(name, tmp_path / f"{name}.json", rehearsal=True)
        command = parts[of or name].commands[name]
        STAGES[command[3]](stage, *command[4:-1])
        found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())["figures"]
        assert not stage.red and found == json.loads(json.dumps(stage.figures, default=str))
        return found

    return figures


def test_stages_rehearsed(rehearsed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """In a rehearsal ``profile`` and ``loop`` end before they have begun."""
    for op in plans.REHEARSED_OPS:
        assert len(rehearsed(op, of="ops")) == 1
    assert rehearsed("machine")["product"] == 64 * 64
    policy = rehearsed("policy")
    assert policy["headline"]["ms"] > 0 and policy["replays_are_equal"] is True
    assert rehearsed("trace")["nodes"] > 0
    assert {"us", "gap_us", "name"} == set(json.loads((tmp_path / "trace-nodes.json").read_text())[0])
    assert rehearsed("stages")["denoise_ms"] > 0


@pytest.mark.long
def test_the_slow_stages_rehearsed(rehearsed: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Timing and tuning themselves are in tests/bench/test_suites.py and tests/tune."""
    assert rehearsed("lerobot")["wall"]["rounds"] == 2
    rehearsed("barriers")
    assert rehearsed("tune")["verdict"] and (tmp_path / "tune-tuning.json").is_file()


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Part]:
    """planted(stage, limit, *words) -> the part."""
    monkeypatch.setattr(run, "GRACE", 0.5)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}")
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    return lambda name, limit, *words: Part(
        name, limit, 0, (sys.executable, str(script), name, *words, "--rehearse"), measures=True
    )


@pytest.mark.slow
def test_a_stage_that_fails_costs_itself_and_says_why(tmp_path: Path, planted: Callable[..., Part]) -> None:
    """A sticky error, a killed stage, one that hangs."""
    parts = [planted("sticky", 60), planted("killed", 60), planted("hangs", 3)]
    status, lines, _ = contact(tmp_path / "out", lambda args: parts)
    assert status == 1 and [line["status"] for line in lines] == ["red"] * 3
    assert [line["figures"].get("before") for line in lines] == [1, 2, 3], "what was found before counts"
    sticky, killed, hangs = lines
    assert len(sticky["red"]) == 2 and "illegal memory access" in sticky["traceback"]
    assert killed["reason"] == "ended with status -9: before: 2"
    assert (
        hangs["reason"] == "not done after 3 s" and "in hangs" in hangs["traceback"] and hangs["seconds"] < 20
    )
    assert set(in_tar(tmp_path / "out")) >= {"log.jsonl", "contact.json", "02-hangs.json"}


def test_a_capture_that_fails_is_no_headline(
    rehearsed: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RecorderDriver", partial(recorder.RecorderDriver, fail_at=40))
    with pytest.raises(RuntimeError, match="out of memory while recording"):
        rehearsed("policy")
    parts = [("policy", {}), ("policy-torch", {"headline": {"ms": 1.0, "by": "torch"}})]
    found = page.headline({"parts": [{"name": name, "figures": figures} for name, figures in parts]})
    assert found == {"ms": 1.0, "by": "torch"}


@pytest.mark.long
@pytest.mark.slow
def test_the_headline_comes_home_where_a_capture_fails(tmp_path: Path, planted: Callable[..., Part]) -> None:
    """As the two above, in processes: the traceback comes home too, and torch's chunk is timed."""
    parts = [
        planted("policy", 60, "triton"),
        plans.stage("policy", 60, 0, "torch", label="policy-torch", rehearse=True),
    ]
    status, (capture, torchs), data = contact(tmp_path / "out", lambda args: parts)
    assert status == 1 and (capture["status"], torchs["status"]) == ("red", "green")
    assert "out of memory while recording" in capture["reason"]
    assert "in predict_action_chunk" in capture["traceback"] or "_chunk" in capture["traceback"]
    assert "Traceback (most recent call last)" in capture["traceback"]
    assert page.headline(data)["by"].startswith("torch")  # type: ignore[index]
    text = (tmp_path / "out" / "contact.md").read_text()
    assert "ms a chunk**" in text and "| policy-torch/headline/ms |" in text


def test_the_headline_has_its_time_however_long_the_stages_before_it_take() -> None:
    """Each to its limit and beyond; and the whole within its minutes."""
    parts = plans.contact(Namespace(rehearse=False, part=None))
    left, given = 60 * plans.MINUTES["contact"], {}
    for place, part in enumerate(parts):
        given[part.name] = max(0.0, run.shares(parts[place:], left - GRACE))
        left -= given[part.name] + (GRACE if given[part.name] else 0)
    assert given["policy"] >= 50 and given["policy-torch"] >= 30 and left >= 0
    assert all(part.limit <= 80 for part in parts)


def test_a_second_contact_asks_by_name() -> None:
    named = {part.name for part in plans.contact(Namespace(rehearse=False, part=["fp8"]))}
    assert {
        "fp8",
        "fp32",
        "exact",
        "1-camera",
        "3-cameras",
        "batch-8",
        "streams",
        "memory",
        "compiled",
        "sanitizer",
    } < named
    assert visit.parse(["contact", "--part", "fp8"]).logs == ROOT / "build" / "gpu-contact"
    for wrong in (
        ["contact", "--part", "fp9"],
        ["contact", "--minutes", "0"],
        ["contact", "--only", "linear"],
    ):
        with pytest.raises(SystemExit):
            visit.parse(wrong)


def test_several_at_once_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six beside each other within the part's time; one that is late costs itself."""
    monkeypatch.setattr(run, "GRACE", 0.5)
    sleep = lambda seconds: (sys.executable, "-c", f"import time; time.sleep({seconds})")  # noqa: E731
    found = run.together({"a": sleep(0), "b": sleep(60), "c": sleep(0)}, 3, {})
    assert (found["a"].status, found["b"].status, found["c"].status) == (0, None, 0)
    assert found["b"].reason.startswith("not done after")


CONTACTS = sorted((ROOT / "benchmarks" / "results" / "contacts").glob("*.json"))


@pytest.mark.parametrize("path", CONTACTS, ids=lambda path: path.stem)
def test_a_committed_contact_is_what_its_figures_give(path: Path) -> None:
    assert page.markdown(json.loads(path.read_text())) == path.with_suffix(".md").read_text()


def test_predictions_stand_beside_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "predictions.json"
    assert predictions.predicted(path) == {}
    path.write_text('{"stages/denoise_ms": 3.9}')
    part = {
        "name": "stages",
        "status": "green",
        "reason": "",
        "seconds": 1,
        "red": [],
        "skipped": [],
        "left_out": [],
    }
    facts = json.loads(next((ROOT / "benchmarks" / "results").glob("*.json")).read_text())["machine_info"]
    figures = {"denoise_ms": 4.25, "vision_ms": 1.5}
    data = {
        "machine_info": facts,
        "parts": [{**part, "figures": figures}],
        "predicted": predictions.predicted(path),
    }
    text = page.markdown(data)
    assert "| stages/denoise_ms | 4.25 | 3.9 |" in text and "| stages/vision_ms | 1.5 | – |" in text
    assert "**No chunk was captured and timed.**" in text


def test_what_was_cached_elsewhere_is_found_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's index names its files with the folder in which they were made."""
    triton = pytest.importorskip("triton")
    from triton.runtime.cache import FileCacheManager

    made, here = tmp_path / "made", tmp_path / "here"
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(made)
        there = FileCacheManager("key")
        there.put_group("kernel.json", {"kernel.cubin": there.put(b"code", "kernel.cubin")})
        made.rename(here)
        triton.knobs.cache.dir = str(here)
        assert FileCacheManager("key").get_group("kernel.json") == {}
        environment: dict[str, str] = {}
        bring.use_cache(environment, here)
        assert FileCacheManager("key").get_group("kernel.json") == {
            "kernel.cubin": str(here / "key" / "kernel.cubin")
        }
    assert environment == {"TRITON_CACHE_DIR": str(here)} and bring.compiled_kernels(here) == 1


@pytest.mark.long
@pytest.mark.slow
def test_kernels_to_bring_are_compiled_without_a_gpu(tmp_path: Path) -> None:
    """A chunk's, and those of the constants, with programmatic dependent launch too."""
    pytest.importorskip("triton")
    code = "import sys, pathlib; from benchmarks.gpu_run import bring; bring.kernels('tiny', pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    names = {path.stem.removeprefix("_") for path in tmp_path.glob("*/*.cubin")}
    assert {"nothing", "read", "link", "norm_swiglu_fwd", "euler_step_fwd"} <= names
    ptx = [path.read_text() for path in tmp_path.glob("*/_link.ptx")]
    assert sorted("griddepcontrol.wait" in each for each in ptx) == [False, True]


def test_what_cannot_be_built_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no account here")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert visit.main(["bring", "--part", "predictions"]) == 1
    assert "predictions: not built, 0 s: ImportError: no account here" in capsys.readouterr().out
