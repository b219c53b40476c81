"""Datasets of any names, dtypes, shapes: what ``lerobot-train`` reads is trained, what no step takes is said before it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import cache

import draccus
import pytest
import torch
from datasets import Dataset
from lerobot.scripts.lerobot_edit_dataset import EditDatasetConfig, handle_remove_feature
from support.training_runs import (
    go_on,
    lerobot_train,
    own_train,
    record,
    refused,
    same,
    seeded_losses,
    weights,
)

from smolvla_fast.smolvla.features import ACTION, OBS_STATE
from smolvla_fast.testing.dataset import REPO_ID
from smolvla_fast.train import TrainingError
from smolvla_fast.train.log import read_log
from smolvla_fast.train.random_state import collect
from smolvla_fast.train.reader import numbers

pytestmark = pytest.mark.training

FRONT, WRIST, DEPTH = (f"observation.images.{name}" for name in ("front", "wrist", "depth"))
FRAME, VECTOR = ("image", (16, 24, 3)), ("float32", (6,))
PLAIN = {FRONT: FRAME, WRIST: FRAME, OBS_STATE: VECTOR, ACTION: VECTOR}


@pytest.fixture(scope="module")
def checkpoint(finished):
    return f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"


@pytest.fixture(scope="module")
def blank(finished, tmp_path_factory):
    """The same checkpoint, declaring no inputs: it takes the dataset's, in LeRobot and here."""
    folder = tmp_path_factory.mktemp("blank") / "pretrained_model"
    shutil.copytree(finished / "checkpoints" / "last" / "pretrained_model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "input_features": {}}))
    return f"--policy.path={folder}"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return record(tmp_path_factory.mktemp("plain") / "data", PLAIN)


def renamed(names):
    """``PLAIN`` and an environment state under other names, and the flag that restores the names."""
    plain = {**PLAIN, "observation.environment_state": ("float32", (3,))}
    back = {new: old for old, new in names.items()}
    return {names.get(key, key): entry for key, entry in plain.items()}, f"--rename_map={json.dumps(back)}"


def evaluated(bench_top, folder, *flags):
    """Losses, training and held-out, and last weights of a run."""
    bench_top.train(folder / "run", *flags, "--dataset.eval_split=0.5", "--eval_steps=1")
    losses = [
        {k: e[k] for k in ("loss", "grad_norm", "eval_loss") if k in e} for e in read_log(folder / "run")
    ]
    return losses, weights(folder / "run" / "checkpoints" / "last")


@pytest.fixture(scope="module")
def unrenamed(bench_top, checkpoint, tmp_path_factory):
    """fast -> ``evaluated`` on the recording under the policy's own names."""
    root = record(tmp_path_factory.mktemp("unrenamed") / "data", renamed({})[0])
    return cache(
        lambda fast: evaluated(bench_top, tmp_path_factory.mktemp(fast), root, checkpoint, f"--fast={fast}")
    )


ALL = {
    OBS_STATE: "observation.q", FRONT: "observation.images.a", WRIST: "observation.images.b",
    "observation.environment_state": "observation.z",
}  # fmt: skip


@pytest.mark.parametrize(
    "names, fast",
    [
        pytest.param({OBS_STATE: "observation.joint_positions"}, "off", id="state"),
        pytest.param(
            {OBS_STATE: "observation.environment_state", "observation.environment_state": OBS_STATE}, "off", id="swapped"
        ),
        pytest.param(ALL, "off", id="all"),
        pytest.param(ALL, "on", id="all-fast"),
    ],
)  # fmt: skip
def test_train_reads_renamed_features(names, fast, bench_top, checkpoint, unrenamed, tmp_path):
    """To the bit what is trained on the same recording under the policy's own names, held-out loss included."""
    features, flag = renamed(names)
    losses, end = evaluated(
        bench_top, tmp_path, record(tmp_path / "data", features), checkpoint, flag, f"--fast={fast}"
    )
    assert losses == unrenamed(fast)[0] and sum("eval_loss" in entry for entry in losses) == 2
    assert same(end, unrenamed(fast)[1])


def test_a_resumed_run_reads_renamed_features(bench_top, checkpoint, tmp_path):
    other, flag = renamed({OBS_STATE: "observation.q", FRONT: "observation.images.a"})
    flags = (record(tmp_path / "data", other), checkpoint, flag)
    bench_top.train(tmp_path / "whole", *flags, "--steps=3")
    bench_top.train(tmp_path / "half", *flags, "--steps=3", "--save_freq=1")
    last = tmp_path / "half" / "checkpoints" / "last"
    last.unlink()
    last.symlink_to("000001")
    go_on(tmp_path / "half")
    assert same(*(weights(tmp_path / name / "checkpoints" / "last") for name in ("whole", "half")))


def test_train_names_the_dataset_s_feature_in_what_it_refuses(bench_top, checkpoint, tmp_path, capsys):
    other, flag = renamed({OBS_STATE: "observation.q"})
    root = record(tmp_path / "data", other)
    stats = tmp_path / "data" / "meta" / "stats.json"
    entries = json.loads(stats.read_text())
    del entries["observation.q"]["std"]
    stats.write_text(json.dumps(entries))
    message = refused(bench_top, tmp_path / "run", capsys, root, checkpoint, flag)
    assert "'std' of 'observation.q'" in message


MEMBERS = {
    "float16-int32": {OBS_STATE: ("float16", (6,)), ACTION: ("int32", (6,))},
    "uint8-float16": {OBS_STATE: ("uint8", (6,)), ACTION: ("float16", (6,))},
    "one-int64-uint8": {OBS_STATE: ("int64", (1,)), ACTION: ("uint8", (6,))},
    "matrix-float64": {OBS_STATE: ("float64", (4, 4)), ACTION: ("float64", (6,))},
    "beside-the-state": {
        "observation.pose": ("float32", (4, 4)), "observation.poses": ("float64", (2, 3, 4)),
        "observation.count": ("int64", (1,)), "observation.environment_state": ("float64", (3,)),
        "note": ("string", (1,)), "success": ("bool", (1,)), "map": ("uint8", (2, 2)), "action.raw": ("float64", (3,)),
    },
}  # fmt: skip


@pytest.mark.parametrize("member", MEMBERS)
def test_train_reads_every_dtype_and_shape_as_lerobot_train(member, bench_top, blank, tmp_path, monkeypatch):
    """The bits of ``lerobot-train``'s losses and gradient norms."""
    flags = (record(tmp_path / "data", {**PLAIN, **MEMBERS[member]}), blank)
    theirs = lerobot_train(monkeypatch, bench_top.flags(tmp_path / "theirs", *flags))
    ours = own_train(monkeypatch, bench_top.settings(tmp_path / "ours", *flags, "--fast=off"))
    assert ours == theirs and len(ours) == 2


def test_train_renames_cameras_as_lerobot_train(bench_top, checkpoint, tmp_path, monkeypatch):
    other, flag = renamed({FRONT: "observation.images.up", WRIST: FRONT})
    flags = (record(tmp_path / "data", other), checkpoint, flag)
    theirs = lerobot_train(monkeypatch, bench_top.flags(tmp_path / "theirs", *flags))
    ours = own_train(monkeypatch, bench_top.settings(tmp_path / "ours", *flags, "--fast=off"))
    assert ours == theirs and len(ours) == 2


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_train_refuses_a_dataset_without_a_camera_of_the_policy(
    empty, bench_top, checkpoint, tmp_path, capsys
):
    """Blank frames stand beside a real one, so that none is advised here, and none helps."""
    root = record(tmp_path / "data", {"observation.images.top": FRAME, OBS_STATE: VECTOR, ACTION: VECTOR})
    message = refused(
        bench_top, tmp_path / "run", capsys, root, checkpoint, f"--policy.empty_cameras={empty}"
    )
    assert "observation.images.top" in message and "--policy.empty_cameras" not in message
    follow(message, bench_top, tmp_path, root, checkpoint, f"--policy.empty_cameras={empty}", ways=2)


def follow(message, bench_top, tmp_path, *flags, ways=1):
    """Takes a step with each flag that the message advises, as a shell reads it."""
    found = re.findall(r"--(?:policy|rename)[\w.]*[= ](?:'[^']*'|\[[^]]*\]|[^\s;,]+)", message)
    assert len(found) >= ways, message
    for number, way in enumerate(found):
        words = "=".join(shlex.split(way))
        bench_top.prepare(tmp_path / f"followed{number}", *flags, words, steps=1)


IDENTITY = '--policy.normalization_mapping={"VISUAL":"IDENTITY","STATE":"IDENTITY","ACTION":"MEAN_STD"}'
STEPS = {
    "depth": ({DEPTH: ("depth", (16, 24, 1))}, [], [DEPTH, "1 channel", "3 (RGB)"], 1),
    "bool-observation": ({"observation.grip": ("bool", (1,))}, [], ["'observation.grip'", "float32"], 1),
    "bool-state": ({OBS_STATE: ("bool", (6,))}, [], ["'observation.state'", "float32"], 0),
    "int-state-as-it-is": ({OBS_STATE: ("int64", (6,))}, [IDENTITY], ["'observation.state' is int64", "float32"], 0),
    "tensor-state": ({OBS_STATE: ("float32", (2, 3, 4))}, [], ["'observation.state'", "[2, 3, 4]", "[m, n]"], 0),
    "lone-action": ({ACTION: ("float32", (1,))}, [], ["'action' has 1 values", "at least 2"], 0),
    "matrix-action": ({ACTION: ("float32", (2, 3))}, [], ["'action' has 2 x 3 values", "one vector"], 0),
    "text": ({"observation.note": ("string", (1,))}, [], ["'observation.note' holds string", "remove_feature"], 0),
    "oblong": ({}, ["--policy.resize_imgs_with_padding=[32,24]"], ["(32, 24)", "multiple of 16"], 1),
    "as-recorded": ({}, ["--policy.resize_imgs_with_padding=null"], [FRONT, WRIST, "24 x 16", "multiple of 16"], 1),
    "aloha": ({}, ["--policy.adapt_to_pi_aloha=true"], ["14 motors", "'observation.state' [2, 1, 6] float32"], 0),
}  # fmt: skip


@pytest.mark.parametrize("member", STEPS)
def test_train_says_what_a_step_would_fail_on_before_it(member, bench_top, plain, tmp_path, capsys):
    """Named with what is accepted, nothing written; and with the flag that the message advises, the run trains."""
    features, flags, says, ways = STEPS[member]
    root = record(tmp_path / "data", {**PLAIN, **features}) if features else plain
    message = refused(bench_top, tmp_path / "run", capsys, root, *flags)
    assert all(part in message for part in says), message
    if ways:
        follow(message, bench_top, tmp_path, root, *flags, ways=ways)


@pytest.mark.parametrize(
    "key, entry",
    [("observation.note", ("string", (1,))), pytest.param(DEPTH, ("depth", (16, 24, 1)), id="depth")],
)
def test_a_feature_can_be_taken_out_of_the_dataset_as_advised(key, entry, bench_top, blank, tmp_path, capsys):
    """Of a checkpoint's run, which has features of its own that a flag would add to."""
    root = record(tmp_path / "data", {**PLAIN, key: entry})
    message = refused(bench_top, tmp_path / "run", capsys, root, blank)
    words = shlex.split(re.search(r"`lerobot-edit-dataset ([^`]*)`", message)[1])
    where = dict(
        repo_id=REPO_ID, root=str(tmp_path / "data"), new_repo_id="x/y", new_root=str(tmp_path / "less")
    )
    edit = draccus.parse(
        EditDatasetConfig, args=[*words, *(f"--{name}={value}" for name, value in where.items())]
    )
    handle_remove_feature(edit)
    bench_top.prepare(tmp_path / "run", f"--dataset.root={tmp_path / 'less'}", blank, steps=1)


@pytest.mark.parametrize(
    "features, flags",
    [
        pytest.param(
            {"observation.joints": VECTOR}, ['--rename_map={"observation.joints":"observation.state"}'], id="two-states"
        ),
        pytest.param({OBS_STATE: None, "observation.q": VECTOR}, [], id="no-state"),
        pytest.param({WRIST: None, "observation.images.side": FRAME}, [], id="a-camera-of-another-name"),
        pytest.param(
            {FRONT: None, WRIST: None, "observation.images.a": FRAME, "observation.images.b": FRAME},
            ['--rename_map={"observation.images.a":"observation.images.front"}'], id="one-of-two-renamed",
        ),
        pytest.param(
            {WRIST: None, "observation.images.side": FRAME},
            ['--rename_map={"observation.images.sied":"observation.images.wrist"}'], id="a-typo",
        ),
        pytest.param(
            {}, ['--policy.input_features={"observation.state":{"type":"STATE","shape":[6]}}'], id="no-camera-declared"
        ),
    ],
)  # fmt: skip
def test_the_advice_about_names_works(features, flags, bench_top, checkpoint, tmp_path, capsys):
    recorded = {key: entry for key, entry in {**PLAIN, **features}.items() if entry}
    start = () if flags and "input_features" in flags[0] else (checkpoint,)
    root = record(tmp_path / "data", recorded)
    message = refused(bench_top, tmp_path / "run", capsys, root, *start, *flags)
    assert "sied" not in message
    follow(message, bench_top, tmp_path, root, *start, *flags)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({OBS_STATE: FRONT}, [f"only {FRONT!r} is a camera", "'{}' to leave 'observation.state' out"]),
        ({FRONT: OBS_STATE}, [f"only {FRONT!r} is a camera", "leave 'observation.images.front' out"]),
        (
            {OBS_STATE: FRONT, WRIST: "observation.images.side"},
            ["leave 'observation.state' out", f'{{"{WRIST}": "observation.images.side"}}'],
        ),
        (
            {FRONT: "observation.images.a", OBS_STATE: "observation.images.a", WRIST: "observation.images.b"},
            ["leave 'observation.state' out", f'{{"{FRONT}": "observation.images.a", "{WRIST}": "observation.images.b"}}'],
        ),
        (
            {FRONT: "observation.q", OBS_STATE: "observation.q", WRIST: "observation.images.b"},
            [f"leave {FRONT!r} out", f'{{"{OBS_STATE}": "observation.q", "{WRIST}": "observation.images.b"}}'],
        ),
        ({OBS_STATE: "action"}, ["a name of its own for each"]),  # an action is not renamed
    ],
)  # fmt: skip
def test_a_camera_and_a_state_under_one_name_are_not_told_to_change_places(
    names, says, bench_top, checkpoint, tmp_path, capsys
):
    message = refused(bench_top, tmp_path / "run", capsys, checkpoint, f"--rename_map={json.dumps(names)}")
    assert all(part in message for part in ["--rename_map", *says]) and "_unused" not in message, message


