"""Trackers of accelerate: what they see, what a run keeps of them, and how they end."""

from __future__ import annotations

import logging
import threading
from importlib.util import find_spec

import pytest
from support.training_runs import go_on, read

from smolvla_fast import training
from smolvla_fast.train import TrainingError
from smolvla_fast.train.checkpoint import read_run
from smolvla_fast.train.log import read_log
from smolvla_fast.training import train

pytestmark = pytest.mark.training


@pytest.fixture
def tensorboard():
    """The losses that TensorBoard has of a run, by step."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)

    def losses(folder):
        found = module.EventAccumulator(str(folder / "trackers" / "pick"))
        found.Reload()
        return {event.step: event.value for event in found.Scalars("loss")}

    return losses


def test_a_tracker_sees_what_the_log_sees(bench_top, tmp_path, tensorboard):
    bench_top.train(tmp_path, "--log_with=[tensorboard]", "--wandb.project=pick")
    assert tensorboard(tmp_path) == pytest.approx({e["step"]: e["loss"] for e in read_log(tmp_path)})


def test_a_first_step_that_fails_ends_the_trackers_and_may_be_tried_again(
    bench_top, tmp_path, monkeypatch, tensorboard
):
    flags = ("--log_with=[tensorboard]", "--wandb.project=pick")
    threads = set(threading.enumerate())

    def fail(run, batches):
        assert {*threading.enumerate()} - threads, "TensorBoard writes in a thread"
        raise RuntimeError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(training, "update", fail)
        with pytest.raises(TrainingError, match="Give a smaller --batch_size"):
            bench_top.train(tmp_path, *flags)
    assert not {*threading.enumerate()} - threads
    bench_top.train(tmp_path, *flags, "--batch_size=2")
    assert len(tensorboard(tmp_path)) == 2


def test_a_tracker_that_is_not_installed_is_refused_by_the_flag_that_asked_for_it(bench_top, tmp_path):
    asked = {"trackio": "--log_with=[trackio]", "wandb": "--wandb.enable=true"}
    absent = {name: flag for name, flag in asked.items() if find_spec(name) is None}
    if not absent:
        pytest.skip("all trackers are installed")
    for name, flag in absent.items():
        with pytest.raises(
            TrainingError, match=rf"{flag.partition('[')[0].rstrip('=')}.*: {name} is not installed"
        ):
            bench_top.train(tmp_path / "run", flag)
        assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError, match="--log_with=.*must be a list out of"):
        bench_top.settings(tmp_path / "run", "--log_with=[aim]")


def test_a_tracker_that_cannot_start_says_so_and_may_be_tried_again(bench_top, tmp_path, tensorboard):
    """A file lies where TensorBoard is to make its folder."""
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "pick").touch()
    with pytest.raises(TrainingError, match="tensorboard cannot start: .*; mend that"):
        bench_top.train(tmp_path, "--log_with=[tensorboard]", "--wandb.project=pick")
    (tmp_path / "trackers" / "pick").unlink()
    bench_top.train(tmp_path, "--log_with=[tensorboard]", "--wandb.project=pick")
    assert len(tensorboard(tmp_path)) == 2


def test_a_tracker_s_own_sentence_is_said_beside_its_cause(bench_top, tmp_path, monkeypatch, tensorboard):
    from accelerate.tracking import TensorBoardTracker

    def start(tracker):
        try:
            raise ConnectionError("no route")
        except ConnectionError as error:
            raise RuntimeError("the account is\nclosed") from error

    monkeypatch.setattr(TensorBoardTracker, "start", start)
    with pytest.raises(
        TrainingError, match=r"cannot start: the account is closed \(ConnectionError: no route\)"
    ):
        bench_top.train(tmp_path / "run", "--log_with=[tensorboard]")


def test_the_id_that_wandb_made_goes_on(bench_top, tmp_path):
    pytest.importorskip("wandb")
    settings = bench_top.settings(tmp_path, "--wandb.enable=true", "--wandb.mode=offline")
    train(settings)
    made = read_run(tmp_path / "checkpoints" / "last")["settings"]["wandb"]["run_id"]
    assert made and settings.wandb.run_id is None
    assert read(["--resume=true", f"--output_dir={tmp_path}", "--steps=3"])[0].wandb.run_id == made
    go_on(tmp_path, "--steps=3")
    assert len([*(tmp_path / "trackers" / "wandb").glob(f"offline-run-*-{made}")]) == 2
