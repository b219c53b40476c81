"""Recorded observations for `verify` and `demo`: of a LeRobotDataset or a folder, through the policy's own processors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..measure.console import CommandError
from ..smolvla import SmolVLAConfig, make_pre_post_processors
from ..smolvla.features import ACTION, OBS_PREFIX, OBS_STATE
from ..smolvla.hub import is_absent
from ..smolvla.processor_smolvla import PREPROCESSOR_NAME
from . import subject
from .recording_files import Frame, Recorded, names_of, open_dataset, open_folder

OWN_UNITS = "dataset units"
UNITS = {
    "deg": "degrees", "degree": "degrees", "degrees": "degrees", "rad": "radians", "radian": "radians",
    "radians": "radians", "mm": "mm", "cm": "cm", "percent": "%", "pct": "%", "%": "%",
}  # fmt: skip
"""What the name of a joint may say of its unit. ``.pos`` says nothing: degrees on one robot, a range of 200 on another."""


class Joint(NamedTuple):
    name: str
    unit: str


@dataclass
class Recording:
    """Recorded observations with the processors of the policy they are for."""

    recorded: Recorded
    joints: list[Joint]
    notes: list[str]
    preprocess: Any
    postprocess: Any

    def __post_init__(self) -> None:
        self.source, self.fps, self.draw = self.recorded.source, self.recorded.fps, self.recorded.draw

    def batch(self, frame: Frame) -> dict[str, Any]:
        """As ``predict_action_chunk`` takes it. CommandError for a frame that cannot be read or processed."""
        observation = self.recorded.read(frame.key)
        try:
            with torch.no_grad():
                return self.preprocess(observation)
        except Exception as error:  # of the processors, LeRobot's or ours
            shapes = {k: list(v.shape) for k, v in observation.items() if isinstance(v, Tensor)}
            raise CommandError(
                f"frame {frame.number} of episode {frame.episode} in {self.source} does not go through the policy's "
                f"preprocessor ({type(error).__name__}: {error}); the frame has {shapes}"
            ) from error

    def actions(self, policy: Any, chunk: Tensor) -> np.ndarray:
        """A chunk of the model's, [1, S, A] -> [S, joints], fp32 in the robot's units: what is sent to the robot."""
        found = chunk[..., : len(self.joints)]
        if policy.config.adapt_to_pi_aloha:
            found = policy._pi_aloha_encode_actions(found)
        return self.postprocess(found[0]).float().cpu().numpy()


@dataclass
class Drawn:
    """Frames made by code, each an episode of its own, and actions in the model's normalised units."""

    policy: Any
    args: argparse.Namespace
    source, fps, notes = "frames drawn by code", None, ()

    @property
    def joints(self) -> list[Joint]:
        count = self.policy.config.action_feature.shape[0]
        return [Joint(f"action[{index}]", "normalised units") for index in range(count)]

    def draw(self, count: int, seed: int) -> list[Frame]:
        return [Frame(str(index), 0, seed + index) for index in range(count)]

    def batch(self, frame: Frame) -> dict[str, Any]:
        return subject.make_observation(self.policy, self.args, frame.key)[0]

    def actions(self, policy: Any, chunk: Tensor) -> np.ndarray:
        return chunk[0, :, : len(self.joints)].float().cpu().numpy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recorded observations", "without them, frames are drawn by code")
    group.add_argument("--dataset.repo_id", dest="repo_id", metavar="ID", help="a LeRobotDataset v3.0")
    group.add_argument("--dataset.root", dest="root", metavar="FOLDER", help="its folder, which holds meta/")
    group.add_argument("--dataset.revision", dest="revision", metavar="NAME", help="of a dataset on the Hub")
    group.add_argument(
        "--dataset.episodes",
        dest="episodes",
        type=episodes,
        metavar="LIST",
        help="such as 0,3,7 (default: all)",
    )
    group.add_argument("--dataset.video_backend", dest="video_backend", choices=("pyav", "torchcodec"))
    group.add_argument(
        "--tolerance_s", type=float, default=1e-4, help="of a video frame's time (default: 1e-4)"
    )
    group.add_argument(
        "--observations", metavar="FOLDER", help="saved observations, .npz or .pt, a subfolder an episode"
    )


