"""Recorded observations for `verify` and `demo`: of a LeRobotDataset or a folder, through the policy's own processors."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..measure.console import CommandError, counted
from ..smolvla import SmolVLAConfig, aloha, make_pre_post_processors
from ..smolvla.features import ACTION, OBS_PREFIX, OBS_STATE
from ..smolvla.hub import is_absent
from ..smolvla.processor_smolvla import PREPROCESSOR_NAME
from . import checkpoint, subject
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
    """Drawn frames of a recording, with the processors of the policy they are for.

    fit      features, and what to call their owner -> the cameras that it lacks; CommandError where stock cannot do without
    lacking  frames that were read, by the cameras that each lacks
    """

    recorded: Recorded
    frames: list[Frame]
    joints: list[Joint]
    preprocess: Any
    postprocess: Any
    fit: Callable[[Mapping[str, Any], str], list[str]]
    lacking: dict[str, list[Frame]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source, self.fps = self.recorded.source, self.recorded.fps
        self.read = self.recorded.open(self.frames)

    @property
    def notes(self) -> list[str]:
        return [
            f"{counted(len(frames), 'frame')} without the cameras {cameras}, the first {_place(frames[0])}; stock and every "
            "tier computed without them"
            for cameras, frames in self.lacking.items()
        ]

    def observation(self, frame: Frame) -> tuple[dict[str, Any], list[str]]:
        """The frame as it was recorded, and the cameras that it lacks. CommandError where it cannot be used."""
        observation = self.read(frame)
        if has_observations(self.recorded.features):  # a dataset's frames are all alike
            return observation, self.fit(self.recorded.features, self.recorded.option)
        shapes = {name: list(value.shape) for name, value in observation.items() if isinstance(value, Tensor)}
        features = {
            name: {"shape": shape, "dtype": "image" if len(shape) == 3 else "float32"}
            for name, shape in shapes.items()
        }
        return observation, self.fit(features, str(frame.path))

    def batch(self, frame: Frame) -> dict[str, Any]:
        """As ``predict_action_chunk`` takes it. CommandError for a frame that cannot be read or processed."""
        observation, cameras = self.observation(frame)
        try:
            with torch.no_grad():
                batch = self.preprocess(observation)
        except Exception as error:  # of the processors, LeRobot's or ours
            shapes = {k: list(v.shape) for k, v in observation.items() if isinstance(v, Tensor)}
            raise CommandError(
                f"{_place(frame)} in {self.source} does not go through the policy's preprocessor "
                f"({type(error).__name__}: {error}); the frame has {shapes}"
            ) from error
        if cameras:
            self.lacking.setdefault(str(cameras), []).append(frame)
        return batch

    def actions(self, policy: Any, chunk: Tensor) -> np.ndarray:
        """A chunk of the model's, [1, S, A] -> [S, joints], fp32 in the robot's units: what is sent to the robot."""
        found = chunk[..., : len(self.joints)]
        if policy.config.adapt_to_pi_aloha:
            found = aloha.encode_actions(found)  # LeRobot's own writes into the chunk, which is judged again
        return self.postprocess(found[0]).float().cpu().numpy()


@dataclass
class Drawn:
    """Frames made by code, each an episode of its own, and actions in the model's normalised units."""

    policy: Any
    args: argparse.Namespace
    count: int
    source, fps, notes = "frames drawn by code", None, ()

    @property
    def joints(self) -> list[Joint]:
        count = self.policy.config.action_feature.shape[0]
        return [Joint(f"action[{index}]", "normalised units") for index in range(count)]

    @property
    def frames(self) -> list[Frame]:
        return [Frame(str(index), 0) for index in range(self.args.frames or self.count)]

    def batch(self, frame: Frame) -> dict[str, Any]:
        return subject.make_observation(self.policy, self.args, self.args.seed + int(frame.episode))[0]

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


