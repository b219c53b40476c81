"""Checkpoints: what goes on from one ends at the same bits, kills and full disks lose nothing, LeRobot reads them."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from lerobot.optim import optimizers
from support.training_runs import go_on, lerobot_command, resume, same, state_files, weights

from smolvla_fast.train import TrainingError
from smolvla_fast.train import checkpoint as files
from smolvla_fast.train.checkpoint import Checkpoints
from smolvla_fast.train.data import training_batches
from smolvla_fast.train.log import read_log
from smolvla_fast.train.random_state import seeded
from smolvla_fast.training import update, write_checkpoint

pytestmark = [pytest.mark.training, pytest.mark.usefixtures("no_curve")]

# One episode has 22 to 33 frames: with 10 samples a step, one of five steps begins another epoch.
LONG = ("--dataset.episodes=[0]", "--batch_size=10", "--policy.scheduler_warmup_steps=2")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), id="ours"),
        pytest.param(("--gradient_accumulation_steps=2", "--batch_size=5"), id="accumulated"),
        pytest.param(("--implementation=lerobot",), id="lerobot"),
        pytest.param(
            ("--dtype=bf16", "--dataset.episodes=[0,1]", "--dataset.eval_split=0.5", "--eval_steps=2"),
            id="bf16-evaluated",
        ),
        # Two steps see most frames of the one episode; gone on from there, they are encoded anew, beside other ones: as
        # those of a folder in test_known_frames.py.
        pytest.param(("--image_cache=100000000",), id="image-cache", marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_ends_at_the_same_bits(bench_top, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bench_top.train(whole, *LONG, *options, "--steps=5")
    # As if it had been stopped after 2 of 5 steps: the schedule is that of the whole run.
    bench_top.train(parts, *LONG, *options, "--steps=5", "--save_freq=2")
    shutil.rmtree(parts / "checkpoints" / "000004")
    shutil.rmtree(parts / "checkpoints" / "000005")
    torch.manual_seed(99)  # a resumed process starts anywhere
    go_on(parts)

    one, two = (folder / "checkpoints" / "000005" for folder in (whole, parts))
    # Weights, optimizer, scheduler, random state, processors, step.
    assert state_files(one) == state_files(two)
    kept = ("step", "loss", "grad_norm", "lr", "eval_loss")
    logs = [[{k: e[k] for k in kept if k in e} for e in read_log(folder)] for folder in (whole, parts)]
    assert logs[0] == logs[1]
    assert len({entry["loss"] for entry in logs[0] if "loss" in entry}) == 5


def test_resume_takes_weights_optimizer_schedule_random_state_and_place(bench_top, finished, tmp_path):
    """Each of them from the checkpoint: with any one of another step the end is another."""
    ends = {}
    for broken in (
        "nothing",
        files.OPTIMIZER,
        files.SCHEDULER,
        files.RANDOM,
        files.STEP,
        "model.safetensors",
    ):
        folder = copy_of(finished, tmp_path / broken)
        early, late = folder / "checkpoints" / "000002", folder / "checkpoints" / "000004"
        if broken != "nothing":
            part = files.PRETRAINED if broken.startswith("model") else files.STATE
            shutil.copy(late / part / broken, early / part / broken)
        shutil.rmtree(late)
        if broken == files.STEP:
            (early / files.STATE / files.STEP).write_text('{"step": 3}')
        go_on(folder)
        ends[broken] = weights(folder / "checkpoints" / "000004")
    assert same(ends.pop("nothing"), weights(finished / "checkpoints" / "000004"))
    original = weights(finished / "checkpoints" / "000004")
    assert [name for name, end in ends.items() if same(end, original)] == []


@pytest.mark.parametrize(("begun", "gone_on"), [("on", "off"), ("off", "on")])
def test_resume_chooses_how_to_compute_an_update_anew(bench_top, tmp_path, begun, gone_on):
    """AdamW's state serves either; a checkpoint says no more of ``fused`` than LeRobot's, whose default it leaves alone."""
    run = bench_top.prepare(tmp_path / "run", f"--fast={begun}", steps=1)
    write_checkpoint(run, folder := tmp_path / "checkpoint")
    [group] = json.loads((folder / files.STATE / files.GROUPS).read_text())
    assert group["fused"] is None
    other = bench_top.prepare(tmp_path / "other", f"--fast={gone_on}")
    assert files.load_state(folder, other.optimizer, other.scheduler) == 1
    assert other.optimizer.param_groups[0]["fused"] is (True if gone_on == "on" else None)
    update(other, training_batches(other.settings, other.data.train, 1))
    assert {int(state["step"]) for state in other.optimizer.state.values()} == {2}


def test_a_checkpoint_from_before_some_settings_is_resumed(finished, tmp_path):
    folder = copy_of(finished, tmp_path / "run")
    path = folder / "checkpoints" / "000004" / files.STATE / files.RUN
    facts = json.loads(path.read_text())
    for name in ("wandb", "peft", "log_with"):
        del facts["settings"][name], facts["asked"][name]
    del facts["processes"]
    path.write_text(json.dumps(facts))
    assert resume(folder, "--steps=5", "--wandb.mode=offline") == 0
    assert files.read_run(folder / "checkpoints" / "000005")["settings"]["wandb"]["mode"] == "offline"


def test_more_steps_are_allowed_and_anything_else_is_not(bench_top, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    before = state_files(folder / "checkpoints" / "000004")
    for flag in (
        "--batch_size=3",
        "--policy.optimizer_lr=0.5",
        "--seed=1",
        "--policy.chunk_size=4",
        "--dtype=bf16",
    ):
        assert resume(folder, flag) == 2
        name, value = flag.removeprefix("--").split("=")
        message = capsys.readouterr().err
        assert (
            name in message
            and f"{value} asked for" in message.replace("'", "")
            and "--policy.path=" in message
        )
    assert resume(folder, "--batch_size=4", "--steps=5") == 0  # the same is no other configuration
    assert state_files(folder / "checkpoints" / "000004") == before
    assert os.readlink(folder / "checkpoints" / "last") == "000005"
    assert [entry["step"] for entry in read_log(folder)] == [1, 2, 3, 4, 5]


def test_resume_on_other_data_is_refused(bench_top, finished, tmp_path, capsys):
    from smolvla_fast.testing.dataset import write_dataset

    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    write_dataset(tmp_path / "other", episodes=3, frame=(16, 24))
    assert resume(folder, f"--dataset.root={tmp_path / 'other'}", "--steps=5") == 2
    assert f"{bench_top.frames} when" in capsys.readouterr().err


def test_a_checkpoint_before_the_last_can_be_gone_on_from(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    end = state_files(folder / "checkpoints" / "000004")
    config = folder / "checkpoints" / "000002" / "pretrained_model" / "train_config.json"
    assert resume(folder, f"--config_path={config}") == 0
    assert state_files(folder / "checkpoints" / "000004") == end, "written again"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["000002", "000004", "last"]
    assert resume(folder, f"--config_path={folder / 'train_log.jsonl'}") == 2
    assert "lies in no checkpoint" in capsys.readouterr().err


def in_a_child(work) -> int:
    """Runs ``work`` in a forked process and returns how that ended: its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def copy_of(finished, tmp_path):
    """Without its log, for drawing it takes longer than the run."""
    ignore = shutil.ignore_patterns("train_log*")
    return shutil.copytree(finished, tmp_path / "run", symlinks=True, ignore=ignore)


