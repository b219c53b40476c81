"""The checkpoint that ``--policy.path`` names: checked before its weights are read, loaded, and what its processors lack."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..measure.console import CommandError
from ..smolvla.features import ACTION, OBS_STATE
from ..smolvla.hub import CONFIG_NAME, WEIGHTS_NAME, find_file, is_absent
from ..smolvla.weights_io import WeightsError, check_names

COUNTS = (
    "num_steps", "chunk_size", "n_action_steps", "max_state_dim", "max_action_dim", "tokenizer_max_length",
)  # fmt: skip
"""Fields of config.json that must be above 0."""


ADAPTERS = "adapter_config.json"
MERGE = """--policy.path {path}: adapters of PEFT, without the weights that they adapt. Merge them with Python, copy the \
adapters' policy_* files to {merged}, and give that:
    import peft; from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    config = PreTrainedConfig.from_pretrained("{path}"); config.use_peft = False
    policy = peft.PeftModel.from_pretrained(SmolVLAPolicy.from_pretrained("{base}", config=config), "{path}")
    policy.merge_and_unload().save_pretrained("{merged}")"""
"""What to do with adapters."""


def check(path: str) -> None:
    """CommandError unless ``config.json`` is of a SmolVLA checkpoint that can compute, before weights are read."""
    advice = "give the folder of a saved SmolVLA policy or a Hub id such as lerobot/smolvla_base"
    folder = Path(path)
    try:
        if not path:
            raise CommandError(f"--policy.path is empty; {advice}")
        if not folder.exists() and (path.startswith((".", "~", os.sep)) or path.count("/") != 1):
            raise CommandError(f"--policy.path {path}: no such folder; {advice}")
        if folder.is_file():
            raise CommandError(f"--policy.path {path}: a file; {advice}")
        if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
            for inner in ("checkpoints/last/pretrained_model", "last/pretrained_model", "pretrained_model"):
                if (folder / inner / CONFIG_NAME).is_file():  # of a training run
                    advice = f"give {folder / inner}"
            raise CommandError(f"--policy.path {path}: no {CONFIG_NAME} in it; {advice}")
        config = json.loads(find_file(path, CONFIG_NAME).read_bytes())
        kind = config.get("type") if isinstance(config, dict) else type(config).__name__
        if kind != "smolvla":
            raise CommandError(
                f"--policy.path {path}: {CONFIG_NAME} is of {kind!r}, not of 'smolvla'; {advice}"
            )
        if is_absent(path, WEIGHTS_NAME) and not is_absent(path, ADAPTERS):
            base = json.loads(find_file(path, ADAPTERS).read_bytes()).get("base_model_name_or_path")
            raise CommandError(MERGE.format(path=path, base=base, merged=f"{folder.name}-merged"))
        inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
        cameras = [
            key
            for key, feature in inputs.items()
            if feature["type"] == "VISUAL" and "empty_camera" not in key
        ]
        kinds = {key: feature["type"] for key, feature in (*inputs.items(), *outputs.items())}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise CommandError(f"--policy.path {path}: cannot read {CONFIG_NAME} ({error}); {advice}") from error
    own = ((OBS_STATE, "STATE", inputs), (ACTION, "ACTION", outputs))
    missing = [
        name if name not in declared else f"{name} of type {kind}"
        for name, kind, declared in own
        if name not in declared or kinds[name] != kind
    ]
    missing += [] if cameras else ["a camera, of type VISUAL and not an empty one,"]
    if missing:
        raise CommandError(
            f"--policy.path {path}: {CONFIG_NAME} declares no {' and no '.join(missing)}, which SmolVLA computes with; it "
            f"declares {kinds}. Train it on a dataset, or fill input_features and output_features"
        )
    for field, features in (("input_features", inputs), ("output_features", outputs)):
        for key in (*cameras, OBS_STATE, ACTION):
            shape, camera = features[key].get("shape") if key in features else [1], key in cameras
            whole = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
            if key in features and not (whole and (len(shape) == 3 if camera else shape)):
                accepted = "[channels, height, width]" if camera else "[n]"
                raise CommandError(
                    f"--policy.path {path}: {CONFIG_NAME}: {field}[{key!r}] has the shape {shape}; accepted is {accepted}, "
                    "whole numbers above 0"
                )
    for name in COUNTS:
        if name in config and not (type(config[name]) is int and config[name] > 0):
            raise CommandError(
                f"--policy.path {path}: {CONFIG_NAME}: {name} is {config[name]!r}; accepted is a whole number above 0"
            )


def load(path: str, device: torch.device, policy_class: Any) -> Any:
    """The policy in eval mode on the device. CommandError where files are missing, damaged or of another model."""
    try:
        policy = policy_class.from_pretrained(path).to(device).eval()
        check_names(policy, path)
        return policy
    except Exception as error:
        # The Hub, safetensors, draccus and transformers each raise their own.
        cause = error.__cause__ or error if "instantiate" in str(error) else error
        reason = " ".join((str(getattr(cause, "what", cause)).strip() or type(cause).__name__).split())
        reason = reason if isinstance(cause, WeightsError) else reason[:400]
        way = no_backbone(path) or (
            "give the folder of a saved SmolVLA policy, or a Hub id if this machine can reach the Hub"
        )
        raise CommandError(
            f"--policy.path {path}: cannot load it ({type(cause).__name__}: {reason}); {way}"
        ) from error


def no_backbone(path: str) -> str | None:
    """What to do where the files that a checkpoint takes of its backbone, sizes and tokenizer, are not here; else None."""
    from ..smolvla import SmolVLAConfig

    config = json.loads(find_file(path, CONFIG_NAME).read_bytes())
    name = str(config.get("vlm_model_name", SmolVLAConfig.vlm_model_name))
    try:
        for file in (CONFIG_NAME, "tokenizer_config.json"):
            find_file(name, file)
    except FileNotFoundError:
        way = f"where the Hub can be reached, run `hf download {name} --include '*.json'`"
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            way = "name a folder or Hub id of it there"
        return f"its backbone {name}, vlm_model_name of {CONFIG_NAME}, is not on this machine: {way}"
    return None


SAVE = (
    "save processors anew with the statistics of the training data (make_pre_post_processors(config, dataset_stats=...) and "
    "save_pretrained of both)"
)


def unnormalized(path: str, config: Any) -> str | None:
    """A message naming the features that a checkpoint's processors do not normalise although its configuration says so.

    None where there are none. raises  CommandError for files of processors that cannot be read
    """
    from ..smolvla.processor_smolvla import not_normalised, unnormalized_in

    try:
        faults = unnormalized_in(config, path)
    except (OSError, ValueError) as error:
        if not Path(path).is_dir() and isinstance(error, OSError):
            return None  # the Hub cannot be reached, so nothing is known of the processors
        raise CommandError(
            f"--policy.path {path}: cannot read its processors: {error}; copy or download the checkpoint again, or {SAVE}"
        ) from error
    if not faults:
        return None
    return (
        f"--policy.path {path}: its processors leave a robot's values as they are, {not_normalised(faults)}; {SAVE}, "
        "or say IDENTITY in normalization_mapping of config.json and of the processors if that is meant"
    )
