"""Pre- and postprocessors against LeRobot's: outputs, saved files, and each loading what the other saved.

Bit by bit: normalisation is a few elementwise operations, written in the same order.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from lerobot.configs import NormalizationMode
from lerobot.policies.smolvla.processor_smolvla import (
    make_smolvla_pre_post_processors as make_lerobot_processors,
)
from lerobot.policies.utils import prepare_observation_for_inference as lerobot_prepare
from lerobot.processor import PolicyProcessorPipeline as LeRobotPipeline
from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action
from support.smolvla_pairs import ACTION, CAMERAS, STATE, assert_same, copied, lerobot_config, our_config

from smolvla_fast.smolvla import (
    make_pre_post_processors,
    make_smolvla_pre_post_processors,
    prepare_observation_for_inference,
)
from smolvla_fast.smolvla.pipeline import PolicyProcessorPipeline

pytestmark = pytest.mark.reference

TASK = "pick up the red cube"
MODES = [mode.value for mode in NormalizationMode]


def make_stats(seed: int = 0, dims: int = 6) -> dict[str, dict[str, Any]]:
    """Every statistic of a dataset, as arrays, lists and tensors, with one constant dimension."""
    rng = np.random.default_rng(seed)
    stats: dict[str, dict[str, Any]] = {}
    for key in (STATE, ACTION):
        low = rng.normal(size=dims)
        spread = np.abs(rng.normal(size=dims)) + 0.1
        spread[2] = 0.0
        stats[key] = {
            "mean": low + spread / 2, "std": (spread / 3).tolist(), "min": torch.tensor(low), "max": low + spread,
            "q01": low + 0.01, "q99": low + 0.01 + spread, "q10": low + 0.1, "q90": low + 0.1 + spread,
            "count": np.array([57]), "note": None,
        }  # fmt: skip
    stats[CAMERAS[0]] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1], "min": [0.0] * 3, "max": [1.0] * 3}
    stats[CAMERAS[1]] = {"mean": rng.random((3, 1, 1)), "std": rng.random((3, 1, 1))}
    return stats


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "max_length": dict(pad_language_to="max_length"),
    "truncated": dict(tokenizer_max_length=7),
    "truncated_max_length": dict(tokenizer_max_length=7, pad_language_to="max_length"),
    "empty_camera": dict(empty_cameras=1),
    "unequal_dims": dict(state_dim=9, action_dim=4),
    **{
        f"mode_{mode}": dict(
            normalization_mapping={"STATE": NormalizationMode(mode), "ACTION": NormalizationMode(mode)}
        )
        for mode in MODES
    },
    "visual_mean_std": dict(normalization_mapping={"VISUAL": NormalizationMode.MEAN_STD}),
    "no_mapping": dict(normalization_mapping={}),
}
STATS: dict[str, Any] = {"all": make_stats, "none": lambda: None, "empty": dict}


def batches(dims: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """What data loaders, environments and robots hand over."""
    rng = torch.Generator().manual_seed(3)
    frame = torch.rand(3, 24, 40, generator=rng)
    state, action = torch.randn(dims[0], generator=rng), torch.randn(dims[1], generator=rng)
    return {
        "single": {CAMERAS[0]: frame, CAMERAS[1]: frame, STATE: state, "task": TASK},
        "single_trained_on": {
            CAMERAS[0]: frame, STATE: state, ACTION: action, "task": TASK + "\n", "index": torch.tensor(5),
            "task_index": torch.tensor(1), "action_is_pad": torch.tensor([False, True]),
            "next.reward": torch.tensor(1.0),
        },
        "batch": {
            CAMERAS[0]: frame.expand(3, -1, -1, -1), STATE: state.expand(3, -1), "task": [TASK, "stop", "go\n"],
            ACTION: action.expand(3, 8, -1), "action_is_pad": torch.zeros(3, 8, dtype=torch.bool),
            "timestamp": torch.arange(3.0), "episode_index": torch.arange(3), "next.done": torch.zeros(3),
        },
        "tuple_of_tasks": {STATE: state.expand(2, -1), "task": ("left", "right arm")},
        "doubles": {STATE: state.double(), ACTION: action.double(), CAMERAS[1]: frame.double(), "task": TASK},
        "halves": {STATE: state.bfloat16(), ACTION: action.bfloat16(), "task": TASK},
        "history": {STATE: state.expand(2, 3, -1), CAMERAS[0]: frame.expand(2, 3, -1, -1, -1), "task": ["a", "b"]},
        "other_observations": {
            "observation.environment_state": torch.arange(4.0), "observation.image": frame, "observation.images": frame,
            STATE: state, "task": TASK, "robot_type": "so101", "info": {"a": 1}, "next.truncated": True,
        },
        "messages": {
            STATE: state, "task": TASK, "messages": [{"role": "user"}], "message_streams": ["a"],
            "target_message_indices": [0], "language_events": [1], "language_persistent": "x",
        },
        "batched_messages": {STATE: state, "task": TASK, "messages": [[{"role": "user"}]], "message_streams": []},
    }  # fmt: skip


def compare(name: str, stock: Any, ours: Any) -> None:
    if isinstance(stock, dict):
        assert list(stock) == list(ours) or set(stock) == set(ours), name
        for key in stock:
            compare(name, stock[key], ours[key])
    elif isinstance(stock, torch.Tensor):
        assert_same("processor outputs", name, stock, ours)
    else:
        assert stock == ours, name


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_processors_give_what_lerobots_give(backbones, name, stats):
    config = lerobot_config(backbones(), **CONFIGS[name])
    dims = config.robot_state_feature.shape[0], config.action_feature.shape[0]
    values = STATS[stats]()
    if values and dims != (6, 6):
        values = {STATE: make_stats(1, dims[0])[STATE], ACTION: make_stats(2, dims[1])[ACTION]}
    config.validate_features()
    stock, stock_post = make_lerobot_processors(config, values)
    ours, our_post = make_smolvla_pre_post_processors(our_config(config), values)
    for kind, batch in batches(dims).items():
        try:
            expected = stock(copied(batch))
        except ValueError:
            # For instance statistics that the mode needs and this camera lacks.
            with pytest.raises(ValueError):
                ours(copied(batch))
            continue
        compare(f"{name}/{stats}/{kind}", expected, ours(copied(batch)))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        action = torch.randn(2, 5, dims[1]).to(dtype)
        compare(f"{name}/{stats}/post", stock_post(action.clone()), our_post(action.clone()))
        compare(f"{name}/{stats}/post", stock_post(action[0, 0].clone()), our_post(action[0, 0].clone()))


@pytest.mark.parametrize("stats", STATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_files_are_the_same_bytes(backbones, tmp_path, name, stats):
    """JSON and safetensors that either writes, and that ours writes after reading LeRobot's."""
    config = lerobot_config(backbones(), **CONFIGS[name])
    values = STATS[stats]()
    if config.action_feature.shape != (6,):
        values = None
    for pipeline in make_lerobot_processors(config, values):
        pipeline.save_pretrained(tmp_path / "theirs")
    for pipeline in make_smolvla_pre_post_processors(our_config(config), values):
        pipeline.save_pretrained(tmp_path / "ours")
    for pipeline in make_pre_post_processors(our_config(config), tmp_path / "theirs"):
        pipeline.save_pretrained(tmp_path / "again")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert len(files) == (4 if values else 2)
    for folder in ("ours", "again"):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == files
        for file in files:
            assert (tmp_path / folder / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file


@pytest.fixture
def saved(backbones, tmp_path):
    """A folder with LeRobot's processors, one with ours, and the configuration."""
    config = lerobot_config(backbones())
    for pipeline in make_lerobot_processors(config, make_stats()):
        pipeline.save_pretrained(tmp_path / "theirs")
    for pipeline in make_smolvla_pre_post_processors(our_config(config), make_stats()):
        pipeline.save_pretrained(tmp_path / "ours")
    return config, tmp_path


def test_each_loads_what_the_other_saved(saved):
    config, root = saved
    stock = LeRobotPipeline.from_pretrained(root / "ours", config_filename="policy_preprocessor.json")
    stock_post = LeRobotPipeline.from_pretrained(
        root / "ours", config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition, to_output=transition_to_policy_action,
    )  # fmt: skip
    ours, our_post = make_pre_post_processors(our_config(config), root / "theirs")
    for kind, batch in batches((6, 6)).items():
        compare(f"saved/{kind}", stock(copied(batch)), ours(copied(batch)))
    action = torch.randn(4, 6)
    compare("saved/post", stock_post(action.clone()), our_post(action.clone()))
    assert len(ours) == 6 and ours[3].registry_name == "tokenizer_processor"
    assert set(ours.state_dict()) == {"policy_preprocessor_step_5_normalizer_processor"}
    ours.reset()


def test_overrides_replace_settings_of_steps(saved):
    """Settings that replace the file's: a rename, other statistics, a dtype. Given statistics outlast the file's."""
    config, root = saved
    overrides = {
        "rename_observations_processor": {"rename_map": {"observation.images.top": CAMERAS[0]}},
        "normalizer_processor": {"stats": make_stats(9)},
        "device_processor": {"device": "cpu", "float_dtype": "float64"},
    }
    batch = {"observation.images.top": torch.rand(3, 8, 8), STATE: torch.randn(6), "task": TASK}
    stock = LeRobotPipeline.from_pretrained(
        root / "theirs", config_filename="policy_preprocessor.json", overrides=overrides
    )
    ours, _ = make_pre_post_processors(our_config(config), root / "theirs", preprocessor_overrides=overrides)
    compare("overrides", stock(copied(batch)), ours(copied(batch)))
    restated, post = make_pre_post_processors(
        our_config(config), root / "theirs", dataset_stats=make_stats(9)
    )
    plain = {STATE: batch[STATE], "task": TASK}
    fresh, fresh_post = make_smolvla_pre_post_processors(our_config(config), make_stats(9))
    assert torch.equal(restated(plain)[STATE], fresh(plain)[STATE])
    assert torch.equal(post(torch.ones(1, 6)), fresh_post(torch.ones(1, 6)))


def test_checkpoint_of_a_gpu_machine_runs_on_the_cpu(saved):
    config, root = saved
    path = root / "theirs/policy_preprocessor.json"
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    pre, _ = make_pre_post_processors(our_config(config), root / "theirs")
    assert pre({STATE: torch.randn(6), "task": TASK})[STATE].device.type == "cpu"


def test_one_token_budget_for_all_three_paddings(backbones):
    """longest pads to the longest of the batch, max_length to the limit, on the right; both cut at the limit."""
    tokens = {}
    for padding in ("longest", "max_length"):
        config = our_config(lerobot_config(backbones(), pad_language_to=padding, tokenizer_max_length=12))
        pre, _ = make_smolvla_pre_post_processors(config)
        out = pre({STATE: torch.zeros(2, 6), "task": ["go", "stop now"]})
        tokens[padding] = out["observation.language.tokens"], out["observation.language.attention_mask"]
        assert pre({STATE: torch.zeros(6), "task": "x" * 50})["observation.language.tokens"].shape == (1, 12)
    assert tokens["longest"][0].shape == (2, 9) and tokens["max_length"][0].shape == (2, 12)
    assert tokens["max_length"][1].tolist() == [[True] * 3 + [False] * 9, [True] * 9 + [False] * 3]


def test_raw_frames_are_prepared_as_lerobot_does():
    rng = np.random.default_rng(0)
    observation = {
        CAMERAS[0]: rng.integers(0, 256, (20, 30, 3), dtype=np.uint8),
        CAMERAS[1]: rng.random((20, 30, 3), dtype=np.float32),
        STATE: rng.random(6, dtype=np.float32),
    }
    kept = {key: value.copy() for key, value in observation.items()}
    ours = prepare_observation_for_inference(observation, "cpu", TASK, "so101")
    assert all(np.array_equal(observation[key], kept[key]) for key in kept)
    compare("raw frames", lerobot_prepare(kept, torch.device("cpu"), TASK, "so101"), ours)
    assert ours[CAMERAS[0]].shape == (1, 3, 20, 30) and ours[CAMERAS[0]].max() <= 1
    with pytest.raises(ValueError, match=r"camera1 must be a frame \[height, width, channels\]"):
        prepare_observation_for_inference({CAMERAS[0]: np.zeros((3, 20, 30), np.uint8)})


def _processors(backbones, stats=None, **fields):
    return make_smolvla_pre_post_processors(our_config(lerobot_config(backbones(), **fields)), stats)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({STATE: torch.zeros(6)}, "'task' must be a string"),
        ({STATE: torch.zeros(6), "task": None}, "'task' must be a string"),
        ({STATE: torch.zeros(6), "task": 3}, "got 3"),
        ({"task": TASK}, r"start with 'observation\.'"),
        ({"state": torch.zeros(6), "task": TASK}, r"start with 'observation\.'"),
        ({STATE: torch.zeros(6), "task": TASK, ACTION: [1.0]}, "'action' must be a torch tensor"),
        (
            {STATE: torch.zeros(8), "task": TASK},
            r"observation\.state.* has 8 values, its statistics are for 6",
        ),
        ([1, 2], "dictionary"),
    ],
)
def test_bad_batches(backbones, batch, message):
    pre, _ = _processors(backbones, make_stats())
    with pytest.raises(ValueError, match=message):
        pre(batch)