@pytest.fixture(scope="module")
def begun(bench_top):
    """A run after its first step, to be saved as any other."""
    return bench_top.prepare(bench_top.root / "begun", "--steps=6", steps=1)


# While the files are written: what a save calls, and which call of it is the last the process lives to make.
WRITING = {
    "flush-0": (os, "fsync", 0), "flush-9": (os, "fsync", 9),
    "optimizer": (optimizers, "save_file", 0), "random-state": (files, "save_file", 0),
}  # fmt: skip


@pytest.mark.parametrize("module, name, call", WRITING.values(), ids=WRITING)
@pytest.mark.parametrize("step", [5, 4], ids=["new", "again"])
def test_kill_while_writing_loses_no_checkpoint(module, name, call, step, begun, finished, tmp_path):
    def arm(kill):
        original, calls = getattr(module, name), iter(range(10_000))

        def killing(*arguments, **options):
            if next(calls) == call:
                kill()
            return original(*arguments, **options)

        setattr(module, name, killing)

    old, found, _ = killed_in_a_save(begun, finished, tmp_path, step, arm=arm)
    assert found == old["000004"]


# What python tells an audit hook before it changes what stands under a name.
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.mkdir", "os.truncate")


@pytest.mark.parametrize(
    "step, change",
    # A new step: rename, link made, link put in place. Again: two renames, the two of the link, and then the old one is
    # removed file by file.
    [(5, change) for change in range(3)] + [(4, change) for change in range(7)],
)
def test_kill_at_any_rename_loses_no_checkpoint(step, change, begun, finished, tmp_path):
    """Every change after the files were written, whichever function makes it, is once the one that does not happen."""

    def arm_after_writing(kill):
        changes = iter(range(10_000))

        def hook(event, arguments):
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (event in CHANGES or writes) and next(changes) == change:
                kill()

        sys.addaudithook(hook)

    old, found, new = killed_in_a_save(begun, finished, tmp_path, step, arm_after_writing=arm_after_writing)
    # The link names a new step last of all; a step that is written again it names already.
    assert found == (new if step == 4 and change >= 2 else old["000004"])


