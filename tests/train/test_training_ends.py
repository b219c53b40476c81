"""How a run shows itself and ends: bar, log, curve, a folder that is in use, the same command again with --resume."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import sys

import pytest
from support.training_runs import resume, state_files

from smolvla_fast.cli import main
from smolvla_fast.cli.train import draw
from smolvla_fast.measure.console import Console
from smolvla_fast.train import TrainingError
from smolvla_fast.train.data import training_batches
from smolvla_fast.train.log import Window, read_log
from smolvla_fast.training import train, update

pytestmark = pytest.mark.training


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_samples_a_second_and_what_is_left(bench_top, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert bench_top.command(tmp_path / "run") == 0
    last = terminal.getvalue().split("\r")[-1]
    # tqdm's [elapsed<left, rate], then ours
    assert re.search(
        r"2/2 \[\d\d:\d\d<\d\d:\d\d, .*loss=\d+\.\d{4}, grad norm=[\d.e-]+, samples/s=[\d.e+]+\]", last
    )


def test_progress_prints_lines_without_a_terminal(bench_top, tmp_path, capsys, monkeypatch):
    """And the log: 4 samples a step, over the seconds that steps are said to have taken."""
    monkeypatch.setattr("smolvla_fast.cli.train.draw", lambda *_: None)  # takes longer than such a run
    assert bench_top.command(tmp_path / "run", "--log_freq=1") == 0
    lines = re.findall(
        r"^step +(\d) of 2 .* ([\d.e+]+) samples/s  0:00:\d\d left$", capsys.readouterr().out, re.M
    )
    log = read_log(tmp_path / "run")
    assert [int(step) for step, _ in lines] == [entry["step"] for entry in log] == [1, 2]
    for entry, (_, said) in zip(log, lines, strict=True):
        assert entry["samples_per_s"] == pytest.approx(4 / (entry["data_s"] + entry["update_s"]))
        assert float(said) == pytest.approx(entry["samples_per_s"], rel=0.01)  # three digits


def test_a_window_is_samples_over_seconds():
    window = Window()
    window.add(8, loss=1.0, data_s=0.5, update_s=1.5)
    window.add(8, loss=3.0, data_s=0.5, update_s=1.5)
    assert window.means() == {"loss": 2.0, "data_s": 0.5, "update_s": 1.5, "samples_per_s": 4.0}


def test_steps_behind_the_last_line_due_are_logged_and_drawn(bench_top, tmp_path, capsys):
    bench_top.train(tmp_path / "run", "--steps=3", "--log_freq=2")
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [2, 3]
    assert bench_top.command(tmp_path / "short", "--log_freq=200") == 0
    assert [entry["step"] for entry in read_log(tmp_path / "short")] == [2]
    assert (tmp_path / "short" / "train_log.png").stat().st_size > 0
    capsys.readouterr()
    for flags, says in ((["--log_freq=0"], ", as --log_freq=0 asks for\n"), (["--log_freq=200"], "\n")):
        draw(bench_top.settings(tmp_path / "silent", *flags), Console(rich=False))
        assert capsys.readouterr().out == f"no curve: no step was logged{says}"


@pytest.mark.parametrize("way", ["diverges", "by hand"])
def test_a_run_that_stops_keeps_its_log_and_curve(way, bench_top, tmp_path, monkeypatch):
    from smolvla_fast import training

    calls = iter(range(9))

    def stop(*arguments):
        if next(calls) == 2:
            raise TrainingError("loss nan") if way == "diverges" else KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(training, "update", stop)
    status = bench_top.command(tmp_path / "run", "--steps=5", "--log_freq=200")
    assert status == (2 if way == "diverges" else 130)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [2]
    assert (tmp_path / "run" / "train_log.png").exists()


def test_a_module_that_a_callback_lacks_is_not_advised_to_be_installed(bench_top, tmp_path):
    def lacks(run):
        import lerobot.no_such_module  # noqa: F401

    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        train(bench_top.settings(tmp_path / "run"), on_begin=lacks)


def test_a_missing_package_is_said_with_what_installs_it(bench_top, tmp_path, monkeypatch):
    settings = bench_top.settings(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(TrainingError, match=r'accelerate.*pip install "smolvla_fast\[train\]"'):
        train(settings)


def test_a_run_that_has_ended_says_so(bench_top, tmp_path):
    run = train(bench_top.settings(tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"this run has ended.*prepare\(settings\)"):
        update(run, training_batches(run.settings, run.data.train, run.step))


def test_a_finished_run_is_not_overwritten_from_python(bench_top, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    before = state_files(folder)
    with pytest.raises(TrainingError, match="is there already and would be overwritten"):
        train(dataclasses.replace(bench_top.settings(tmp_path / "unused"), output_dir=folder))
    assert state_files(folder) == before


def test_the_same_command_resumes_and_settings_stay_as_they_were(bench_top, finished, tmp_path, capsys):
    """Features that are asked of the dataset are filled in by the first run; so asked for again, they are the same."""
    flags = (
        f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}",
        "--policy.input_features=null", "--policy.output_features=null", "--save_freq=1",
    )  # fmt: skip
    settings = bench_top.settings(tmp_path / "run", *flags)
    train(settings)
    end = tmp_path / "run" / "checkpoints" / "000002"
    kept = state_files(end)
    shutil.rmtree(end)
    assert main(["train", "--resume=true", *bench_top.flags(tmp_path / "run", *flags)]) == 0
    assert state_files(end) == kept
    asked = json.loads((end / "training_state" / "run.json").read_text())["asked"]["policy"]
    assert asked["input_features"] is None and settings.policy.input_features is None
    assert resume(tmp_path / "run", '--policy.input_features={"x":1}') == 2
    assert "policy.input_features" in capsys.readouterr().err


def test_a_processor_cut_short_is_said_on_resume(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    path = folder / "checkpoints" / "000004" / "pretrained_model" / "policy_preprocessor.json"
    for change in (lambda: path.write_bytes(path.read_bytes()[:20]), path.unlink):
        change()
        assert resume(folder, "--steps=5") == 2
        message = capsys.readouterr().err
        assert "policy_preprocessor.json" in message and "--config_path" in message


def test_without_a_seed_the_order_is_that_of_seed_0(bench_top, tmp_path):
    """As in LeRobot, where an order is a function of seed and epoch alone."""
    data = bench_top.prepare(tmp_path / "data").data.train
    orders = {}
    for seed in ("null", "0", "1"):
        settings = bench_top.settings(tmp_path / seed, f"--seed={seed}")
        orders[seed] = next(training_batches(settings, data, 0))["index"].tolist()
    assert orders["null"] == orders["0"] != orders["1"]
