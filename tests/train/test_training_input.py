"""Bad data and bad flags: an error that says what was wrong, what is accepted and what to do, before anything is written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.training_runs import drop_episode_statistics, refused, same

from smolvla_fast.smolvla import SmolVLAPolicy
from smolvla_fast.testing.dataset import write_dataset
from smolvla_fast.train import TrainingError
from smolvla_fast.train.checkpoint import Checkpoints
from smolvla_fast.train.data import open_data, training_batches
from smolvla_fast.training import train, update

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def one_eyed(bench_top):
    write_dataset(bench_top.root / "one_eyed", episodes=2, cameras=["front"], frame=(16, 24))
    drop_episode_statistics(bench_top.root / "one_eyed")
    return f"--dataset.root={bench_top.root / 'one_eyed'}"


@pytest.fixture(scope="module")
def eight_joints(bench_top):
    write_dataset(bench_top.root / "eight", episodes=2, joints=8, frame=(16, 24))
    drop_episode_statistics(bench_top.root / "eight")
    return f"--dataset.root={bench_top.root / 'eight'}"


@pytest.fixture(scope="module")
def checkpoint(finished):
    return f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"


@pytest.fixture
def damaged(bench_top, tmp_path):
    """damaged(change) -> flag of a copy of the dataset whose table went through ``change(columns)``."""

    def make(change):
        root = tmp_path / "damaged"
        shutil.copytree(bench_top.data, root)
        path = next(root.glob("data/**/*.parquet"))
        table = pq.read_table(path)
        columns = {
            "action": np.stack(table["action"].to_numpy()),
            "state": np.stack(table["observation.state"].to_numpy()),
        }
        change(columns)
        for name, key in (("action", "action"), ("observation.state", "state")):
            column = pa.array(list(columns[key]), type=table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        pq.write_table(table, path)
        return f"--dataset.root={root}"

    return make


def test_train_names_a_missing_camera(bench_top, one_eyed, checkpoint, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, one_eyed, checkpoint)
    for part in (
        "observation.images.wrist",
        "observation.images.front",
        "--rename_map",
        "--policy.empty_cameras=1",
        "null",
    ):
        assert part in message


@pytest.mark.parametrize("way", ["--policy.empty_cameras=1", "--policy.input_features=null"])
def test_the_ways_out_of_a_missing_camera_work(way, bench_top, one_eyed, checkpoint, tmp_path):
    bench_top.prepare(tmp_path / "run", one_eyed, checkpoint, way, steps=1)


def test_train_reads_a_renamed_camera(bench_top, one_eyed, checkpoint, tmp_path):
    flags = (
        '--rename_map={"observation.images.front":"observation.images.wrist"}',
        "--policy.empty_cameras=1",
    )
    run = bench_top.prepare(tmp_path / "run", one_eyed, checkpoint, *flags)
    batch = run.preprocess(next(training_batches(run.settings, run.data.train, 0)))
    assert "observation.images.wrist" in batch and "observation.images.front" not in batch


def test_train_refuses_an_action_of_another_size(bench_top, eight_joints, checkpoint, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, eight_joints, checkpoint)
    assert (
        "'action' has 8 values in the dataset and 6" in message and "--policy.output_features=null" in message
    )
    features = ("--policy.output_features=null", "--policy.input_features=null")
    assert bench_top.command(tmp_path / "run", eight_joints, checkpoint, *features) == 0
    policy = SmolVLAPolicy.from_pretrained(tmp_path / "run" / "checkpoints" / "last" / "pretrained_model")
    assert policy.config.action_feature.shape == (8,)


@pytest.mark.parametrize("key, limit", [("action", "max_action_dim"), ("observation.state", "max_state_dim")])
def test_train_refuses_an_action_or_state_too_wide(key, limit, bench_top, eight_joints, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, eight_joints, f"--policy.{limit}=7")
    assert f"'{key}' has 8 values" in message and f"--policy.{limit}=8" in message


@pytest.mark.parametrize(("key", "value"), [("action", np.nan), ("state", np.inf)])
def test_train_names_values_that_are_not_finite(key, value, bench_top, damaged, tmp_path, capsys):
    def change(columns):
        columns[key][30, 2] = columns[key][31, 3] = value

    message = refused(bench_top, tmp_path / "run", capsys, damaged(change))
    dataset = open_data(bench_top.settings(tmp_path / "other")).train
    episode, frame = (int(dataset.hf_dataset[30][name]) for name in ("episode_index", "frame_index"))
    assert f"is {value} at frame {frame} of episode {episode} (value 2)" in message and "2 frames" in message
    assert "--dataset.episodes" in message


def test_the_episode_with_such_values_can_be_left_out(bench_top, damaged, tmp_path):
    def change(columns):
        columns["action"][0, 0] = np.nan

    bench_top.prepare(tmp_path / "run", damaged(change), "--dataset.episodes=[1,2]", steps=1)


def damage_stats(bench_top, tmp_path, change):
    root = tmp_path / "stats"
    shutil.copytree(bench_top.data, root)
    path = root / "meta" / "stats.json"
    stats = json.loads(path.read_text())
    change(stats)
    path.write_text(json.dumps(stats))
    return f"--dataset.root={root}"


@pytest.mark.parametrize(
    "change, says",
    [
        pytest.param(lambda s: s.pop("action"), "'mean' of 'action'", id="no-feature"),
        pytest.param(
            lambda s: s["observation.state"].pop("std"), "'std' of 'observation.state'", id="no-entry"
        ),
        pytest.param(lambda s: s["action"]["mean"].__setitem__(0, float("nan")), "nan", id="nan"),
        pytest.param(lambda s: s["action"].update(std=[1.0, 1.0]), "[1.0, 1.0]", id="size"),
        pytest.param(
            lambda s: s.update({"so100.buffer.action": s.pop("action")}),
            "rename that entry to 'action' in meta/stats.json",
            id="robot-type",
        ),
    ],
)
def test_train_refuses_unusable_statistics(change, says, bench_top, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, damage_stats(bench_top, tmp_path, change))
    assert says in message and "recompute_stats" in message and "normalization_mapping" in message
    assert "dataset_stats" not in message  # which no flag gives


def test_a_camera_without_statistics_is_counted_in_channels(bench_top, tmp_path, capsys):
    root = damage_stats(bench_top, tmp_path, lambda s: s.pop("observation.images.front"))
    modes = "--policy.normalization_mapping={VISUAL: MEAN_STD, STATE: MEAN_STD, ACTION: MEAN_STD}"
    message = refused(bench_top, tmp_path / "run", capsys, root, modes)
    assert "'mean' of 'observation.images.front', of 3 channels, is missing" in message


@pytest.mark.parametrize("imagenet", ["true", "false"])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: s.update({"observation.images.front": None}), id="camera"),
        pytest.param(lambda s: s["observation.images.front"].update(mean=None), id="entry-of-a-camera"),
        pytest.param(lambda s: s["action"].update(max=None), id="entry-not-used"),
        pytest.param(lambda s: s.update(timestamp=None, index=3), id="not-the-policy-s"),
    ],
)
def test_a_null_among_statistics_that_are_not_used_stops_no_run(change, imagenet, bench_top, tmp_path):
    flags = (damage_stats(bench_top, tmp_path, change), f"--dataset.use_imagenet_stats={imagenet}")
    bench_top.prepare(tmp_path / "run", *flags)


@pytest.mark.parametrize("flag", ["--policy.optimizer_lr=1e39", "--policy.optimizer_weight_decay=1e44"])
def test_weights_that_are_not_finite_are_not_saved(flag, bench_top, tmp_path, capsys):
    assert bench_top.command(tmp_path / "run", flag, "--save_freq=1", "--steps=3") == 2
    message = capsys.readouterr().err
    assert "trained weights are not finite" in message and "there is no checkpoint before it" in message, (
        message
    )
    assert Checkpoints(tmp_path / "run").last() is None and "--policy.optimizer_lr" in message


def test_the_checkpoint_before_weights_that_are_not_finite_stays_the_last(bench_top, tmp_path):
    runs = []

    def spoil(step, facts):
        if step == 2:
            next(p for p in runs[0].policy.parameters() if p.requires_grad).data.view(-1)[0] = np.nan

    settings = bench_top.settings(tmp_path / "run", "--save_freq=1", "--steps=3")
    with pytest.raises(
        TrainingError, match=r"step 2: 1 of \d+ trained weights.*checkpoints/000001, is whole"
    ):
        train(settings, on_begin=runs.append, on_step=spoil)
    assert Checkpoints(tmp_path / "run").last().name == "000001"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.name.endswith("2")] == []


def test_train_refuses_a_dataset_without_statistics(bench_top, tmp_path, capsys):
    shutil.copytree(bench_top.data, tmp_path / "bare")
    (tmp_path / "bare" / "meta" / "stats.json").unlink()
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={tmp_path / 'bare'}")
    assert "is missing" in message and "recompute_stats" in message


def test_a_loss_that_is_not_finite_stops_before_the_step(bench_top, tmp_path):
    """The backstop for what the look through the data cannot see: an image, here."""
    run = bench_top.prepare(tmp_path / "run")
    batches = training_batches(run.settings, run.data.train, 0)
    batch = next(batches)
    batch["observation.images.front"][0] = np.nan
    before = {name: value.clone() for name, value in run.policy.state_dict().items()}
    with pytest.raises(TrainingError, match=r"loss nan.*observation.images.front.*The step was not taken"):
        update(run, iter([batch]))
    assert all(torch.equal(before[name], value) for name, value in run.policy.state_dict().items())


@pytest.mark.parametrize(("fault", "parts"), [("not finite", 1), ("not finite", 2), ("no data", 2)])
def test_a_refused_step_leaves_nothing_to_the_next(bench_top, tmp_path, fault, parts):
    run, other = (
        bench_top.prepare(tmp_path / name, f"--gradient_accumulation_steps={parts}") for name in "ab"
    )
    other.policy.load_state_dict(run.policy.state_dict())
    batches = training_batches(run.settings, run.data.train, 0)
    good = [next(batches) for _ in range(parts)]

    def faulty():
        if fault == "no data":
            yield from good[:-1]
            raise OSError("the disk is gone")
        wrist = "observation.images.wrist"
        yield from ({**batch, wrist: batch[wrist].float() * np.nan} for batch in good)

    with pytest.raises(TrainingError if fault == "not finite" else OSError):
        update(run, faulty())
    assert all(parameter.grad is None for parameter in run.policy.parameters())
    for each in (run, other):
        torch.manual_seed(7)
        update(each, iter(good))
        assert each.accelerator.sync_gradients, "the last batch of a step ends it"
    assert same(run.policy.state_dict(), other.policy.state_dict())


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dataset.root=/no/such/folder"], ["cannot open the dataset", "/no/such/folder", "meta/"]),
        (["--dataset.episodes=[0,9]"], ["episodes 0 to 3", "[9]"]),
        (["--dataset.eval_split=0.99"], ["leaves no episode"]),
        (["--policy.vlm_model_name=/no/such/vlm"], ["/no/such/vlm"]),
        (['--rename_map={"a":"b"}'], ["--policy.path"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_train_refuses_impossible_flags(flags, says, bench_top, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert all(part in message for part in says), message


def test_the_listing_of_a_folder_that_is_no_checkpoint_is_short(bench_top, tmp_path, capsys):
    for index in range(30):
        (tmp_path / f"file{index:02}").touch()
    message = refused(bench_top, tmp_path / "run", capsys, f"--policy.path={tmp_path}")
    assert "file07 and 22 more" in message and "file08" not in message


def test_a_checkpoint_of_other_sizes_is_named(bench_top, checkpoint, tmp_path, capsys):
    message = refused(bench_top, tmp_path / "run", capsys, checkpoint, "--policy.max_action_dim=16")
    assert "misshapen" in message and "action_in_proj" in message


def test_a_folder_that_holds_something_is_not_overwritten(bench_top, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("kept")
    assert bench_top.command(tmp_path / "run") == 2
    assert "give another (it holds no checkpoint to resume)" in capsys.readouterr().err
    assert (tmp_path / "run" / "precious").read_text() == "kept"


def test_resume_refuses_a_folder_without_checkpoint(tmp_path, capsys):
    from smolvla_fast.cli import main

    for folder, way in (
        (tmp_path, "leave out --resume and give another --output_dir\n"),  # a run would not begin there
        (tmp_path / "new", "leave out --resume\n"),
    ):
        assert main(["train", "--resume", f"--output_dir={folder}"]) == 2
        assert f"{folder} holds no whole checkpoint; to begin, {way}" in capsys.readouterr().err
    assert main(["train", "--resume"]) == 2
    assert "--output_dir" in capsys.readouterr().err


def test_nonfinite_values_in_any_micro_batch_are_named(bench_top, tmp_path):
    run = bench_top.prepare(tmp_path / "run", "--gradient_accumulation_steps=2")
    batches = training_batches(run.settings, run.data.train, 0)
    first, second = next(batches), next(batches)
    first["observation.images.wrist"] = first["observation.images.wrist"].float()
    first["observation.images.wrist"][1] = np.nan
    with pytest.raises(TrainingError) as error:
        update(run, iter([first, second]))
    assert "observation.images.wrist" in str(error.value) and str(first["index"].tolist()) in str(error.value)
    assert str(second["index"].tolist()) not in str(error.value) and "finite" not in str(error.value)