def units(text: str) -> dict[str, str]:
    """``degrees`` -> {"": "degrees"}; ``a.pos=degrees,b.pos=%`` -> by joint."""
    pairs = [part.rpartition("=") for part in text.split(",")]
    named = {joint.strip(): unit.strip() for joint, _, unit in pairs}
    if not all(named.values()) or len(named) < len(pairs) or ("" in named and len(pairs) > 1):
        raise argparse.ArgumentTypeError(
            f"{text!r} names no units; accepted is one for all joints, such as degrees, or "
            "shoulder_pan.pos=degrees,gripper.pos=%"
        )
    return named


def open_recording(args: argparse.Namespace, device: torch.device, count: int) -> Recording | None:
    """``count`` frames of what the arguments name, checked against the policy's configuration before its weights are read.

    None where they name nothing. CommandError for what does not fit or cannot be read: a dataset that does not fit before
    its data is fetched, a folder of which no frame does.
    """
    named = [option for option, value in (
        ("--dataset.repo_id", args.repo_id), ("--dataset.root", args.root), ("--observations", args.observations),
    ) if value is not None]  # fmt: skip
    of_dataset = [
        f"--dataset.{name}"
        for name in ("episodes", "revision", "video_backend", "units")
        if vars(args).get(name) is not None
    ]
    if of_dataset and not named:
        raise CommandError(f"{' and '.join(of_dataset)} need --dataset.repo_id or --dataset.root")
    if not named:
        return None
    if args.policy_path is None:
        raise CommandError(f"{named[0]} needs the policy that the recording is for; give --policy.path")
    if args.observations is not None and len(named) > 1:
        raise CommandError(f"--observations and {named[0]} name two recordings; give one")
    if args.observations is not None and of_dataset:
        raise CommandError(
            f"{' and '.join(of_dataset)} say nothing of --observations; give a folder with fewer subfolders for fewer "
            "episodes, and names and units in its info.json"
        )
    if args.cameras is not None:
        raise CommandError("--cameras is for drawn frames; a recording has the cameras that it has")
    config = read_config(args.policy_path, device)
    fault = checkpoint.unnormalized(args.policy_path, config)
    if fault:
        raise CommandError(fault)
    preprocess, postprocess = processors(args.policy_path, config)
    recorded = open_dataset(args) if args.observations is None else open_folder(args)
    renames: dict[str, str] = {}
    for step in preprocess.steps:
        renames |= getattr(step, "rename_map", {})

    def fit(features: Mapping[str, Any], owner: str) -> list[str]:
        return check_fit(features, config, renames, owner)

    if has_observations(recorded.features):
        fit(recorded.features, recorded.option)
    check_action(recorded.features.get(ACTION), config, recorded.option)
    joints = joints_of(recorded.features.get(ACTION), config, recorded.option, vars(args).get("units"))
    recording = Recording(recorded, recorded.draw(count, args.seed), joints, preprocess, postprocess, fit)
    first: CommandError | None = None
    for frame in recording.frames:
        try:
            recording.observation(frame)
            return recording
        except CommandError as reason:
            first = first or reason
    raise CommandError(
        f"{recorded.option}: none of {counted(len(recording.frames), 'frame')} can be used; {first}"
    )


def read_config(path: str, device: torch.device) -> SmolVLAConfig:
    try:
        config = SmolVLAConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise CommandError(f"--policy.path {path}: cannot load it ({error})") from error
    config.device = str(device)
    return config


def processors(path: str, config: SmolVLAConfig) -> tuple[Any, Any]:
    """The checkpoint's own: read by LeRobot where its class is used, for it may have steps of somebody else's."""
    try:
        if subject.why_not_lerobots() or is_absent(path, f"{PREPROCESSOR_NAME}.json"):
            return make_pre_post_processors(config, path)
        from lerobot.policies.factory import make_pre_post_processors as lerobots

        before = {"device_processor": {"device": config.device}}
        return lerobots(config, pretrained_path=path, preprocessor_overrides=before)
    except Exception as error:  # of files, the tokenizer, and steps that anybody may have registered
        reason = " ".join(str(error).split()) or type(error).__name__
        way = checkpoint.no_backbone(path) or "copy or download the checkpoint again"
        raise CommandError(f"--policy.path {path}: cannot read its processors ({reason}); {way}") from error


