"""What passes through processors unnormalised is said, by name and once; what LeRobot gives stays what ours give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.smolvla.processor_smolvla import (
    make_smolvla_pre_post_processors as make_lerobot_processors,
)
from safetensors.torch import load_file, save_file
from support.smolvla_pairs import ACTION, STATE, lerobot_config, make_pair, our_config

from smolvla_fast.cli import main
from smolvla_fast.smolvla import SmolVLAPolicy, make_pre_post_processors, make_smolvla_pre_post_processors
from smolvla_fast.smolvla.normalization import NormalizerProcessorStep
from smolvla_fast.smolvla.statistics_names import is_buffer, robot_type

pytestmark = pytest.mark.reference

GOOD = {"mean": torch.full((6,), 50.0), "std": torch.full((6,), 10.0)}
WHOLE = {STATE: GOOD, ACTION: GOOD}


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("smolvla_fast") and r.levelno >= 30]


@pytest.mark.parametrize(
    ("stats", "features", "says"),
    [
        pytest.param(None, [STATE, ACTION], "", id="none"),
        pytest.param({}, [STATE, ACTION], "", id="empty"),
        pytest.param({STATE: GOOD}, [ACTION], "", id="state-alone"),
        pytest.param({ACTION: GOOD, STATE: None}, [STATE], "", id="action-alone"),
        pytest.param(
            {"so100.buffer.action": GOOD, "so100.buffer.observation.state": GOOD},
            [STATE, ACTION],
            "'so100.buffer.action' of robot type 'so100': if they are meant, pass them as dataset_stats={'action'",
            id="robot-type",
        ),
        pytest.param(
            {STATE: GOOD, "so100.buffer.action": GOOD, "so100-red.buffer.action": GOOD},
            [ACTION],
            "pass those of your robot",
            id="two-robot-types",
        ),
        pytest.param({"observation_state": GOOD, ACTION: GOOD}, [STATE], "'observation_state'", id="underscores"),
        pytest.param({STATE: {**GOOD, "std": [float("nan")] * 6}, ACTION: GOOD}, [STATE], "nan", id="nan"),
    ],
)  # fmt: skip
def test_statistics_that_do_not_normalise_are_warned_of_once(backbones, caplog, stats, features, says):
    config = lerobot_config(backbones())
    stock, stock_post = make_lerobot_processors(config, stats)
    ours, post = make_smolvla_pre_post_processors(our_config(config), stats)
    batch = {STATE: torch.ones(2, 6), ACTION: torch.ones(2, 8, 6), "task": ["a", "b"]}
    for _ in range(2):
        expected, got = stock(dict(batch)), ours(dict(batch))
        assert all(torch.equal(expected[key].nan_to_num(), got[key].nan_to_num()) for key in (STATE, ACTION))
        assert torch.equal(stock_post(torch.ones(1, 6)), post(torch.ones(1, 6)))
    (message,) = warnings(caplog)
    assert [key for key in (STATE, ACTION) if f"{key} (" in message] == features
    assert "dataset_stats" in message and "normalization_mapping" in message and says in message


@pytest.mark.parametrize(
    "entry", [{"mean": [0.0] * 6}, {"mean": [0.0] * 6, "std": [1.0] * 5}, {}], ids=["no-std", "size", "nothing"]
)  # fmt: skip
def test_statistics_that_are_not_whole_are_said_before_the_first_batch(backbones, caplog, entry):
    """LeRobot's step raises when a batch comes; so does ours, and says it when it is made."""
    pre, _ = make_smolvla_pre_post_processors(
        our_config(lerobot_config(backbones())), {STATE: entry, ACTION: GOOD}
    )
    (message,) = warnings(caplog)
    assert f"{STATE} (" in message and f"{ACTION} (" not in message
    with pytest.raises(ValueError, match=r"observation\.state"):
        pre({STATE: torch.zeros(6), "task": "go"})


@pytest.mark.parametrize("stats", [None, WHOLE], ids=["identity", "whole"])
def test_what_is_meant_is_not_warned_of(backbones, caplog, tmp_path, stats):
    identity = dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    config = our_config(lerobot_config(backbones(), **({} if stats else {"normalization_mapping": identity})))
    for pipeline in make_smolvla_pre_post_processors(config, stats):
        pipeline.save_pretrained(tmp_path)
    pre, post = make_pre_post_processors(config, tmp_path)
    pre({STATE: torch.zeros(6), "task": "go"}), post(torch.zeros(1, 6))
    assert warnings(caplog) == []