def killed_in_a_save(run, finished, tmp_path, step, arm=None, arm_after_writing=None):
    """Saves ``step`` over a finished run in a process that is killed, then goes on from what that left.

    returns  the checkpoints before by name, the one found as the last, and the one that was to be written, all whole
    """
    folder, aside = copy_of(finished, tmp_path), tmp_path / "new"
    run.step = step
    old = {p.name: state_files(p) for p in (folder / "checkpoints").iterdir() if not p.is_symlink()}
    aside.mkdir()
    write_checkpoint(run, aside)
    new = state_files(aside)
    assert new != old["000004"]

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def write(path):
        write_checkpoint(run, path)
        if arm_after_writing:
            arm_after_writing(kill)

    state = random.getstate()

    def save():
        random.setstate(state)  # python seeds itself anew in a forked process
        if arm:
            arm(kill)
        Checkpoints(folder).save(step, 5, write)

    assert in_a_child(save) == -signal.SIGKILL
    # Who goes by the link, as LeRobot does, finds a whole one too; only the very step it names may be between two names.
    assert step == 4 or state_files(folder / "checkpoints" / "last") in (old["000004"], new)
    last = Checkpoints(folder).last()
    found = state_files(last)
    with seeded(None):
        loaded = files.load_state(last, run.optimizer, run.scheduler)
    assert loaded == int(last.name.strip(".old")) == 4

    run.step = 6
    Checkpoints(folder).save(6, 6, lambda path: write_checkpoint(run, path))
    left = {p.name: state_files(p) for p in (folder / "checkpoints").iterdir()}
    # A new step may lie there whole while the link still names the one before.
    wanted = {**old, f"{step:06d}": new} if found == new or "000005" in left else old
    assert left.pop("last") == left.pop("000006")
    assert left == wanted, "the next save found everything in its place"
    return old, found, new


