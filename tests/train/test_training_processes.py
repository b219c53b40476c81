"""Several processes train as one with as large a batch: the same losses, whoever is killed, and one goes on from two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.training_runs import go_on

from smolvla_fast.train import TrainingError
from smolvla_fast.train.checkpoint import Checkpoints, read_run
from smolvla_fast.train.data import Shares, frames_of, share
from smolvla_fast.train.log import read_log
from smolvla_fast.train.processes import own_accelerate
from smolvla_fast.train.resume import batch_size_of

pytestmark = pytest.mark.training

PATIENCE = 240
# 23 frames and 8 samples a step: each third step ends an epoch with 7, which two processes share as 3 and 4.
RUN = (
    "--dataset.episodes=[0,1]",
    "--dataset.eval_split=0.5",
    "--eval_steps=3",
    "--save_freq=3",
    "--steps=40",
)


def losses(folder) -> dict[tuple[int, str], float]:
    return {
        (e["step"], k): e[k] for e in read_log(folder) for k in ("loss", "grad_norm", "eval_loss") if k in e
    }


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_from_a_kill(bench_top, tmp_path, caplog):
    """torchrun's two gloo processes on a CPU; ``accelerate launch --multi_gpu`` starts them the same way."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bench_top.train(whole, *RUN, "--batch_size=8")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "-m",
        "smolvla_fast.cli",
        "train",
    ]
    flags = bench_top.flags(parts, *RUN, "--batch_size=4", "--log_freq=1")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen(
        [*launch, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        until = time.monotonic() + PATIENCE
        while not (parts / "checkpoints" / "000006").exists():
            assert process.poll() is None and time.monotonic() < until, process.communicate()[0].decode()[
                -4000:
            ]
            time.sleep(0.05)
        workers = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
    last = Checkpoints(parts).last()
    assert last is not None and 6 <= int(last.name) < 40 and read_run(last)["processes"] == 2
    begun, expected = losses(parts), losses(whole)
    assert {(6, "loss"), (6, "eval_loss")} <= begun.keys()
    # Two processes add gradients in another order than one; AdamW carries that difference from step to step.
    assert begun == pytest.approx({key: expected[key] for key in begun}, rel=1e-3)
    go_on(parts)
    assert "resumed by 1 processes, begun by 2: batch_size is 8 now" in caplog.text
    assert losses(parts) == pytest.approx(expected, rel=1e-3)
    assert read_run(parts / "checkpoints" / "last")["processes"] == 1


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
