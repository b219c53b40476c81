"""Reads the flags and files of ``lerobot-train`` into ``TrainSettings``, by draccus as LeRobot does."""

from __future__ import annotations

import os
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from draccus.cfgparsing import load_config, parse_string
from draccus.utils import deflatten
from mergedeep import merge

from ..smolvla import SmolVLAConfig
from ..smolvla.devices import best_device, device_is_available
from ..smolvla.hub import find_file
from .checkpoint import STATE, Checkpoints
from .errors import TrainingError, root_cause
from .resume import go_on
from .settings import CHOICES, GROUPS, TrainSettings, accepted, flags, nearest, shown

# Flags of lerobot-train without a counterpart here: the values that are accepted, since they ask for nothing (None: any),
# and the advice for other values. A name covers all names below it.
IGNORED = (
    "job_name", "checkpoint_path", "prefetch_factor", "persistent_workers", "dataloader_multiprocessing_context", "job",
    "wandb.disable_artifact", "wandb.add_tags", "env_eval_freq", "eval", "eval.n_episodes", "eval.batch_size",
    "eval.use_async_envs", "eval.recording", "dataset.image_transforms", "dataset.return_uint8",
    "dataset.depth_output_unit",
)  # fmt: skip
LEROBOTS: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    **dict.fromkeys(IGNORED, (None, "")),
    "cudnn_deterministic": ((False,), "set torch.backends.cudnn.deterministic in a loop of your own"),
    "job.target": ((None, "local"), "run this command on the machine that is to train"),
    "env": ((None,), "evaluate a checkpoint with lerobot-eval"),
    **dict.fromkeys(("reward_model", "sample_weighting"), ((None,), "use lerobot-train")),
    "save_checkpoint_to_hub": ((False,), "upload a checkpoint's pretrained_model"),
    "dataset.image_transforms.enable": ((False,), "leave it out, or train with lerobot-train, which has them"),
    "dataset.streaming": ((False,), "download the dataset, or name its folder with --dataset.root"),
    "dataset.repo_type": (("dataset",), "download the dataset, or name its folder with --dataset.root"),
    "policy.push_to_hub": ((False,), "it uploads nothing; upload a checkpoint's pretrained_model"),
    "use_policy_training_preset": ((True,), "set --policy.optimizer_* and --policy.scheduler_*"),
    "optimizer": ((None,), "set --policy.optimizer_*"), "scheduler": ((None,), "set --policy.scheduler_*"),
}  # fmt: skip
SETTINGS = {name: entry for name, entry in flags().items() if name not in (*GROUPS, "policy_path", *LEROBOTS)}
TEXTS = {name for name, entry in SETTINGS.items() if str(entry.type).startswith(("str", "Path"))} - {*CHOICES}


def read_settings(given: dict[str, str]) -> tuple[TrainSettings, Path | None]:
    """The settings of a run, and the checkpoint to resume from (None: a new run). TrainingError names the flag at fault.

    given  name -> text of every flag on the command line
    """
    config_path = given.get("config_path")
    others = ("config_path", "passed_on")  # the latter is of every command's arguments
    values = {name: _value(name, text) for name, text in given.items() if name not in others}
    asked = _ours(deflatten(dict(sorted(values.items()))))
    _check_device(asked.get("policy", {}).get("device"))
    if not asked.get("output_dir"):
        asked.pop("output_dir", None)
    resume = asked.pop("resume", False)
    if not isinstance(resume, bool):
        raise TrainingError(f"--resume={given['resume']}: accepted is true or false")
    if resume:
        checkpoint = _checkpoint(asked, config_path)
        return go_on(asked, checkpoint), checkpoint
    file = _load(config_path) if config_path is not None else {}
    if file.pop("resume", False):
        raise TrainingError(f"--config_path={config_path} is of a run that goes on; add --resume=true")
    merged = merge({"policy": {}, "dataset": {}}, file, asked)
    if merged.get("output_dir") is None:
        merged["output_dir"] = f"outputs/train/{datetime.now():%Y-%m-%d/%H-%M-%S}_smolvla"
    policy, base = merged["policy"], {"device": best_device()}
    # LeRobot's other name is of weights to start from, under the configuration given by the flags.
    source = policy.pop("path", None)
    if source is None:
        source = policy.get("pretrained_path")
    elif not str(source):
        raise TrainingError("--policy.path is empty: give a folder or Hub id; without it, weights are fresh")
    else:
        source = os.path.expanduser(str(source))
        try:
            base = SmolVLAConfig.from_pretrained(source).to_dict()
        except (OSError, ValueError, NotImplementedError) as error:
            raise TrainingError(f"--policy.path={source}: {error}") from error
    merged["policy"] = {**merge({}, base, policy), "push_to_hub": False, "pretrained_path": source}
    return TrainSettings.from_dict({**merged, "policy_path": source}), None


