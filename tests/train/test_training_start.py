"""Checkpoints that a run starts from: with other cameras, from before there were processors, cut short."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training_runs import refused, resume

from smolvla_fast.train.data import to_floats, training_batches
from smolvla_fast.training import update

pytestmark = pytest.mark.training


@pytest.fixture(scope="module")
def three_cameras(finished, bench_top):
    """A checkpoint as smolvla_base is: it declares camera1 to camera3, of which the dataset has two by other names."""
    folder = shutil.copytree(finished / "checkpoints" / "last" / "pretrained_model", bench_top.root / "three")
    config = json.loads((folder / "config.json").read_text())
    features = config["input_features"]
    picture = features.pop("observation.images.front")
    del features["observation.images.wrist"]
    features |= {f"observation.images.camera{index}": picture for index in (1, 2, 3)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


RENAMED = {
    "observation.images.front": "observation.images.camera1",
    "observation.images.wrist": "observation.images.camera2",
}


def test_train_runs_the_readmes_command_with_two_cameras_of_three(
    bench_top, three_cameras, tmp_path, capsys, caplog
):
    """Renamed, they train, at the loss of the policy that LeRobot's factory makes. Without names, not."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies import make_policy

    start, names = f"--policy.path={three_cameras}", f"--rename_map={json.dumps(RENAMED)}"
    run = bench_top.prepare(tmp_path / "run", start, names)
    assert "lacks the cameras ['observation.images.camera3']" in caplog.text
    config = PreTrainedConfig.from_pretrained(three_cameras)
    config.pretrained_path = three_cameras
    stock = make_policy(config, LeRobotDatasetMetadata("x/y", root=bench_top.data), rename_map=RENAMED)
    raw = next(training_batches(run.settings, run.data.train, 0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = stock.train().forward(run.preprocess(to_floats(raw, "cpu")))[0].item()
        torch.manual_seed(0)
        ours = update(run, iter([raw]))["loss"]
    assert ours == pytest.approx(theirs, rel=1e-5)  # fp32 sums in another order
    assert "camera3" in refused(bench_top, tmp_path / "no", capsys, start)
    wrong = json.dumps({**RENAMED, "observation.images.wrist": "observation.images.camra2"})
    assert "camera2" in refused(bench_top, tmp_path / "wrong", capsys, start, f"--rename_map={wrong}")


def test_a_checkpoint_without_processors_gets_fresh_ones(
    bench_top, three_cameras, finished, tmp_path, caplog
):
    bare = shutil.copytree(three_cameras, tmp_path / "bare")
    for path in bare.glob("policy_*"):
        path.unlink()
    flags = (f"--rename_map={json.dumps(RENAMED)}", "--fast=off")
    runs = [
        bench_top.prepare(tmp_path / name, f"--policy.path={path}", *flags)
        for name, path in (("with", three_cameras), ("without", bare))
    ]
    assert f"{bare} has no policy_preprocessor.json" in caplog.text and str(three_cameras) not in caplog.text
    raw = next(training_batches(runs[0].settings, runs[0].data.train, 0))
    batches = [run.preprocess(raw) for run in runs]
    assert batches[0].keys() == batches[1].keys() and "observation.images.camera1" in batches[0]
    for key in ("action", "observation.state", "observation.language.tokens"):
        assert torch.equal(batches[0][key], batches[1][key]), key
    actions = [run.postprocess(batches[0]["action"][:, 0]) for run in runs]
    assert torch.equal(*actions)


@pytest.mark.parametrize("name", ["policy_preprocessor.json", "policy_postprocessor_step_0*", "model*"])
def test_a_checkpoint_cut_short_is_said(name, bench_top, finished, tmp_path, capsys):
    source = finished / "checkpoints" / "last" / "pretrained_model"
    broken = shutil.copytree(source, tmp_path / "broken")
    path = next(broken.glob(name))
    path.write_bytes(path.read_bytes()[:20])
    # LeRobot's reader of weights raises errors of its own.
    flags = (f"--policy.path={broken}", "--implementation=lerobot")
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert str(broken) in message and ("copy or download them again" in message or "model" in name)


@pytest.mark.parametrize("implementation", ["ours", "lerobot"])
def test_weights_under_a_compiled_models_names_are_refused(
    implementation, bench_top, finished, tmp_path, capsys
):
    """LeRobot's own loader leaves every weight of such a file at random values."""
    renamed = shutil.copytree(finished / "checkpoints" / "last" / "pretrained_model", tmp_path / "renamed")
    path = renamed / "model.safetensors"
    tensors = {
        name.replace("model.", "model._orig_mod.", 1): each.clone() for name, each in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    flags = (f"--policy.path={renamed}", f"--implementation={implementation}")
    assert "'_orig_mod.' into the names" in refused(bench_top, tmp_path / "run", capsys, *flags)


@pytest.mark.parametrize("names", ["0.3", "robot types"])
@pytest.mark.parametrize("implementation", ["ours", "lerobot"])
def test_a_checkpoint_with_statistics_among_its_weights_trains(
    names, implementation, bench_top, finished, tmp_path, caplog
):
    """From before LeRobot 0.4. The dataset's statistics take the place of its own, as they do of any checkpoint's."""
    old = shutil.copytree(finished / "checkpoints" / "last" / "pretrained_model", tmp_path / "old")
    for path in old.glob("policy_*"):
        path.unlink()
    tensors = {name: value.clone() for name, value in load_file(old / "model.safetensors").items()}
    whole = {"mean": torch.zeros(6), "std": torch.ones(6)}
    stems = {
        "0.3": ["normalize_inputs.buffer_observation_state", "unnormalize_outputs.buffer_action"],
        "robot types": ["so100.buffer.action", "normalize_targets.so100-red_buffer_action"],
    }
    for stem in stems[names]:
        tensors |= {f"{stem}.{name}": value.clone() for name, value in whole.items()}
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    flags = (f"--policy.path={old}", f"--implementation={implementation}", "--fast=off")
    run = bench_top.prepare(tmp_path / "run", *flags)
    assert f"{old} has no policy_preprocessor.json" in caplog.text
    state = run.policy.state_dict()
    assert state.keys() <= tensors.keys() and all(torch.equal(tensors[key], state[key]) for key in state)
    mean = torch.as_tensor(run.data.train.meta.stats["action"]["mean"], dtype=torch.float32)
    # fp64 statistics, rounded once.
    assert torch.allclose(run.postprocess(torch.zeros(1, 6)), mean, atol=1e-6)


def test_a_checkpoint_with_half_of_its_statistics_trains_once_they_are_removed(
    bench_top, finished, tmp_path, capsys
):
    old = shutil.copytree(finished / "checkpoints" / "last" / "pretrained_model", tmp_path / "old")
    for path in old.glob("policy_*"):
        path.unlink()
    tensors = {name: value.clone() for name, value in load_file(old / "model.safetensors").items()}
    half = {**tensors, "normalize_inputs.buffer_observation_state.mean": torch.zeros(6)}
    save_file(half, old / "model.safetensors", {"format": "pt"})
    message = refused(bench_top, tmp_path / "run", capsys, f"--policy.path={old}")
    assert "before LeRobot 0.4" in message and "remove them from the file" in message
    assert "dataset_stats" not in message and "strict=" not in message  # no flags of the command
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    assert bench_top.command(tmp_path / "run", f"--policy.path={old}", "--steps=1") == 0


def test_processors_that_leave_an_action_as_it_is_are_refused_on_resume(finished, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    path = next((run / "checkpoints" / "last" / "pretrained_model").glob("policy_post*.safetensors"))
    stats = {
        name.replace("action", "so100.buffer.action"): value.clone()
        for name, value in load_file(path).items()
    }
    save_file(stats, path)
    assert resume(run, "--steps=5") == 2
    message = capsys.readouterr().err
    assert "action (" in message and "'so100'" in message and "normalization_mapping" in message