def test_a_step_alone_warns_when_a_state_passes_through(caplog):
    """Its features are renamed, its statistics keyed otherwise: nobody knows of it before a batch comes."""
    feature = {"observation.joints": {"type": "STATE", "shape": [6]}}
    step = NormalizerProcessorStep(
        feature, {"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}, {"observation.joints": GOOD}
    )
    for _ in range(3):
        out = step({"observation": {STATE: torch.ones(1, 6)}})
    assert torch.equal(out["observation"][STATE], torch.ones(1, 6))
    (message,) = warnings(caplog)
    assert STATE in message and "observation.joints" in message


@pytest.fixture
def saved(backbones, tmp_path):
    """A tiny policy of LeRobot's with its processors, and ``change(file, edit)`` for its JSON or safetensors."""
    config = lerobot_config(backbones())
    make_pair(config).stock.save_pretrained(tmp_path)
    for pipeline in make_lerobot_processors(config, WHOLE):
        pipeline.save_pretrained(tmp_path)
    return our_config(config), tmp_path


def edit_json(path: Path, change) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def normalizer(values: dict[str, Any]) -> dict[str, Any]:
    return next(step for step in values["steps"] if "normalizer" in step["registry_name"])


def rename_features(values):
    step = normalizer(values)["config"]
    step["features"]["observation.joints"] = step["features"].pop(STATE)


def drop(folder: Path, side: str, *keys: str, prefix: str = "") -> None:
    path = next(folder.glob(f"policy_{side}_step_*.safetensors"))
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    kept = {
        (prefix + name if name.startswith(keys) else name): value
        for name, value in tensors.items()
        if prefix or not name.startswith(keys)
    }
    save_file(kept, path)


PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
CHANGES = {
    "robot-type": (lambda f: drop(f, "postprocessor", "action", prefix="so100.buffer."), ACTION),
    "no-action-statistics": (lambda f: drop(f, "postprocessor", "action"), ACTION),
    "no-state-statistics": (lambda f: drop(f, "preprocessor", STATE), STATE),
    "no-std": (lambda f: drop(f, "preprocessor", f"{STATE}.std"), STATE),
    "file-not-named": (lambda f: edit_json(f / POST, lambda v: normalizer(v).pop("state_file")), ACTION),
    "no-step": (lambda f: edit_json(f / POST, lambda v: v["steps"].remove(normalizer(v))), ACTION),
    "identity-in-the-file": (
        lambda f: edit_json(f / POST, lambda v: normalizer(v)["config"]["norm_map"].update(ACTION="IDENTITY")),
        ACTION,
    ),
    "features-renamed": (lambda f: edit_json(f / PRE, rename_features), STATE),
    "other-keys-chosen": (
        lambda f: edit_json(
            f / PRE, lambda v: normalizer(v)["config"].update(normalize_observation_keys=["state"])
        ),
        STATE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_verify_refuses_processors_that_do_not_normalise_and_demo_warns(saved, caplog, capsys, name):
    config, folder = saved
    change, feature = CHANGES[name]
    change(folder)
    make_pre_post_processors(config, folder)
    (message,) = warnings(caplog)
    assert f"{feature} (" in message
    caplog.clear()
    assert main(["verify", "--policy.path", str(folder), "--frames", "1"]) == 2
    refusal = capsys.readouterr().err
    assert str(folder) in refusal and f"{feature} (" in refusal and "dataset_stats" in refusal
    assert "Traceback" not in refusal


@pytest.mark.parametrize(
    "name", [PRE, POST, "policy_postprocessor_step_0_unnormalizer_processor.safetensors"]
)
def test_verify_refuses_processors_of_which_a_file_is_missing(saved, capsys, name):
    _, folder = saved
    (folder / name).unlink()
    assert main(["verify", "--policy.path", str(folder), "--frames", "1"]) == 2
    assert f"{name} not found" in capsys.readouterr().err


def test_verify_takes_whole_processors_and_demo_only_warns_of_others(saved, caplog, tmp_path, monkeypatch):
    _, folder = saved
    monkeypatch.setattr("smolvla_fast.cli.demo.draw", lambda *_: None)  # takes longer than all the rest
    assert main(["verify", "--policy.path", str(folder), "--frames", "1"]) == 0
    flags = [
        "--policy.path", str(folder), "--rounds", "1", "--json", str(tmp_path / "a.json"), "--plot",
        str(tmp_path / "a.png"),
    ]  # fmt: skip
    drop(folder, "postprocessor", "action")
    assert main(["demo", *flags]) == 0
    assert any("action (" in message for message in warnings(caplog))


# --- Checkpoints from before LeRobot 0.4: statistics among the weights


def add_buffers(folder: Path, names: dict[str, float]) -> None:
    """Turns the checkpoint into one of LeRobot 0.3: no processors, statistics among its weights."""
    for path in folder.glob("policy_*"):
        path.unlink()
    path = folder / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for name, mean in names.items():
        tensors |= {f"{name}.mean": torch.full((6,), mean), f"{name}.std": torch.full((6,), 10.0)}
    save_file(tensors, path, {"format": "pt"})


CLEAR = {
    "0.3": {
        "normalize_inputs.buffer_observation_state": 50.0,
        "normalize_targets.buffer_action": 50.0,
        "unnormalize_outputs.buffer_action": 50.0,
    },
    "one-robot-type": {
        "normalize_inputs.so100_buffer_observation_state": 50.0,
        "unnormalize_outputs.so100-red_buffer_action": 50.0,
    },
    "dots": {"so100.buffer.observation.state": 50.0, "so100.buffer.action": 50.0},
    "other-cameras": {
        "normalize_inputs.buffer_observation_state": 50.0,
        "unnormalize_outputs.buffer_action": 50.0,
        "normalize_inputs.buffer_observation_images_gone": 0.5,
    },
}
UNCLEAR = {
    "two-robot-types": (
        {
            "normalize_inputs.so100_buffer_observation_state": 50.0,
            "unnormalize_outputs.so100_buffer_action": 50.0,
            "unnormalize_outputs.so101_buffer_action": 51.0,
        },
        "so100, so101",
    ),
    "no-state": ({"unnormalize_outputs.buffer_action": 50.0}, STATE),
    "never-filled": (
        {
            "normalize_inputs.buffer_observation_state": 50.0,
            "unnormalize_outputs.buffer_action": float("inf"),
        },
        "inf",
    ),
}


@pytest.mark.parametrize("name", CLEAR)
def test_an_old_checkpoint_loads_and_its_processors_take_its_statistics(saved, caplog, capsys, name):
    config, folder = saved
    weights = SmolVLAPolicy.from_pretrained(folder).state_dict()
    add_buffers(folder, CLEAR[name])
    policy = SmolVLAPolicy.from_pretrained(folder)
    assert all(torch.equal(weights[key], value) for key, value in policy.state_dict().items())
    overrides = {"rename_observations_processor": {"rename_map": {"observation.joints": STATE}}}
    pre, post = make_pre_post_processors(policy.config, folder, preprocessor_overrides=overrides)
    fresh, fresh_post = make_smolvla_pre_post_processors(config, WHOLE)
    got = pre({"observation.joints": torch.ones(6), "task": "go"})[STATE]
    assert torch.equal(got, fresh({STATE: torch.ones(6), "task": "go"})[STATE])
    assert torch.equal(post(torch.ones(1, 6)), fresh_post(torch.ones(1, 6)))
    loaded, made = warnings(caplog)
    assert "before LeRobot 0.4" in loaded and "make_pre_post_processors" in loaded
    assert all(buffer in made for buffer in CLEAR[name])
    assert main(["verify", "--policy.path", str(folder), "--frames", "1"]) == 0


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_statistics_of_an_old_checkpoint_are_refused_with_the_way_out(saved, caplog, capsys, name):
    _, folder = saved
    buffers, says = UNCLEAR[name]
    add_buffers(folder, buffers)
    policy = SmolVLAPolicy.from_pretrained(folder)
    with pytest.raises(ValueError, match="dataset_stats") as error:
        make_pre_post_processors(policy.config, folder)
    assert says in str(error.value)
    pre, post = make_pre_post_processors(policy.config, folder, dataset_stats=WHOLE)
    assert torch.equal(post(torch.zeros(1, 6)), torch.full((1, 6), 50.0))
    assert pre({STATE: torch.full((6,), 50.0), "task": "go"})[STATE].abs().max() == 0
    assert main(["verify", "--policy.path", str(folder), "--frames", "1"]) == 2
    refusal = capsys.readouterr().err
    assert says in refusal and "dataset_stats" in refusal


@pytest.mark.parametrize(
    ("name", "robot"),
    [
        ("so100.buffer.action", "so100"), ("buffer_action", ""), ("observation.prev_action", None),
        ("so100.observation.prev_action", None), ("normalize_inputs.buffer_observation_prev_action", None),
        ("observations2.action", "observations2"),
    ],
)  # fmt: skip
def test_a_longer_feature_is_no_robot_type(name, robot):
    assert robot_type(name, ACTION) == robot


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("normalize_inputs.buffer_observation_state.mean", True), ("so100.buffer.action.q01", True),
        ("model.kv_buffer.weight", False), ("model.buffer.0.bias", False), ("normalizer.weight", False),
        ("model.kv_buffer.minimum", False),
    ],
)  # fmt: skip
def test_a_weight_in_a_module_called_buffer_is_no_statistic(name, statistic):
    assert is_buffer(name) is statistic


def test_statistics_named_without_a_dot_are_refused(saved):
    config, folder = saved
    path = next(folder.glob("policy_postprocessor_step_*.safetensors"))
    save_file({"action_mean": torch.zeros(6)}, path)
    with pytest.raises(ValueError, match=r"action_mean.*no dot"):
        make_pre_post_processors(config, folder)
