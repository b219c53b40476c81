"""``smolvla-fast tune``: what it shows, writes and keeps of a tuning made by hand, and what it refuses before any work."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tunings import CHOICES, tuning_of

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.engine import plan_files, plan_key
from smolvla_fast.measure.console import Console
from smolvla_fast.ops.plan import Plan
from smolvla_fast.tune import tuner
from smolvla_fast.tune.result import Choice, ChunkTime, Timed, Tuning

TINY = ["tune", "--size", "tiny", "--steps", "3", "--threads", "1"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(plan_files.CACHE_DIR, str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of the tuner, which finds ``found(key)`` of the first's "found", or what ``tuning_of`` says."""
    made: list[dict[str, Any]] = []

    def tune(model: Any, products: Any, *, progress: Any, **more: Any) -> Tuning:
        progress("linear 50 36>256 float32 silu: onednn", 0.5)
        key = plan_key.key_of(model, products.tier.name, products.backend, products.device)
        made.append({"model": model, "products": products, "threads": torch.get_num_threads(), **more})
        return tuning_of(key)

    monkeypatch.setattr(tuner, "tune", tune)
    return made


def finds(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """The tuner finds the hand-made tuning with other fields."""
    tune = tuner.tune
    monkeypatch.setattr(tuner, "tune", lambda *args, **more: replace(tune(*args, **more), **changes))


def test_tune_shows_writes_and_keeps_what_it_found(
    calls: list[dict[str, Any]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plot = tmp_path / "out" / "tune.json", tmp_path / "out" / "tune.png"
    before = torch.get_num_threads()
    options = ["--seconds", "7.5", "--cameras", "1", "--backend", "cpu", "--precision", "bf16"]
    assert main([*TINY, *options, "--json", str(path), "--plot", str(plot)]) == 0
    assert torch.get_num_threads() == before
    [call] = calls
    assert call["seconds"] == 7.5 and call["threads"] == 1 and len(call["inputs"][0]) == 1
    assert call["noise"].shape == (1, 10, 32) and call["products"].plan is None
    assert (call["products"].tier.name, call["products"].backend) == ("bf16", "cpu")

    out, err = capsys.readouterr()
    assert "[ 50%] linear 50 36>256 float32 silu: onednn" in err
    for word in (
        "linear",
        "50 36>256 float32 silu",
        "40",
        "default",
        "chosen",
        "refused",
        "not reached",
        "1.0e-07",
        "2.0e-07",
    ):
        assert word in out
    assert "mkl for linear 50 36>256 float32 silu is refused: its error is 9.0e-02" in out
    assert "1 of 2 choices were not reached in 2 s and keep their default; give more --seconds" in out
    assert "The whole chunk" in out
    [kept] = folder.iterdir()
    assert (
        f"wrote {kept}, which patch(policy) uses from now on for a policy of these shapes in float32, where torch "
        in out
    )
    assert out.splitlines()[-1].startswith(
        "1 of 2 choices changed hands; chunk 10.0 -> 9 ms (-10.0%), error 1.0e-06"
    )
    assert plot.read_bytes().startswith(b"\x89PNG")

    found = json.loads(path.read_text())
    assert found["path"] == str(kept) and found["plan"]["choices"] == CHOICES and found["verdict"] in out
    assert (
        found["choices"][0]["timed"][2]["refused"].startswith("its error")
        and found["choices"][1]["reached"] is False
    )
    assert (
        found["before"] == {"p50_ms": 10, "scatter_ms": 0.1, "error": 1e-6}
        and found["kept"]
        and found["seconds"] == 1.5
    )
    assert {"machine", "threads", "torch_version", "date", "commit", "policy", "key"} <= set(found)
    record = json.loads(kept.read_text())["record"]
    assert record["choices"] == found["choices"] and record["verdict"] == found["verdict"]


def test_the_next_patch_uses_the_plan(
    calls: list[Any], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from smolvla_fast.testing.policies import make_policy

    assert main(TINY) == 0
    [kept] = folder.iterdir()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whose = type(calls[0]["model"]).stock_class.__module__.split(".")[0]
        policy = make_policy("tiny", origin="lerobot" if whose == "lerobot" else "ours", seed=5)
        smolvla_fast.patch(policy)
        assert smolvla_fast.status(policy).plan == plan_files.describe(Plan(CHOICES, str(kept), "2026-01-02"))
        assert main(["doctor"]) == 0
    finally:
        torch.set_num_threads(before)
    out = capsys.readouterr().out
    assert "Plans for this machine" in out and kept.name in "".join(out.split())


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_demo_and_verify_name_and_use_the_plan(
    precision: str, calls: list[Any], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "--precision", precision]) == 0
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    options = ["--size", "tiny", "--threads", "1", "--precision", precision]
    assert main(["demo", *options, "--rounds", "1", "--steps", "2", *files]) == 0
    said = json.loads((tmp_path / "a.json").read_text())["status"]["plan"]
    assert said.startswith("plan of 2026-01-02") and said in capsys.readouterr().out
    assert main(["verify", *options, "--frames", "1"]) == 0


def test_a_dry_run_keeps_nothing(calls: list[Any], folder: Path, monkeypatch, capsys) -> None:
    assert main([*TINY, "--dry-run"]) == 0
    assert calls and not folder.exists()
    assert "no plan was written: --dry-run" in capsys.readouterr().out
    monkeypatch.setenv(plan_files.CACHE_DIR, "/proc/no")
    assert main([*TINY, "--dry-run"]) == 0


def test_defaults_that_stay_are_said_and_keep_no_choice(
    calls: list[Any], folder: Path, monkeypatch, capsys
) -> None:
    finds(monkeypatch, kept=False, note="", plan=Plan({}, "tuned now", "2026-01-02"))
    assert main(TINY) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (
        "the defaults stay: no difference above the scatter; 1 of 2 choices were reached in time"
    )
    assert not any("onednn" in line and "chosen" in line for line in out.splitlines())
    [kept] = folder.iterdir()
    assert json.loads(kept.read_text())["choices"] == {}


SPARSE = {
    "no ops": dict(choices=[], before=None, after=None),
    "no time": dict(before=None, after=None, choices=[Choice("linear", "1 2>3", 1, "cpu", "cpu", False, [])]),
    "no chunk after": dict(after=None),
    "no finite error": dict(
        choices=[
            Choice("linear", "1 2>3", 1, "cpu", "torch", True, [
                Timed("cpu", 1e-4, 0.0, math.inf, 1e-7, None), Timed("torch", 1e-5, 0.0, math.nan, None, None),
            ]),
        ],
        before=ChunkTime(2430.4, 30.0, math.nan), after=ChunkTime(2290.1, 20.0, math.inf),
    ),
    "many ops": dict(choices=[
        Choice("linear_residual", f"{n} 960>2560 bfloat16 gelu_tanh", 10, "cpu", "a candidate of a long name",
               True, [Timed(each, 3.0, 0.1, 1e-7, 1e-6, None) for each in ("cpu", "a candidate of a long name")])
        for n in range(40)
    ]),
}  # fmt: skip


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_every_tuning_is_shown_drawn_and_written_as_json(
    name: str, rich: bool, calls: list[Any], tmp_path: Path, monkeypatch, capsys
) -> None:
    finds(monkeypatch, **SPARSE[name])
    monkeypatch.setattr("smolvla_fast.cli.Console", lambda: Console(rich=rich))
    path, plot = tmp_path / "a.json", tmp_path / "a.png"
    assert main([*TINY, "--json", str(path), "--plot", str(plot)]) == 0

    def no_number(text: str) -> None:
        pytest.fail(f"{text} is no JSON")

    json.loads(path.read_text(), parse_constant=no_number)
    assert plot.stat().st_size > 5000
    out = capsys.readouterr().out
    assert "None" not in out and "Traceback" not in out
    if name == "no finite error":
        assert "chunk 2,430 -> 2,290 ms (-5.8%)" in out


REFUSED = [
    *(
        (["--seconds", value], "--seconds")
        for value in ("0", "-1", "nan", "inf", "-inf", "1e9", "86401", "", "soon", "0x10")
    ),
    (["--seconds"], "--seconds"),
    (["--precision", "exact"], "has nothing to tune; accepted are auto, fp32"),
    (["--precision", "fp4"], "'exact', 'fp32'"),
    (["--backend", "abacus"], "'torch'"),
    (["--device", "mps"], "not a device"),
    (["--cameras", "0"], "--cameras"),
    (["--threads", "0"], "--threads"),
    (["--policy.path", "nowhere"], "no such folder"),
    (["--json", "FILE/a.json"], "give another --json PATH"),
    (["--json", ""], "--json"),
    (["--plot", "FILE/a.png"], "give another --plot PATH"),
    (["--plot", "FOLDER"], "give another --plot PATH"),
    (["--plot", "a.xyz"], "no kind of picture"),
    (["--plot", ""], "--plot"),
    (["--dryrun"], "did you mean --dry-run?"),
    (["--second", "3"], "did you mean --seconds?"),
    (["now"], "now"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=[repr(" ".join(words)) for words, _ in REFUSED])
def test_what_cannot_work_is_refused_before_any_work(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        pytest.fail("worked before it looked at the arguments")

    monkeypatch.setattr("smolvla_fast.cli.subject.make_policy", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("kept")
    (tmp_path / "FOLDER").mkdir()
    try:
        status = main(["tune", "--size", "tiny", *arguments])
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2 and says in message and "did not foresee" not in message, message
    assert {path.name for path in tmp_path.iterdir()} == {"FILE", "FOLDER"}


def test_a_cache_folder_that_cannot_be_written_is_said_before_any_work(
    calls: list[Any], tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(plan_files.CACHE_DIR, str(tmp_path / "file"))
    assert main(TINY) == 2 and not calls
    error = capsys.readouterr().err
    assert (
        "set SMOLVLA_FAST_CACHE_DIR to a folder that can be written, or measure alone with --dry-run" in error
    )


def test_a_disk_that_became_full_costs_the_plan_and_no_figures(
    calls: list[Any], tmp_path: Path, monkeypatch, capsys
) -> None:
    def full(*_: Any) -> None:
        raise plan_files.CannotSave("cannot write it: No space left on device; set SMOLVLA_FAST_CACHE_DIR")

    monkeypatch.setattr(plan_files, "save", full)
    assert main([*TINY, "--json", str(tmp_path / "a.json")]) == 2
    out, err = capsys.readouterr()
    assert "No space left" in err and "The whole chunk" in out
    assert json.loads((tmp_path / "a.json").read_text())["path"] is None


def test_where_stock_runs_there_is_nothing_to_tune(
    calls: list[Any], folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    assert main(TINY) == 2
    assert (
        "SMOLVLA_FAST_DISABLE is set, so every policy runs stock; unset it to tune" in capsys.readouterr().err
    )
    monkeypatch.delenv("SMOLVLA_FAST_DISABLE")
    from smolvla_fast.cli import subject

    make = subject.make_policy

    def hooked(*args: Any) -> Any:
        policy = make(*args)
        policy.model.state_proj.register_forward_hook(lambda *_: None)
        return policy

    monkeypatch.setattr(subject, "make_policy", hooked)
    assert main(TINY) == 2
    assert "nothing to tune, stock runs: " in capsys.readouterr().err
    assert not calls and not list(folder.iterdir())


def test_without_matplotlib_everything_but_the_chart_is_there(
    calls: list[Any], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "smolvla_fast.measure.plot", raising=False)
    monkeypatch.delattr("smolvla_fast.measure.plot", raising=False)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*TINY, "--plot", str(tmp_path / "a.png")]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out and not (tmp_path / "a.png").exists()


def test_doctor_names_the_folder_and_plans_that_do_not_fit(
    calls: list[Any], folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    path = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert str(folder.parent) in out.replace("\n", "") and "no plan for this machine" in out
    assert main(TINY) == 0
    [kept] = folder.iterdir()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    (folder / "torn.json").write_text("{")
    assert main(["doctor", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"plan not used here: {kept}: threads (1, here 3)" in out
    assert f"plan not used here: {folder / 'torn.json'}: it is torn, or no JSON" in out
    found = json.loads(path.read_text())
    assert found["cache_folder"] == str(folder.parent) and str(kept) in {
        row["file"] for row in found["plans"]
    }
    own = {row["file"] for row in found["plans"] if row["file"].startswith(str(folder))}
    assert own == {str(kept), str(folder / "torn.json")}, "the others ship with the package"