def check_fit(
    features: Mapping[str, Any], config: SmolVLAConfig, renames: Mapping[str, str], owner: str
) -> list[str]:
    """CommandError unless there is what the policy computes from, in its sizes and under its names.

    features  of a dataset or of one observation      owner  what to call it in messages
    renames   of the policy's preprocessor: name in the recording -> name in the policy
    returns   the cameras that are not there and that stock does without
    """
    where = f"{owner} does not fit the policy"
    found = {renames.get(name, name): feature for name, feature in features.items()}
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
    if OBS_STATE not in found:
        raise CommandError(
            f"{where}: it has no {OBS_STATE!r}, from which the policy computes; it has "
            f"{sorted(name for name in found if name.startswith(OBS_PREFIX))}"
        )
    check_shape(OBS_STATE, found[OBS_STATE], (config.input_features or {})[OBS_STATE].shape, where)
    return missing


def check_action(feature: Mapping[str, Any] | None, config: SmolVLAConfig, option: str) -> None:
    """CommandError for actions of another size than the policy's. Observations alone, without them, are enough."""
    names = names_of(feature)
    if feature and ("shape" in feature or names):
        sized = {"shape": [len(names)], **feature}
        check_shape(
            ACTION, sized, (config.output_features or {})[ACTION].shape, f"{option} does not fit the policy"
        )


def check_shape(key: str, feature: Mapping[str, Any], wanted: Sequence[int], where: str) -> None:
    shape, names = feature.get("shape"), names_of(feature)
    if not isinstance(shape, (list, tuple)) or list(shape) != list(wanted):
        said = f"{list(shape) if isinstance(shape, tuple) else shape} there{f' ({names})' if names else ''}"
        raise CommandError(
            f"{where}: {key!r} has the shape {said} and {list(wanted)} in the policy's config.json. Give a "
            "recording of the robot that the policy was trained for"
        )


def has_observations(features: Mapping[str, Any]) -> bool:
    return any(name.startswith(OBS_PREFIX) for name in features)


def is_camera(feature: Mapping[str, Any]) -> bool:
    return feature.get("dtype") in ("image", "video")


def joints_of(
    feature: Mapping[str, Any] | None, config: SmolVLAConfig, option: str, given: Mapping[str, str] | None
) -> list[Joint]:
    """Names and units of the actions' values. Units are what ``given``, info.json or a name says, or OWN_UNITS.

    given   of --dataset.units      raises  CommandError for units that do not fit the joints
    """
    count = (config.output_features or {})[ACTION].shape[0]
    names = names_of(feature)
    if len(names) != count:
        names = [f"action[{index}]" for index in range(count)]
    said = (feature or {}).get("units") or (feature or {}).get("unit") or [unit_of(name) for name in names]
    said = [said] * count if isinstance(said, str) else said
    if not isinstance(said, list) or len(said) != count:
        raise CommandError(
            f"{option}: info.json has the units {said} for {count} actions; accepted is one for each"
        )
    given = given or {}
    unknown = sorted(set(given) - {"", *names})
    if unknown:
        raise CommandError(
            f"--dataset.units names {unknown}, which the recording does not have; it has {names}"
        )
    return [
        Joint(name, given.get(name, given.get("", str(unit)))) for name, unit in zip(names, said, strict=True)
    ]


def _place(frame: Frame) -> str:
    return f"frame {frame.number} of episode {frame.episode}"


def unit_of(name: str) -> str:
    last = [part for part in re.split(r"[\s._/\[\]()-]+", name.lower()) if part][-1:]
    return next((UNITS[part] for part in last if part in UNITS), OWN_UNITS)
