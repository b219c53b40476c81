"""The configuration: every field, default, preset and file of LeRobot's, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from lerobot.configs import FeatureType as LeRobotFeatureType
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.configs import PolicyFeature as LeRobotFeature
from lerobot.policies.rtc.configuration_rtc import RTCConfig as LeRobotRTCConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig as LeRobotConfig

from smolvla_fast.smolvla import RTCConfig, SmolVLAConfig
from smolvla_fast.smolvla.vlm_config import SmolVLMConfig

pytestmark = pytest.mark.reference

# A value other than the default for every field that may have one.
CHANGED: dict[str, Any] = dict(
    n_obs_steps=2, device="cpu", use_amp=True, use_peft=True, push_to_hub=False, repo_id="me/mine", private=True,
    tags=["arm", "cube"], license="apache-2.0", pretrained_path="some/folder", pretrained_revision="main",
    input_features={
        "observation.images.top": LeRobotFeature(LeRobotFeatureType.VISUAL, (3, 20, 30)),
        "observation.state": LeRobotFeature(LeRobotFeatureType.STATE, (7,)),
        "observation.environment_state": LeRobotFeature(LeRobotFeatureType.ENV, (2,)),
    },
    output_features={"action": LeRobotFeature(LeRobotFeatureType.ACTION, (5,))},
    normalization_mapping={"STATE": NormalizationMode.MIN_MAX, "ACTION": NormalizationMode.QUANTILES},
    chunk_size=20, n_action_steps=7, max_state_dim=16, max_action_dim=12, resize_imgs_with_padding=(256, 128),
    empty_cameras=2, adapt_to_pi_aloha=True, tokenizer_max_length=30, num_steps=4, use_cache=False,
    freeze_vision_encoder=False, train_expert_only=False, train_state_proj=False, optimizer_lr=3e-4,
    optimizer_betas=(0.8, 0.99), optimizer_eps=1e-6, optimizer_weight_decay=1e-3, optimizer_grad_clip_norm=2.5,
    scheduler_warmup_steps=50, scheduler_decay_steps=400, scheduler_decay_lr=1e-5, vlm_model_name="some/vlm",
    load_vlm_weights=True, add_image_special_tokens=True, attention_mode="self_attn", prefix_length=77,
    pad_language_to="max_length", num_expert_layers=4, num_vlm_layers=8, self_attn_every_n_layers=4,
    expert_width_multiplier=0.5, min_period=1e-2, max_period=8.0, compile_model=True, compile_mode="default",
    rtc_config=LeRobotRTCConfig(
        enabled=False, prefix_attention_schedule="EXP", max_guidance_weight=3.5, execution_horizon=6, debug=True,
        debug_maxlen=9,
    ),
)  # fmt: skip


def _plain(value: Any) -> Any:
    """Values of either package as JSON would show them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {getattr(k, "value", k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return getattr(value, "value", str(value) if hasattr(value, "__fspath__") else value)


def test_every_field_and_default_is_lerobots():
    theirs, ours = LeRobotConfig(device="cpu"), SmolVLAConfig(device="cpu")
    assert [f.name for f in dataclasses.fields(ours)] == list(json.loads(json.dumps(_json(theirs))))[1:]
    assert _plain(ours) == _plain(theirs)


def _json(config: LeRobotConfig) -> dict[str, Any]:
    import draccus

    return draccus.encode(config, PreTrainedConfig)


def test_changed_covers_every_field():
    fixed = {"use_delta_joint_actions_aloha"}  # refused by both
    assert {f.name for f in dataclasses.fields(LeRobotConfig)} - set(CHANGED) == fixed
    default = _plain(LeRobotConfig(device="cpu"))
    same = [name for name, value in CHANGED.items() if _plain(value) == default[name]]
    assert same == ["device"]


@pytest.mark.parametrize("fields", [{}, CHANGED], ids=["default", "changed"])
def test_config_json_crosses_both_ways(tmp_path, fields):
    """LeRobot's file read and written again is the same file; what LeRobot reads from ours is what it had."""
    theirs = LeRobotConfig(**{"device": "cpu", **fields})
    (tmp_path / "theirs").mkdir()
    theirs._save_pretrained(tmp_path / "theirs")
    ours = SmolVLAConfig.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "theirs/config.json").read_bytes() == (tmp_path / "ours/config.json").read_bytes()
    assert PreTrainedConfig.from_pretrained(tmp_path / "ours") == PreTrainedConfig.from_pretrained(
        tmp_path / "theirs"
    )
    assert _plain(ours) == _plain(theirs)


def test_properties_are_lerobots():
    theirs = LeRobotConfig(**CHANGED)
    ours = SmolVLAConfig(**CHANGED)
    for config in (theirs, ours):
        config.validate_features()
        config.validate_features()
    names = (
        "type", "observation_delta_indices", "action_delta_indices", "reward_delta_indices",
        "robot_state_feature",
        "env_state_feature", "image_features", "action_feature", "input_features",
    )  # fmt: skip
    for name in names:
        assert _plain(getattr(ours, name)) == _plain(getattr(theirs, name)), name
    assert list(ours.image_features)[-1] == "observation.images.empty_camera_1"


@pytest.mark.parametrize("fields", [{}, CHANGED], ids=["default", "changed"])
@pytest.mark.parametrize("steps", [1, 37, 200, 30_000, 40_000])
def test_presets_are_lerobots(fields, steps):
    """The same optimizer arguments, and the same learning rate at every step, shortened runs included."""
    rates, optimizers = [], []
    for config in (
        LeRobotConfig(**{"device": "cpu", **fields}),
        SmolVLAConfig(**{"device": "cpu", **fields}),
    ):
        preset = config.get_optimizer_preset()
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        # LeRobot's preset takes named groups as well as parameters; both take a list.
        optimizer = preset.build([parameter])
        scheduler = config.get_scheduler_preset().build(optimizer, steps)
        schedule = []
        for _ in range(min(steps, 300)):
            parameter.grad = parameter.detach() * 2
            optimizer.step()
            schedule.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
        scale = scheduler.lr_lambdas[0]
        rates.append([*schedule, *(scale(step) for step in range(0, steps, 97))])
        optimizers.append((preset.grad_clip_norm, optimizer.defaults, parameter.detach()))
    assert rates[0] == rates[1]
    assert optimizers[0][:2] == optimizers[1][:2]
    assert torch.equal(optimizers[0][2], optimizers[1][2])


def test_default_presets_are_the_papers():
    config = SmolVLAConfig(device="cpu")
    optimizer, scheduler = config.get_optimizer_preset(), config.get_scheduler_preset()
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (1e-4, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.grad_clip_norm) == (1e-10, 10)
    assert (scheduler.num_warmup_steps, scheduler.num_decay_steps, scheduler.decay_lr) == (
        1_000,
        30_000,
        2.5e-6,
    )


BAD = {
    "n_action_steps": (dict(n_action_steps=60), ValueError, "chunk_size"),
    "chunk_size": (dict(chunk_size=0), ValueError, "at least 1"),
    "num_steps": (dict(num_steps=0), ValueError, "at least 1"),
    "max_action_dim": (dict(max_action_dim=-1), ValueError, "at least 1"),
    "num_vlm_layers": (dict(num_vlm_layers="16"), ValueError, "int"),
    "use_cache": (dict(use_cache=1), ValueError, "bool"),
    "optimizer_lr": (dict(optimizer_lr="fast"), ValueError, "float"),
    "tokenizer_max_length": (dict(tokenizer_max_length=True), ValueError, "int"),
    "attention_mode": (dict(attention_mode="flash"), ValueError, "'cross_attn' or 'self_attn'"),
    "pad_language_to": (dict(pad_language_to="left"), ValueError, "'longest' or 'max_length'"),
    "resize_imgs_with_padding": (dict(resize_imgs_with_padding=512), ValueError, "two values"),
    "optimizer_betas": (dict(optimizer_betas=(0.9,)), ValueError, "two values"),
    "min_period": (dict(min_period=0.0), ValueError, "0 < min <= max"),
    "expert_width_multiplier": (dict(expert_width_multiplier=0.0), ValueError, "positive"),
    "empty_cameras": (dict(empty_cameras=-1), ValueError, "negative"),
    "use_delta_joint_actions_aloha": (dict(use_delta_joint_actions_aloha=True), NotImplementedError, "False"),
    "input_features": (dict(input_features={"observation.state": {"type": "STATE"}}), ValueError, "'shape'"),
    "output_features": (
        dict(output_features={"action": {"type": "ACT", "shape": [6]}}),
        ValueError,
        "'ACTION'",
    ),
    "normalization_mapping": (dict(normalization_mapping={"STATE": "ZSCORE"}), ValueError, "'MEAN_STD'"),
    "rtc_config": (dict(rtc_config={"horizon": 3}), ValueError, "execution_horizon"),
    "device": (dict(device="tpu"), (ValueError, RuntimeError), "cpu"),
}


@pytest.mark.parametrize("field", BAD)
def test_bad_settings_name_the_field_and_what_is_accepted(field):
    fields, error, accepted = BAD[field]
    with pytest.raises(error) as caught:
        SmolVLAConfig(**{"device": "cpu", **fields})
    assert field in str(caught.value)
    assert accepted in str(caught.value)


@pytest.mark.parametrize("fields", [dict(max_guidance_weight=0.0), dict(debug_maxlen=0)])
def test_rtc_config_refuses_bad_settings(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        RTCConfig(**fields)
    with pytest.raises(ValueError):
        LeRobotRTCConfig(**fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"type": "act"}', "'act'"),
        ('{"chunk_size": 5}', "'smolvla'"),
        ('{"type": "smolvla", "chunksize": 5}', "chunk_size"),
        ('{"type": "smolvla"', "not valid JSON"),
        ("[]", "JSON object"),
    ],
)
def test_config_refuses_bad_files(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        SmolVLAConfig.from_pretrained(tmp_path)
    assert message in str(caught.value)


def test_config_names_a_missing_file(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"config\.json not found in .*weights\.bin"):
        SmolVLAConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        SmolVLAConfig.from_pretrained("nobody/nothing")
    with pytest.raises(TypeError, match="revison"):
        SmolVLAConfig.from_pretrained(tmp_path, revison="main")


PRESENT = {
    "no accelerator": (), "CUDA": ("torch.cuda.is_available",), "MPS": ("torch.backends.mps.is_available",),
    "XPU": ("torch.xpu.is_available",),
}  # fmt: skip


@pytest.mark.parametrize("use_amp", [False, True])
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize(
    "device", [None, "", "cpu", "cuda", "cuda:1", "mps", "xpu", "cpu:0", "mps:0", "meta", "tpu", "CUDA"]
)
def test_devices_are_chosen_and_refused_as_by_lerobot(device, present, use_amp, monkeypatch, caplog):
    """The same device and use_amp, or the same exception; a warning where LeRobot warns of a device that was named."""
    for name in ("torch.cuda", "torch.backends.mps", "torch.xpu"):
        there = f"{name}.is_available" in PRESENT[present]
        monkeypatch.setattr(f"{name}.is_available", lambda there=there: there)

    def outcome(cls):
        caplog.clear()
        try:
            config = cls(device=device, use_amp=use_amp)
        except Exception as error:
            return type(error), False
        # The root's own remark that a processor is slow is LeRobot's, about the machine.
        warned = any(r.levelname == "WARNING" and r.name != "root" for r in caplog.records)
        return (config.device, config.use_amp), warned

    (theirs, they_warn), (ours, we_warn) = outcome(LeRobotConfig), outcome(SmolVLAConfig)
    assert ours == theirs
    # Where no device is named, LeRobot warns that 'None' is not available; there is nothing to warn of.
    amp_dropped = use_amp and isinstance(ours, tuple) and not ours[1]
    assert we_warn == (they_warn if device else amp_dropped)


def test_a_device_that_is_not_there_is_named(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    SmolVLAConfig(device="cuda")
    assert "'cuda' is not available" in caplog.text


@pytest.mark.parametrize(
    "absent", [(), ("text_config",), ("vision_config",), ("text_config", "vision_config")]
)
def test_backbone_config_is_what_transformers_reads(tmp_path, absent):
    """Missing fields, whole parts included, take the defaults of transformers; the file may be sparse."""
    import transformers

    sparse = {
        "model_type": "smolvlm",
        "scale_factor": 3,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 60,
            "num_attention_heads": 5,
            "qk_layer_norms": False,
        },
        "vision_config": {"hidden_size": 96, "patch_size": 8, "torch_dtype": "bfloat16"},
    }
    for name in absent:
        del sparse[name]
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    ours = SmolVLMConfig.from_file(tmp_path / "config.json")
    for part, reference in (
        (ours, theirs),
        (ours.text_config, theirs.text_config),
        (ours.vision_config, theirs.vision_config),
    ):
        for entry in dataclasses.fields(part):
            if entry.name not in ("text_config", "vision_config"):
                assert getattr(part, entry.name) == getattr(reference, entry.name), entry.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "idefics3"}, "'smolvlm'"),
        ({"text_config": {"model_type": "qwen2"}}, "'llama'"),
        ({"text_config": {"num_attention_heads": 5, "num_key_value_heads": 2}}, "num_key_value_heads"),
        ({"text_config": {"dtype": "float33"}}, "float33"),
    ],
)
def test_backbone_refuses_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        SmolVLMConfig.from_dict({"model_type": "smolvlm", **change})