@pytest.mark.long
def test_a_process_killed_while_it_trains_goes_on_to_the_same_end(bench_top, tmp_path):
    """The command itself, killed from outside in the middle of a save that was made slow."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ("--steps=6", "--save_freq=2", "--log_freq=1")
    bench_top.train(whole, *flags)
    code = (
        "import os, sys, time, torch\n"
        "torch.set_num_threads(1)\n"
        "flush, calls = os.fsync, iter(range(10_000))\n"
        "def slow(descriptor):\n"
        "    if next(calls) == 25: print('saving', flush=True); time.sleep(600)\n"  # about 20 files a save: in the second
        "    flush(descriptor)\n"
        "os.fsync = slow\n"
        "from smolvla_fast.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "train", *bench_top.flags(killed, *flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) as process:
        deadline = time.monotonic() + 240
        while "saving" not in process.stdout.readline():
            assert process.poll() is None and time.monotonic() < deadline
        process.kill()
    assert [p.name for p in (killed / "checkpoints").glob(".*")] == [".000004.partial"]
    assert Checkpoints(killed).last().name == "000002"
    go_on(killed)
    for step in ("000002", "000004", "000006"):
        assert state_files(whole / "checkpoints" / step) == state_files(killed / "checkpoints" / step)
    assert [e["loss"] for e in read_log(whole)] == [e["loss"] for e in read_log(killed)]


@pytest.mark.parametrize("room", [0, 3000, 400_000], ids=["nothing", "a-json", "half-the-weights"])
def test_a_full_disk_is_said_and_costs_no_checkpoint(room, begun, finished, tmp_path):
    """No file may grow beyond ``room`` bytes: the system refuses in mid-write, as a full disk does."""
    folder, run = copy_of(finished, tmp_path), begun
    before = {p.name: state_files(p) for p in (folder / "checkpoints").iterdir() if not p.is_symlink()}

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with pytest.raises(
            TrainingError,
            match="cannot write checkpoint .*000005.*MiB free.*000004, is whole.*Free some space.*--resume=true",
        ):
            Checkpoints(folder).save(5, 5, lambda path: write_checkpoint(run, path))

    assert in_a_child(save) == 0
    after = {p.name: state_files(p) for p in (folder / "checkpoints").iterdir() if not p.is_symlink()}
    assert after == before and os.readlink(folder / "checkpoints" / "last") == "000004"


def test_a_first_checkpoint_that_cannot_be_written_is_not_to_be_resumed(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, "no room")

    with pytest.raises(
        TrainingError, match="no checkpoint before it.* and begin again with another --output_dir"
    ):
        Checkpoints(tmp_path).save(5, 5, full)


def test_a_broken_checkpoint_is_said(finished, tmp_path, capsys):
    broken_files = ("optimizer_state.safetensors", "scheduler_state.json", "run.json")
    cut, foreign = (
        [(name, None) for name in broken_files],
        [("run.json", "{}"), ("run.json", '{"settings": 3}')],
    )
    for number, (broken, content) in enumerate(cut + foreign):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder, symlinks=True)
        path = folder / "checkpoints" / "000004" / "training_state" / broken
        path.write_bytes(content.encode() if content else path.read_bytes()[:20])
        assert resume(folder, "--steps=5") == 2
        message = capsys.readouterr().err
        assert "did not foresee" not in message
        assert "cannot be re" in message and ("--config_path" in message or "--policy.path" in message)


@pytest.mark.parametrize("steps", [4, 3])
def test_a_complete_run_does_not_go_on(steps, finished, tmp_path, capsys):
    folder = copy_of(finished, tmp_path)
    assert resume(folder, f"--steps={steps}") == 2
    said = capsys.readouterr()
    assert (
        "the run is complete: " in said.err and f"step 4, and --steps is {steps}; give a larger" in said.err
    )
    assert "steps 5 to" not in said.out


def test_a_log_cut_short_by_a_kill_is_mended(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    with (folder / "train_log.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    assert resume(folder, "--steps=5") == 0
    assert [entry["step"] for entry in read_log(folder)] == [1, 2, 3, 4, 5]


def test_lerobot_loads_a_checkpoint(finished, bench_top):
    """Its own loaders, strictly: policy, processors, optimizer, scheduler, random state, training configuration."""
    from lerobot.common.train_utils import load_training_state
    from lerobot.configs import PreTrainedConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.optim.factory import make_optimizer_and_scheduler
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    checkpoint = finished / "checkpoints" / "last"
    pretrained = checkpoint / "pretrained_model"
    policy = SmolVLAPolicy.from_pretrained(
        pretrained, config=PreTrainedConfig.from_pretrained(pretrained), strict=True
    )
    loaded = policy.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights(checkpoint).items())
    config = TrainPipelineConfig.from_pretrained(pretrained)
    assert (config.steps, config.batch_size, config.seed, config.dataset.root) == (
        4,
        4,
        1000,
        str(bench_top.data),
    )
    assert config.optimizer.lr == 0.001 and config.scheduler.num_warmup_steps == 0
    make_pre_post_processors(config.policy, str(pretrained))

    optimizer, scheduler = make_optimizer_and_scheduler(config, policy)
    with torch.random.fork_rng():
        step, optimizer, scheduler = load_training_state(checkpoint, optimizer, scheduler)
    assert step == 4 and scheduler.last_epoch == 4
    assert next(iter(optimizer.state_dict()["state"].values()))["step"] == 4


def test_lerobot_train_resumes_a_checkpoint_and_we_resume_its_weights(
    finished, bench_top, tmp_path, monkeypatch
):
    """``lerobot-train`` itself, two steps on from ours; then ours from its weights."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder, symlinks=True)
    config = folder / "checkpoints" / "000004" / "pretrained_model" / "train_config.json"
    goal = ("--steps=6", "--save_freq=6")
    lerobot_command(monkeypatch, f"--config_path={config}", "--resume=true", f"--output_dir={folder}", *goal)
    theirs = folder / "checkpoints" / "000006"
    assert json.loads((theirs / "training_state" / "training_step.json").read_text())["step"] == 6
    assert not same(weights(theirs), weights(finished / "checkpoints" / "000004"))
    # It has no run.json.
    assert resume(folder, f"--config_path={theirs / 'pretrained_model' / 'train_config.json'}") == 2
    start = [f"--policy.path={theirs / 'pretrained_model'}"]
    begun = bench_top.prepare(tmp_path / "begun", *start).policy.state_dict()
    assert all(torch.equal(begun[name], value) for name, value in weights(theirs).items())
    bench_top.train(tmp_path / "ours", *start, "--steps=1")