def episodes(text: str) -> list[int]:
    parts = [part.strip() for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of episodes; accepted is one such as 0,3,7")
    return sorted({int(part) for part in parts})


def open_recording(args: argparse.Namespace, device: torch.device) -> Recording | None:
    """What the arguments name, checked against the policy's configuration before its weights are read; None where they
    name nothing. CommandError for what does not fit or cannot be read."""
    named = [option for option, value in (
        ("--dataset.repo_id", args.repo_id), ("--dataset.root", args.root), ("--observations", args.observations),
    ) if value is not None]  # fmt: skip
    if not named:
        if args.episodes is not None or args.revision is not None:
            raise CommandError(
                "--dataset.episodes and --dataset.revision need --dataset.repo_id or --dataset.root"
            )
        return None
    if args.policy_path is None:
        raise CommandError(f"{named[0]} needs the policy that the recording is for; give --policy.path")
    if args.observations is not None and len(named) > 1:
        raise CommandError(f"--observations and {named[0]} name two recordings; give one")
    if args.cameras is not None:
        raise CommandError("--cameras is for drawn frames; a recording has the cameras that it has")
    config = read_config(args.policy_path, device)
    fault = subject.unnormalized(args.policy_path, config)
    if fault:
        raise CommandError(fault)
    preprocess, postprocess = processors(args.policy_path, config)
    recorded = open_dataset(args) if args.observations is None else open_folder(args)
    renames: dict[str, str] = {}
    for step in preprocess.steps:
        renames |= getattr(step, "rename_map", {})
    notes = check_fit(recorded, config, renames)
    joints = joints_of(recorded.features.get(ACTION), config)
    return Recording(recorded, joints, notes, preprocess, postprocess)


def read_config(path: str, device: torch.device) -> SmolVLAConfig:
    folder = Path(path).expanduser()
    try:
        config = SmolVLAConfig.from_pretrained(str(folder) if folder.is_dir() else path)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(f"--policy.path {path}: cannot load it ({error})") from error
    config.device = str(device)
    return config


def processors(path: str, config: SmolVLAConfig) -> tuple[Any, Any]:
    """The checkpoint's own: read by LeRobot where its class is used, for it may have steps of somebody else's."""
    folder = Path(path).expanduser()
    source = str(folder) if folder.is_dir() else path
    try:
        if subject.why_not_lerobots() or is_absent(source, f"{PREPROCESSOR_NAME}.json"):
            return make_pre_post_processors(config, source)
        from lerobot.policies.factory import make_pre_post_processors as lerobots

        before = {"device_processor": {"device": config.device}}
        return lerobots(config, pretrained_path=source, preprocessor_overrides=before)
    except Exception as error:  # of files, the tokenizer, and steps that anybody may have registered
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CommandError(
            f"--policy.path {path}: cannot read its processors ({reason}); copy or download the checkpoint again"
        ) from error


def check_fit(recorded: Recorded, config: SmolVLAConfig, renames: Mapping[str, str]) -> list[str]:
    """CommandError unless the recording has what the policy computes from, in its sizes and under its names.

    renames  of the policy's preprocessor: name in the recording -> name in the policy
    returns  what it lacks and stock does without
    """
    where = f"{recorded.option} does not fit the policy"
    found = {renames.get(name, name): feature for name, feature in recorded.features.items()}
    inputs, outputs = config.input_features or {}, config.output_features or {}
    cameras = [key for key in config.image_features if "empty_camera" not in key]
    own = [name for name in found if name.startswith(OBS_PREFIX) and is_camera(found[name])]
    missing = [key for key in cameras if key not in found]
    if len(missing) == len(cameras) or (
        missing and set(own) - set(cameras) and len(missing) > config.empty_cameras
    ):
        raise CommandError(
            f"{where}: it lacks the cameras {missing}; it has {own or 'none'}, the policy computes from {cameras}. Give the "
            "recording that the policy was trained on, or one of the same robot"
        )
    for key, feature in ((OBS_STATE, inputs.get(OBS_STATE)), (ACTION, outputs.get(ACTION))):
        if key == ACTION and key not in found:
            continue  # observations alone are enough; its joints then have no names
        if key not in found:
            raise CommandError(
                f"{where}: it has no {key!r}, from which the policy computes; it has "
                f"{sorted(name for name in found if name.startswith(OBS_PREFIX))}"
            )
        shape, wanted = list(found[key]["shape"]), list(feature.shape) if feature else []
        if shape != wanted:
            names = names_of(found[key])
            raise CommandError(
                f"{where}: {key!r} has the shape {shape} there{f' ({names})' if names else ''} and {wanted} in the policy's "
                "config.json. Give a recording of the robot that the policy was trained for"
            )
    return (
        [f"{recorded.source} lacks the cameras {missing}; stock and every tier computed without them"]
        if missing
        else []
    )


def is_camera(feature: Mapping[str, Any]) -> bool:
    return feature.get("dtype") in ("image", "video")


def joints_of(feature: Mapping[str, Any] | None, config: SmolVLAConfig) -> list[Joint]:
    """Names and units of the actions' values; the units are what info.json or a name says, or OWN_UNITS."""
    count = (config.output_features or {})[ACTION].shape[0]
    names = names_of(feature)
    if len(names) != count:
        names = [f"action[{index}]" for index in range(count)]
    said = (feature or {}).get("units") or (feature or {}).get("unit")
    units = [said] * count if isinstance(said, str) else said if isinstance(said, list) else []
    if len(units) != count:
        units = [unit_of(name) for name in names]
    return [Joint(name, str(unit)) for name, unit in zip(names, units, strict=True)]


def unit_of(name: str) -> str:
    last = [part for part in re.split(r"[\s._/\[\]()-]+", name.lower()) if part][-1:]
    return next((UNITS[part] for part in last if part in UNITS), OWN_UNITS)