def test_processors_refuse_bad_actions_and_statistics(backbones):
    _, post = _processors(backbones, make_stats())
    with pytest.raises(ValueError, match="torch tensor, got dict"):
        post({"action": torch.zeros(6)})
    with pytest.raises(ValueError, match="'action' has 7 values"):
        post(torch.zeros(1, 7))
    pre, _ = _processors(backbones, {STATE: {"mean": torch.zeros(6)}})
    with pytest.raises(ValueError, match=r"MEAN_STD .*'observation\.state' .*missing are \['std'\]"):
        pre({STATE: torch.zeros(6), "task": TASK})
    with pytest.raises(ValueError, match=r"statistics of 'observation\.state'"):
        _processors(backbones, {STATE: [1.0]})


def test_processors_refuse_bad_files(saved):
    config, root = saved
    ours = our_config(config)
    folder = root / "theirs"
    path = folder / "policy_preprocessor.json"
    original = json.loads(path.read_text())

    def refused(error, match, content=None, **kwargs):
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(error, match=match):
            make_pre_post_processors(ours, folder, **kwargs)
        path.write_text(json.dumps(original))

    refused(ValueError, "not valid JSON", "{")
    refused(ValueError, "must have 'steps'", {"type": "act"})
    refused(ValueError, "'mystery' that SmolVLA does not use", {"steps": [{"registry_name": "mystery"}]})
    refused(ValueError, r"'my\.Step' that SmolVLA does not use", {"steps": [{"class": "my.Step"}]})
    wrong = json.loads(json.dumps(original))
    wrong["steps"][3]["config"]["max_len"] = 5
    refused(ValueError, "'tokenizer_processor' .* refuses its settings", wrong)
    wrong = json.loads(json.dumps(original))
    wrong["steps"][3]["config"].pop("tokenizer_name")
    refused(ValueError, "tokenizer_name", wrong)
    wrong = json.loads(json.dumps(original))
    wrong["steps"][4]["config"]["float_dtype"] = "int4"
    refused(ValueError, "'int4' is not one of", wrong)
    refused(KeyError, "normaliser.*its steps are", preprocessor_overrides={"normaliser": {}})
    state = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    refused(ValueError, "not a complete safetensors file")
    state.unlink()
    refused(FileNotFoundError, "policy_preprocessor_step_5_normalizer_processor")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"policy_preprocessor\.json not found in"):
        make_pre_post_processors(ours, folder)
    with pytest.raises(TypeError, match="revison"):
        PolicyProcessorPipeline.from_pretrained(folder, "policy_postprocessor.json", revison="main")
