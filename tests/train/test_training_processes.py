"""Several processes train as one with as large a batch: the same losses, whoever is killed, and one goes on from two."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import support.training_runs
from support.training_runs import go_on

from smolvla_fast import training
from smolvla_fast.train import TrainingError
from smolvla_fast.train.checkpoint import Checkpoints, read_run
from smolvla_fast.train.data import Shares, frames_of, share
from smolvla_fast.train.log import read_log
from smolvla_fast.train.processes import make_accelerator, own_accelerate
from smolvla_fast.train.resume import batch_size_of

pytestmark = pytest.mark.training

PATIENCE = 240
# 23 frames and 8 samples a step: each third step ends an epoch with 7, which two processes share as 3 and 4.
RUN = (
    "--dataset.episodes=[0,1]",
    "--dataset.eval_split=0.5",
    "--eval_steps=3",
    "--save_freq=3",
    "--steps=9",
)
DYING = str(Path(support.training_runs.__file__).with_name("dying_process.py"))
TORCHRUN = ("torch.distributed.run", "--nproc_per_node=2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes=2")


def launch(*command: str) -> tuple[int, str]:
    """Exit status and output of a launcher."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    return done.returncode, done.stdout


def losses(folder) -> dict[tuple[int, str], float]:
    return {
        (e["step"], k): e[k] for e in read_log(folder) for k in ("loss", "grad_norm", "eval_loss") if k in e
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "rank", "point", "kept", "steps"),
    [
        pytest.param(TORCHRUN, "1", "step:8", "000006", 6, id="torchrun, in a step", marks=pytest.mark.long),
        # The log has the step whose checkpoint was begun.
        pytest.param(ACCELERATE, "0", "save:2", "000003", 6, id="accelerate, in a checkpoint"),
    ],
)
def test_two_processes_train_as_one_and_one_goes_on_from_a_kill(
    bench_top, tmp_path, caplog, launcher, rank, point, kept, steps
):
    """Two gloo processes on a CPU, of which one dies by kill -9; those of accelerate share a folder of image tokens."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bench_top.train(whole, *RUN, "--batch_size=8")
    shared = [f"--image_cache_dir={tmp_path / 'tokens'}"] if launcher == ACCELERATE else []
    flags = bench_top.flags(parts, *RUN, "--batch_size=4", "--log_freq=1", *shared)
    status, said = launch(*launcher, DYING, rank, point, "train", *flags)
    assert status != 0 and "SIGKILL" in said, said[-4000:]
    last = Checkpoints(parts).last()
    assert last is not None and last.name == kept and read_run(last)["processes"] == 2
    assert [*(parts / "checkpoints").glob(".0*")] == (
        [parts / "checkpoints" / ".000006.partial"] if rank == "0" else []
    )
    begun, expected = losses(parts), losses(whole)
    assert {(steps, "loss"), (3, "eval_loss")} <= begun.keys()
    # Two processes add gradients in another order than one; AdamW carries that difference from step to step.
    assert begun == pytest.approx({key: expected[key] for key in begun}, rel=1e-3)
    go_on(parts)
    assert "processes: 1 now, 2 at the checkpoint: batch_size is 8 now" in caplog.text
    assert losses(parts) == pytest.approx(expected, rel=1e-3)
    assert read_run(parts / "checkpoints" / "last")["processes"] == 1


@pytest.mark.long
@pytest.mark.slow
def test_accelerates_launcher_starts_one_process_on_a_cpu_and_the_command_says_so(bench_top, tmp_path):
    flags = bench_top.flags(tmp_path / "run", "--steps=1")
    command = ("accelerate.commands.launch", "--cpu", "--num_processes=2", "-m", "smolvla_fast.cli", "train")
    status, said = launch(*command, *flags)
    assert status == 0, said[-4000:]
    assert "was to start several processes, and this one is alone: --batch_size=4 is all of a step" in said
    assert read_run(tmp_path / "run" / "checkpoints" / "last")["processes"] == 1


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_processes_without_a_common_seed_are_refused(bench_top, tmp_path, monkeypatch, capsys):
    """This process and a fork of it, as a launcher's two."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def command(rank):
        for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        return bench_top.command(tmp_path / "run", "--seed=null")

    other = multiprocessing.get_context("fork").Process(target=lambda: os._exit(command(1)))
    other.start()
    assert command(0) == 2 and "--seed=null: 2 processes need one seed" in capsys.readouterr().err
    other.join(PATIENCE)
    assert other.exitcode == 2 and not (tmp_path / "run").exists()


def test_a_launch_for_another_device_than_the_policys_is_refused(bench_top, tmp_path, monkeypatch):
    """``accelerate launch --cpu`` sets the variable."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    settings = bench_top.settings(tmp_path / "run")
    settings.policy.device = "cuda"
    with (
        own_accelerate(),
        pytest.raises(TrainingError, match="--policy.device=cuda, and accelerate was launched for cpu"),
    ):
        make_accelerator(settings)


@pytest.mark.parametrize("ends", ["well", "by an error"])
def test_a_process_group_that_was_there_stays(bench_top, tmp_path, ends):
    from torch import distributed

    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        if ends == "well":
            bench_top.train(tmp_path / "run")
        else:
            with own_accelerate(), suppress(KeyError):
                raise KeyError
        assert distributed.is_initialized()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_a_process_group_of_the_run_goes_with_an_error(bench_top, tmp_path, monkeypatch):
    """As a launcher's only process, which dies of an error in its first step."""
    from torch import distributed

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")

    def fail(run, batches):
        assert distributed.is_initialized()
        raise ValueError("broken")

    monkeypatch.setattr(training, "update", fail)
    with pytest.raises(ValueError, match="broken"):
        bench_top.train(tmp_path / "run")
    assert not distributed.is_initialized()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_shares_are_the_batches_of_one_process(bench_top, tmp_path, processes):
    settings = bench_top.settings(tmp_path / "run", "--batch_size=2")
    frames = 23
    parts = [list(Shares(range(frames), 2, (index, processes))) for index in range(processes)]
    assert len({len(part) for part in parts}) == 1, "a process without a share would leave the others waiting"
    for number, batches in enumerate(zip(*parts, strict=True)):
        count = frames_of(settings, frames, number, processes)
        counted = [
            batch[: len(range(count)[share(count, (i, processes))])] for i, batch in enumerate(batches)
        ]
        first = number * 2 * processes
        assert [row for batch in counted for row in batch] == list(range(first, first + count))
        assert all(batches)
    assert frames_of(settings, frames, len(parts[0]), processes) == min(frames, 2 * processes), (
        "the next epoch"
    )


def test_a_batch_that_cannot_be_shared_equally_is_refused_on_resume(bench_top, tmp_path):
    settings = bench_top.settings(tmp_path / "run", "--batch_size=3")
    assert batch_size_of(settings, 2, 3) == 2
    with pytest.raises(
        TrainingError, match="begun by 2 processes with --batch_size=3, 6 samples together, which 4"
    ):
        batch_size_of(settings, 2, 4)


def test_the_callers_accelerator_comes_back(bench_top, tmp_path):
    """accelerate has one state a process, which a run replaces by its own."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    with own_accelerate():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        bench_top.train(tmp_path)
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)
