"""Everything a training run is told, under LeRobot's names, and the two files a checkpoint keeps of it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..smolvla import SmolVLAConfig
from ..smolvla.configuration_smolvla import check_kinds
from .errors import TrainingError

CHOICES = {
    "implementation": ("ours", "lerobot"),
    "dtype": ("auto", "fp32", "bf16"),
    "fast": ("auto", "on", "off"),
    "dataset.video_backend": (None, "torchcodec", "pyav", "video_reader"),
}
MANY = 2**31 - 1
# Least and most of a setting. The most is what the machine can count, start or hold at all: a typing error that passes
# would fill its memory, and the machine with it, before anyone could say what was wrong. AdamW divides by eps alone where a
# gradient is 0, so it must be a number above 0 in fp32 too.
LIMITS: dict[str, tuple[float, float]] = {
    "seed": (0, 2**32 - 1), "batch_size": (1, 2**20), "gradient_accumulation_steps": (1, 2**20), "steps": (1, MANY),
    "num_workers": (0, 1024), "image_cache": (0, 2**50), "log_freq": (-MANY, MANY), "save_freq": (-MANY, MANY),
    "eval_steps": (-MANY, MANY), "max_eval_samples": (-MANY, MANY), "tolerance_s": (0, math.inf),
    "policy.chunk_size": (1, 10_000), "policy.empty_cameras": (0, 100), "policy.prefix_length": (-MANY, 2**16),
    "policy.tokenizer_max_length": (1, 2**16), "policy.optimizer_eps": (1e-37, math.inf),
    "policy.optimizer_weight_decay": (0, math.inf), "policy.scheduler_warmup_steps": (0, MANY),
    "policy.scheduler_decay_steps": (1, MANY), "policy.scheduler_decay_lr": (0, math.inf),
}  # fmt: skip
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "Path": "a path", "None": "null",
    "list[int]": "a list of whole numbers such as [0, 1]", "list[str]": "a list of texts such as [a, b]",
    "tuple[int, int]": "two whole numbers such as [512, 512]", "tuple[float, float]": "two numbers such as [0.9, 0.95]",
    "dict[str, str]": "a mapping such as {a: b}",
    "dict[str, PolicyFeature]": "features such as {action: {type: ACTION, shape: [6]}}",
    "dict[str, NormalizationMode]": "modes by feature type such as {STATE: MEAN_STD, ACTION: IDENTITY}",
    "RTCConfig": "settings such as {enabled: true, execution_horizon: 10}",
    "RTCAttentionSchedule": "ZEROS, ONES, LINEAR or EXP",
}  # fmt: skip
"""What a field's type accepts."""
# What may differ when a run goes on: how far it is trained, what is written and read where, and how steps are computed. Of
# these only the last ("fast", "image_cache", "policy.device") moves the weights that come out, by the order of sums and, on
# another device, by other noise.
FREE_ON_RESUME = frozenset(
    (
        "steps",
        "output_dir",
        "num_workers",
        "log_freq",
        "save_freq",
        "save_checkpoint",
        "eval_steps",
        "max_eval_samples",
        "fast",
        "image_cache",
        "dataset.root",
        "dataset.video_backend",
        "policy.device",
    )
)


@dataclass
class DatasetSettings:
    """Which frames are learned from.

    repo_id, root, revision  a LeRobotDataset: Hub id, local folder of it (None: LeRobot's own places), branch or tag
    episodes                 indices to use; None: all         eval_split  share of episodes of each task held out, the last
    use_imagenet_stats       cameras normalised (if they are) by ImageNet's mean and std
    video_backend            "torchcodec" or "pyav"; None: LeRobot's choice
    """

    repo_id: str = ""
    root: str | None = None
    revision: str | None = None
    episodes: list[int] | None = None
    eval_split: float = 0.0
    use_imagenet_stats: bool = True
    video_backend: str | None = None


