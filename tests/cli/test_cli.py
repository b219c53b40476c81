"""The commands on a tiny policy, through ``main``: what they print, write and return, and how they refuse."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from support.recordings import no_pictures

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.measure.console import Console
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops.select import BACKENDS
from smolvla_fast.testing.policies import make_policy

__all__ = ["no_pictures"]

TINY = ["--size", "tiny", "--steps", "3", "--threads", "1"]


@pytest.fixture
def lerobot() -> None:
    pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla", reason="the policy is LeRobot's")


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hide(*names): importing these fails, as where they are not installed."""

    def hidden(*names: str) -> None:
        real, find = builtins.__import__, sys.modules["importlib.util"].find_spec

        def fail(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] in names:
                raise ImportError(f"No module named {name!r}")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fail)
        monkeypatch.setattr(
            "smolvla_fast.cli.subject.find_spec", lambda name: None if name in names else find(name)
        )
        for module in [
            m for m in sys.modules if m.split(".")[0] in names or m == "smolvla_fast.measure.plot"
        ]:
            monkeypatch.delitem(sys.modules, module)

    return hidden


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines with which `bench` would have started pytest. None is started, so nothing is timed."""
    commands: list[list[str]] = []

    from benchmarks.harness import run

    def record(command: list[str], seconds: float, environment: dict[str, str]) -> Any:
        commands.append(command)
        return run.Ended(0, 1.0, [])

    monkeypatch.setattr(run, "execute", record)
    monkeypatch.setattr("smolvla_fast.cli.bench.find_spec", lambda name: name)
    return commands


@pytest.mark.check(3)
def test_doctor_shows_and_writes_its_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", str(tmp_path / "doctor.json")]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert list(found["quantized"]) == ["fp8", "int8", "int16"]
    for word in (
        "torch",
        "lerobot",
        "C++ compiler",
        "nvcc",
        "cpu extension",
        "masked_attention",
        found["serves"],
    ):
        assert word in out
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"op", "backend", "available", "reason"} == set(found["backends"][0])
    for cell in found["backends"]:
        assert cell["available"] or cell["reason"], (
            f"{cell['op']} on {cell['backend']}: empty without a reason"
        )


def test_doctor_without_lerobot_compiler_and_extension(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import metadata

    from smolvla_fast.ops import extension

    version = metadata.version

    def missing(name: str) -> str:
        if name == "lerobot":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", missing)
    monkeypatch.setattr("smolvla_fast.measure.system.first_line", lambda *args: None)
    monkeypatch.setattr(extension, "available", lambda kind: False)
    monkeypatch.setattr(extension, "why_missing", lambda kind: f"no {kind} compiler on this path")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out and "none found" in out
    assert "no cpu compiler on this path" in out
    assert "smolvla_fast[lerobot]" in out


@pytest.mark.parametrize(("number", "words"), [(1, "torch uses 1 thread"), (3, "torch uses 3 threads")])
def test_doctor_counts_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, words: str
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: number)
    monkeypatch.setattr("smolvla_fast.cli.Console", lambda: Console(rich=False))
    assert main(["doctor"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("processor"))
    assert row.endswith(words)


@pytest.mark.parametrize("command", ["doctor", pytest.param("--help", marks=pytest.mark.long)])
def test_a_closed_pipe_ends_a_command_without_traceback(command: str) -> None:
    """As under `doctor | head -1`, but with the pipe closed before the first line, so that no race decides."""
    reading, writing = os.pipe()
    os.close(reading)
    code = f"import sys; sys.modules['rich'] = None; from smolvla_fast.cli import main; sys.exit(main([{command!r}]))"
    # Buffered, as on a terminal's pipe: what is left in the buffer is written once more when the interpreter exits.
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


KEYS = {
    "lerobot_version", "torch_version", "precision", "backend", "stock_ms", "fast_ms", "ratio", "rel_l2", "max_abs",
    "stages", "machine", "cpu", "threads", "cameras", "steps", "raw", "peak_bytes", "date", "commit", "status",
}  # fmt: skip


@pytest.mark.parametrize(("precision", "bound"), [("auto", 1e-5), ("exact", 0.0), ("bf16", 0.1)])
def test_demo_measures_and_writes_its_figures(
    lerobot: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str, bound: float
) -> None:
    path, plot = tmp_path / "out" / "demo.json", tmp_path / "out" / "demo.png"
    before = torch.get_num_threads()
    options = ["--precision", precision, "--rounds", "2", "--cameras", "1"]
    assert main(["demo", *TINY, *options, "--json", str(path), "--plot", str(plot)]) == 0
    assert torch.get_num_threads() == before
    found = json.loads(path.read_text())
    assert set(found) >= KEYS
    assert found["precision"] == {"auto": "fp32"}.get(precision, precision)
    assert (found["cameras"], found["steps"], found["threads"]) == (1, 3, 1)
    assert len(found["raw"]["stock_ms"]) == len(found["raw"]["fast_ms"]) == 2
    assert found["ratio"] == pytest.approx(found["stock_ms"] / found["fast_ms"])
    # bf16 rounds at 4e-3 and a tiny policy amplifies it over three steps; fp32 sums in another order.
    assert found["rel_l2"] <= bound and (found["rel_l2"] > 0 or precision == "exact")
    assert set(found["stages"]) == {"vision", "prefix", "denoise", "other"}
    assert all(figures["stock_ms"] >= 0 and figures["fast_ms"] >= 0 for figures in found["stages"].values())
    assert found["status"]["active"] and found["status"]["calls_stock"] == 0
    if find_spec("matplotlib"):
        assert plot.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr()
    assert "whole chunk" in out.out and "Error against stock" in out.out
    assert "round 2 of 2" in out.err
    assert ("every bit the same" in out.out) == (precision == "exact")
    assert f"{found['precision']} keeps its bound" in out.out


def test_demo_compares_chunks_of_one_state(lerobot: None, tmp_path: Path) -> None:
    """LeRobot decodes the state of an Aloha robot in place, at every call: each chunk is to begin from the one drawn."""
    aloha = dict(adapt_to_pi_aloha=True, state_dim=14, action_dim=14, num_steps=2)
    make_policy("tiny", folder=tmp_path / "vlm", **aloha).save_pretrained(tmp_path / "policy")
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    options = ["--threads", "1", "--rounds", "1", "--precision", "exact", "--policy.path"]
    assert main(["demo", *options, str(tmp_path / "policy"), *files]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["max_abs"] == 0


def test_demo_says_when_the_fast_path_did_not_run(
    lerobot: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["demo", *TINY, "--rounds", "1", *files]) == 3
    out = capsys.readouterr().out
    assert "nothing was compared: SMOLVLA_FAST_DISABLE is set" in out and "ratio" not in out
    assert not (tmp_path / "a.json").exists()


def test_demo_gives_no_times_for_a_wrong_chunk(
    lerobot: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from smolvla_fast.inference import Engine

    act = Engine.act
    monkeypatch.setattr(Engine, "act", lambda *args, **kwargs: 1.001 * act(*args, **kwargs))
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["demo", *TINY, "--rounds", "1", *files]) == 1
    out = capsys.readouterr().out
    assert "in fp32 the patched chunk is not stock's: off by 0.001, accepted is 1e-05" in out
    assert "ms" not in out and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("command", ["demo", "verify"])
def test_a_chunk_of_stock_that_is_not_finite_is_not_blamed_on_the_patch(
    lerobot: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    from smolvla_fast.cli import subject

    def broken(args: Any, device: Any, make: Any = subject.make_policy) -> Any:
        policy = make(args, device)
        policy.model.action_out_proj.bias.data[0] = float("nan")
        return policy

    monkeypatch.setattr(subject, "make_policy", broken)
    assert main([command, *TINY]) == 2
    out = capsys.readouterr()
    assert (
        "stock's own chunk is not finite: the weight action_out_proj.bias holds NaN or infinity. Check the checkpoint"
        in out.err
    )
    assert "FAILED" not in out.out and "ms" not in out.out


def test_demo_without_rich_and_matplotlib(
    lerobot: None, tmp_path: Path, hide: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    hide("rich", "matplotlib")
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["demo", *TINY, "--rounds", "1", *files]) == 0
    out = capsys.readouterr().out
    assert "matplotlib is not installed" in out and "smolvla_fast[cli]" in out
    assert "----" in out, "the plain table's rule"
    assert not (tmp_path / "a.png").exists()


def test_verify_judges_each_observation(
    lerobot: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "verify.json"
    assert main(["verify", *TINY, "--frames", "2", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    (tier,) = found["tiers"]
    assert found["passed"] and tier["within"] == len(tier["frames"]) == 2
    first, second = (frame["rel_l2"] for frame in tier["frames"])
    assert first != second, "two observations, not one twice"
    assert {joint["unit"] for joint in found["joints"]} == {"normalised units"}, "no recording, no units"
    assert "Passed: auto (fp32) keeps its bound on all 2 frames" in capsys.readouterr().out


def test_verify_fails_with_status_1(
    lerobot: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong operation of the engine, here a value off by a thousandth, must show in the exit status."""
    from smolvla_fast.inference import Engine

    act = Engine.act
    monkeypatch.setattr(Engine, "act", lambda *args, **kwargs: 1.001 * act(*args, **kwargs))
    assert main(["verify", *TINY, "--frames", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def save_unscaled(policy: Any, folder: Path) -> None:
    """A checkpoint that needs no processors: nothing of it is normalised."""
    modes = policy.config.normalization_mapping
    policy.config.normalization_mapping = dict.fromkeys(modes, type(modes["STATE"])("IDENTITY"))
    policy.save_pretrained(folder)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("layout", ["auto", "fp32"])
def test_verify_reads_a_saved_policy(lerobot: None, tmp_path: Path, layout: str) -> None:
    from smolvla_fast.testing.policies import make_policy

    save_unscaled(make_policy("tiny", folder=tmp_path / "vlm", cameras=3, num_steps=3), tmp_path / "policy")
    path, options = tmp_path / "verify.json", ["--frames", "1", "--cameras", "2", "--layout", layout]
    command = ["verify", "--policy.path", str(tmp_path / "policy"), "--threads", "1", "--json", str(path)]
    assert main([*command, *options]) == 0
    assert json.loads(path.read_text())["policy"]["source"] == str(tmp_path / "policy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu: not a device; accepted are auto, cpu, cuda, cuda:N"),
        (["--cameras", "abc"], "--cameras abc: not counts of cameras; accepted are whole numbers above 0"),
        (["--cameras", "0"], "--cameras 0: not counts of cameras"),
        (["--cameras", "1,,2"], "--cameras 1,,2: not counts of cameras"),
    ],
)
def test_bench_refuses_before_it_starts_pytest(
    started: list[list[str]], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_refuses_a_gpu_that_is_not_there(
    lerobot: None,
    started: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no CUDA GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # The second is more than torch.device itself can hold.
    for name in ("cuda:2", "cuda:99999999999"):
        assert main([command, "--device", name]) == 2
        assert f"--device {name}: no such GPU; accepted here are cuda:0 to cuda:1" in capsys.readouterr().err
    assert not started


@pytest.mark.parametrize(
    ("arguments", "suites"),
    [
        ([], ["chunk", "stages", "ops"]),
        (["ops"], ["ops"]),
        (["--suite", "ops"], ["ops"]),
        (["--suite", "ops", "--suite", "chunk"], ["ops", "chunk"]),
        (["ops", "stages", "--suite", "ops"], ["ops", "stages"]),
    ],
)
def test_bench_suites_by_place_and_by_option(
    started: list[list[str]], tmp_path: Path, arguments: list[str], suites: list[str]
) -> None:
    assert main(["bench", *arguments, "--json", str(tmp_path / "a.json")]) == 2, "nothing was timed"
    assert [Path(word).stem for command in started for word in command if word.endswith(".py")] == suites


def test_bench_keeps_an_earlier_report_where_nothing_was_timed(
    started: list[list[str]], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text("earlier figures")
    assert main(["bench", "ops", "--json", str(path)]) == 2 and started
    assert path.read_text() == "earlier figures" and list(tmp_path.iterdir()) == [path]


def test_bench_replaces_an_earlier_report_by_what_it_has_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.harness import run

    def visit(
        parts: Any, path: Path, minutes: float, environment: Any, facts: dict[str, Any]
    ) -> dict[str, Any]:
        data = {"machine_info": {"smolvla_fast": {**facts, "threads": 2}}, "parts": [], "interrupted": False}
        data["benchmarks"] = [{"group": "other", "extra_info": {}}]
        path.write_text(json.dumps(data))
        return data

    monkeypatch.setattr(run, "visit", visit)
    path = tmp_path / "a.json"
    path.write_text("earlier figures")
    assert main(["bench", "ops", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["benchmarks"] and path.with_suffix(".md").is_file()
    assert not list(tmp_path.glob("*unfinished*"))


def test_bench_hands_on_device_and_cameras(started: list[list[str]], tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--cameras", "1, 3", "--json", str(tmp_path / "a.json")]
    assert main(["bench", *arguments]) == 2, "nothing was timed"
    assert {"--device=cpu", "--cameras=1,3"} <= set(started[0])


@pytest.mark.parametrize(
    ("command", "option"),
    [("doctor", "--json"), ("demo", "--json"), ("demo", "--plot"), ("verify", "--json"), ("bench", "--json")],
)
def test_refuses_a_file_it_cannot_write_before_any_work(
    lerobot: None,
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    option: str,
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        pytest.fail("worked before it looked at the path")

    monkeypatch.setattr("smolvla_fast.cli.subject.make_policy", work)
    monkeypatch.setattr("smolvla_fast.measure.system.facts", work)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for path, reason in [
        (tmp_path / "file" / "a.json", "File exists|Not a directory"),
        (tmp_path, "Is a directory"),
        (Path("/"), "Is a directory"),
        (Path("/proc/no/such.json"), "No such file"),
    ]:
        assert main([command, option, str(path)]) == 2
        error = capsys.readouterr().err
        assert f"cannot write {path}: " in error and f"give another {option} PATH" in error
        assert any(word in error for word in reason.split("|"))
    assert not started
    assert {path.name for path in tmp_path.iterdir()} == {"file"}, "looking at a path leaves no file behind"


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"{smolvla_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [["dance"], []])
def test_usage_errors_have_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["demo", "verify"])
def test_help_names_every_backend_and_tier(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"{', '.join(('auto', *BACKENDS))} (default: auto)" in text
    assert f"{', '.join(('auto', *TIERS))} (default: auto)" in text