def _value(name: str, text: str) -> Any:
    """A flag's text read as YAML, as draccus does.

    A text or path is taken as typed where YAML makes something else of it, as the date that ``2024-05-01`` is.
    """
    if name == "policy.path":  # which LeRobot takes literally
        return text
    try:
        value = parse_string(text)
    except Exception as error:  # pyyaml's errors, and those of its tags
        if name in TEXTS:
            return text
        words = f"; accepted is {accepted(SETTINGS[name])}" if name in SETTINGS else ""
        said = f"cannot be read as YAML ({root_cause(error)})"
        raise TrainingError(f"--{name}={text}: {said}{words}") from error
    return value if name not in TEXTS or value is None or isinstance(value, str) else text


def _load(config_path: str) -> dict[str, Any]:
    """The settings in a YAML, JSON or TOML file of LeRobot's, or in the train_config.json of a folder or Hub id."""
    try:
        path = Path(config_path)
        path = path if path.is_file() else find_file(config_path, "train_config.json")
        with path.open(encoding="utf-8") as stream:
            values = load_config(stream, file=path)
        if not isinstance(values, dict):
            raise ValueError(f"holds {type(values).__name__}, not names and values")
    except Exception as error:  # each of the three parsers raises its own
        raise TrainingError(
            f"--config_path={config_path}: {error.__cause__ or error}; accepted is a YAML, JSON or TOML file of settings "
            "under LeRobot's names"
        ) from error
    # LeRobot writes presets that follow from the policy, and its upload flag, into the file of every run.
    values.pop("optimizer", None)
    values.pop("scheduler", None)
    if isinstance(values.get("policy"), dict):
        values["policy"].pop("push_to_hub", None)
    return _ours(values)


def _ours(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values without LeRobot's own. TrainingError for one that asks for something missing here."""
    kept = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in (*SETTINGS, "resume", "policy.path", "policy.type") or (name, value) == ("peft", None):
            kept[key] = value
        elif name in GROUPS and not isinstance(value, dict):
            example = f"such as {name}: {{{GROUPS[name]}}}"
            raise TrainingError(f"{name} is {shown(value)}: {name} must hold names and values, {example}")
        elif name in GROUPS:
            kept[key] = _ours(value, f"{name}.")
        elif isinstance(value, dict) and value:
            _ours(value, f"{name}.")
        elif not (rule := nearest(name, LEROBOTS)):
            near = get_close_matches(name, SETTINGS, 1)
            raise TrainingError(f"no setting --{name}" + (f"; did you mean --{near[0]}?" if near else ""))
        elif (accepts := LEROBOTS[rule][0]) is not None and value not in accepts:
            words = f"must be {' or '.join(map(shown, accepts))}; {LEROBOTS[rule][1]}"
            raise TrainingError(f"--{name}={shown(value)}: {words}")
    return kept


def _check_device(name: Any) -> None:
    """TrainingError for a device that is not here. A checkpoint's device would be replaced; one named by a flag is not."""
    try:
        if isinstance(name, str) and not device_is_available(name):
            raise ValueError(f"torch has none here; leave it out for the best there is, {best_device()}")
    except ValueError as error:
        raise TrainingError(f"--policy.device={name}: {error}") from error


def _checkpoint(asked: dict[str, Any], config_path: str | None) -> Path:
    """The checkpoint to resume from."""
    if config_path:
        path = Path(config_path)
        checkpoint = (path.parent if path.suffix == ".json" else path).parent
        if not (checkpoint / STATE).is_dir():
            raise TrainingError(
                f"--config_path={config_path} lies in no checkpoint; give .../STEP/pretrained_model/train_config.json"
            )
        return checkpoint
    if "output_dir" not in asked:
        raise TrainingError("--resume=true needs --output_dir, or the --config_path of a checkpoint")
    folder = Path(str(asked["output_dir"]))
    try:
        found = Checkpoints(folder).last()
    except (OSError, ValueError) as error:  # of a name that the system does not take
        raise TrainingError(f"--output_dir={folder} cannot be read ({error})") from error
    if found is None:
        another = " and give another --output_dir" if folder.exists() else ""
        raise TrainingError(
            f"--output_dir={folder} holds no whole checkpoint; to begin, leave out --resume{another}"
        )
    return found