@dataclass
class TrainSettings:
    """A run. Names and defaults are LeRobot's where LeRobot has the setting.

    policy                       every knob of SmolVLA, optimizer and schedule among them
    policy_path                  checkpoint to start from: folder or Hub id; None: fresh weights
    implementation               "ours" or "lerobot": whose ``SmolVLAPolicy`` is trained; the files are the same
    fast                         "auto": patched for training where ``patch`` can, and AdamW fused; "on": or an error; "off":
                                 plain
    image_cache                  bytes for tokens of frozen image frames, so that a frame of an earlier epoch is not encoded
                                 anew (``patch(image_cache=)``); 0: none
    dtype                        "bf16": matrix products under autocast; "auto": bf16 if ``policy.use_amp``, else fp32
    seed                         of weights, data order and noise; None: weights and noise from the process's random state
                                 as it is, data in the order of seed 0, as in LeRobot
    batch_size                   samples a forward pass; an optimizer step has ``gradient_accumulation_steps`` times as many
    steps                        optimizer steps in all, those before a resume included
    num_workers                  processes that read data
    log_freq, save_freq          steps between lines of the log, between checkpoints (0: only the last)
    eval_steps, max_eval_samples steps between losses on held-out episodes (0: never); frames of them used (0: all)
    tolerance_s                  by how much timestamps may be off       rename_map  dataset's observation -> policy's
    """

    dataset: DatasetSettings
    policy: SmolVLAConfig
    output_dir: Path
    policy_path: str | None = None
    implementation: str = "ours"
    fast: str = "auto"
    image_cache: int = 0
    dtype: str = "auto"
    seed: int | None = 1000
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    steps: int = 100_000
    num_workers: int = 4
    log_freq: int = 200
    save_freq: int = 20_000
    save_checkpoint: bool = True
    eval_steps: int = 0
    max_eval_samples: int = 0
    tolerance_s: float = 1e-4
    rename_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output_dir = Path(self.output_dir)
        self.fast = {"True": "on", "False": "off"}.get(self.fast, self.fast)  # as YAML reads these words
        # LeRobot's default is 10, which draccus reads from a file as 10.0: a run that went on would write another file.
        self.policy.optimizer_grad_clip_norm = float(self.policy.optimizer_grad_clip_norm)
        for part, prefix in ((self, ""), (self.dataset, "dataset.")):
            try:
                check_kinds(part)
            except ValueError as error:
                raise TrainingError(f"--{prefix}{error}") from error
        for name in ("log_freq", "save_freq", "eval_steps", "max_eval_samples"):
            setattr(self, name, max(0, getattr(self, name)))  # below 0 is 0, as in LeRobot
        for name, accepted in CHOICES.items():
            if (value := self._value(name)) not in accepted:
                words = ", ".join(map(shown, accepted))
                raise TrainingError(f"--{name}={shown(value)}: accepted are {words}")
        for name, (least, most) in LIMITS.items():
            if (value := self._value(name)) is not None and not least <= value <= most:
                raise TrainingError(
                    f"--{name}={value}: must be at least {least}"
                    + (f" and at most {most}" if most < math.inf else "")
                )
        if self.image_cache and self.fast == "off":
            raise TrainingError("--image_cache needs the fast path: leave out --fast=off, or --image_cache")
        if self.policy.use_peft:
            raise TrainingError(
                "--policy.use_peft=true: this trains the policy's own weights and adds no adapter; train adapters with "
                "lerobot-train and its --peft flags, or in a loop of your own around peft.get_peft_model, where "
                "smolvla_fast.patch(policy, training=True) keeps the fast path"
            )
        if self.policy.optimizer_lr <= 0:
            raise TrainingError(f"--policy.optimizer_lr={self.policy.optimizer_lr}: must be above 0")
        if not all(0 <= beta < 1 for beta in self.policy.optimizer_betas):
            raise TrainingError(
                f"--policy.optimizer_betas={list(self.policy.optimizer_betas)}: each must be at least 0 and below 1"
            )
        self._check_dataset()
        if self.rename_map and not self.policy_path:
            raise TrainingError(
                "--rename_map needs --policy.path: a fresh policy takes the dataset's names, so there is nothing to rename"
            )

    def _check_dataset(self) -> None:
        episodes, split = self.dataset.episodes, self.dataset.eval_split
        if not self.dataset.repo_id:
            raise TrainingError(
                "no dataset: give --dataset.repo_id (a Hub id such as lerobot/svla_so101_pickplace), and --dataset.root "
                "for a local folder"
            )
        if episodes is not None and (not episodes or min(episodes) < 0 or len({*episodes}) < len(episodes)):
            raise TrainingError(
                f"--dataset.episodes={episodes}: must name at least one episode, each once and by a number of at least 0; "
                "null takes all"
            )
        if not 0 <= split < 1:
            raise TrainingError(f"--dataset.eval_split={split}: must be a share, at least 0 and below 1")
        if self.eval_steps and not split:
            raise TrainingError(
                f"--eval_steps={self.eval_steps} needs held-out episodes: give --dataset.eval_split, for instance 0.1"
            )

    def _value(self, name: str) -> Any:
        group, _, key = name.rpartition(".")
        return getattr(getattr(self, group) if group else self, key)

    @property
    def bf16(self) -> bool:
        return self.dtype == "bf16" or (self.dtype == "auto" and self.policy.use_amp)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: what ``run.json`` of a checkpoint holds."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        values |= {"dataset": dataclasses.asdict(self.dataset), "policy": self.policy.to_dict()}
        return {**values, "output_dir": str(self.output_dir)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSettings:
        """Inverse of ``to_dict``, by draccus, which reads LeRobot's flags and files. TrainingError names the setting that
        cannot be: values of another version, of another type, or a policy of another kind."""
        try:
            import draccus
        except ImportError as error:
            raise TrainingError(f'{error}; run `pip install "smolvla_fast[train]"`') from error
        policy = dict(values["policy"])
        if (kind := policy.pop("type", "smolvla")) != "smolvla":
            raise TrainingError(f"--policy.type={kind}: this command trains smolvla only; use lerobot-train")
        try:
            return draccus.decode(cls, {**values, "policy": policy})
        except draccus.utils.ParsingError as error:
            raise TrainingError(_refusal(error, values)) from error

    def to_lerobot(self) -> dict[str, Any]:
        """``train_config.json``, from which ``lerobot-train --config_path=... --resume=true`` goes on.

        A step of LeRobot's has one forward pass, so its batch is all our samples of a step.
        """
        optimizer, scheduler = self.policy.get_optimizer_preset(), self.policy.get_scheduler_preset()
        same = ("seed", "num_workers", "steps", "log_freq", "save_freq", "save_checkpoint", "eval_steps")
        return {
            **{
                name: getattr(self, name) for name in (*same, "max_eval_samples", "tolerance_s", "rename_map")
            },
            "dataset": {k: v for k, v in dataclasses.asdict(self.dataset).items() if v is not None},
            "policy": self.policy.to_dict(),
            "output_dir": str(self.output_dir),
            "job_name": "smolvla",
            "batch_size": self.batch_size * self.gradient_accumulation_steps,
            "use_policy_training_preset": True,
            "optimizer": {"type": "adamw", **dataclasses.asdict(optimizer)},
            "scheduler": {"type": "cosine_decay_with_warmup", **dataclasses.asdict(scheduler)},
        }


def flags(kind: type = TrainSettings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every setting under the name of its flag, as LeRobot has it: ``{"policy.rtc_config.enabled": field, ...}``."""
    found = {}
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        found[prefix + entry.name] = entry
        for part in (hints[entry.name], *typing.get_args(hints[entry.name])):
            if dataclasses.is_dataclass(part):
                found.update(flags(typing.cast(type, part), f"{prefix}{entry.name}."))
    return found


def accepted(entry: dataclasses.Field) -> str:
    """What a field accepts, in words."""
    return " or ".join(WORDS.get(part, part) for part in str(entry.type).split(" | "))


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _refusal(error: Exception, values: dict[str, Any]) -> str:
    """What draccus or a class's own check says, with the flag, its value and what is accepted."""
    path = [str(part) for part in getattr(error, "key_path", ())]
    cause: BaseException = error
    while cause.__cause__ is not None:
        if "instantiate" in str(cause):  # a class's own check says what was wrong
            path = []
        cause = cause.__cause__
        deeper = [str(part) for part in getattr(cause, "key_path", ())]
        path = deeper if deeper[: len(path)] == path else path
    known, value = flags(), values
    while path and ".".join(path) not in known:
        path.pop()
    name = ".".join(path)
    if name in ("", "dataset", "policy"):
        # They name fields of the policy; here each is a flag.
        names = "|".join(entry.name for entry in dataclasses.fields(SmolVLAConfig))
        return re.sub(rf"\b({names})\b", r"--policy.\1", str(cause))
    for part in path:
        value = value[part]
    return f"--{name}={shown(value)}: accepted is {accepted(known[name])}"


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """``{"dataset": {"root": ...}}`` as ``{"dataset.root": ...}``, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("dataset", "policy"):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat


def go_on(
    saved: dict[str, Any], before: dict[str, Any], asked: dict[str, Any], checkpoint: Path
) -> TrainSettings:
    """The settings of a run that goes on: the checkpoint's, with what is asked for anew where that is free.

    saved, before, asked  ``to_dict`` of the checkpoint's settings and of those the run was begun with, which has empty what
                          was taken from the dataset, and nested values that were asked for now
    raises                TrainingError naming every setting that is neither free nor one of the two
    """
    from mergedeep import merge

    wished, refused = merge({}, saved, asked), None
    try:
        wished = TrainSettings.from_dict(wished).to_dict()
    except TrainingError as error:  # raised below, unless it is of what may not change in the first place
        refused = error
    now, was, first = flatten(wished), flatten(saved), flatten(before)
    changed = [name for name, value in now.items() if value != was.get(name)]
    other = [
        f"{name} ({was.get(name)!r} in the checkpoint, {now[name]!r} asked for)"
        for name in changed
        if name not in FREE_ON_RESUME and now[name] != first.get(name)
    ]
    if other:
        raise TrainingError(
            f"cannot resume {checkpoint} with another configuration: {'; '.join(other)}. Leave these flags out to go on as "
            f"it was (free are {', '.join(sorted(FREE_ON_RESUME))}), or start a new run from its weights with "
            f"--policy.path={checkpoint / 'pretrained_model'} and a new --output_dir"
        )
    if refused is not None:
        raise refused
    kept = merge({}, saved)
    for name in set(changed) & FREE_ON_RESUME:
        group, _, key = name.rpartition(".")
        (kept[group] if group else kept)[key] = now[name]
    return TrainSettings.from_dict(kept)