def test_a_step_s_error_names_features_as_the_policy_reads_them(bench_top, checkpoint, tmp_path, capsys):
    """An action is not renamed, whatever the map says."""
    flags = (checkpoint, '--rename_map={"action": "x"}', "--policy.adapt_to_pi_aloha=true")
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert "14 motors" in message and "'action' [2, 6, 6] float32" in message, message


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("no room"),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("at", ["the trial", "a step"])
def test_want_of_memory_is_no_fault_of_the_dataset(at, error, bench_top, tmp_path, capsys, monkeypatch):
    from smolvla_fast.smolvla import SmolVLAPolicy

    calls, forward = iter(range(9)), SmolVLAPolicy.forward

    def short(*arguments):
        if next(calls) == (at == "a step"):
            raise error
        return forward(*arguments)

    monkeypatch.setattr(SmolVLAPolicy, "forward", short)
    assert bench_top.command(tmp_path / "run", "--fast=off") == 2
    message = capsys.readouterr().err
    assert str(error) in message and "--batch_size" in message and "--dtype=bf16" in message, message
    assert "dataset" not in message and "did not foresee" not in message


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [3.0]], [[1.0], None], [[[1.0], [2.0]], [[3.0], [4.0, 5.0]]]])
def test_rows_of_several_lengths_are_no_numbers(rows):
    with pytest.raises(
        TrainingError, match=r"'observation.pose' holds .* of the lengths \[.*of one shape in all frames"
    ):
        numbers(Dataset.from_dict({"observation.pose": rows}), "observation.pose")


def test_a_split_that_holds_every_episode_out_is_said_so(bench_top, blank, tmp_path, capsys):
    root = record(tmp_path / "data", PLAIN, episodes=1)
    message = refused(bench_top, tmp_path / "run", capsys, root, blank, "--dataset.eval_split=0.1")
    assert "leave it out" in message and "smaller" not in message


def test_the_trial_leaves_nothing_behind(bench_top, checkpoint, tmp_path, monkeypatch):
    """Neither gradients nor random numbers nor a training step, and it computes what a step computes."""
    from smolvla_fast.train.first_step import try_step

    run = bench_top.prepare(tmp_path / "run", checkpoint, "--fast=off")
    before, state = collect(), {k: v.clone() for k, v in run.policy.state_dict().items()}
    seen = seeded_losses(monkeypatch, run.policy, "forward", lambda result: (result[0].item(), len(result)))
    try_step(run.settings, run.data, run.policy, run.preprocess, run.accelerator.autocast())
    after = collect()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert same(state, run.policy.state_dict()) and all(p.grad is None for p in run.policy.parameters())
    assert len(seen) == 1 and seen[0][0] > 0
