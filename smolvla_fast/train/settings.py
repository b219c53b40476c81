"""The settings of a training run, under LeRobot's names, and the two files of them that a checkpoint keeps."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import os
import re
import typing
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..smolvla import SmolVLAConfig
from ..smolvla.configuration_smolvla import check_kinds
from .errors import TrainingError

CHOICES = {
    "implementation": ("ours", "lerobot"), "dtype": ("auto", "fp32", "bf16"), "fast": ("auto", "on", "off"),
    "dataset.video_backend": ("torchcodec", "pyav", "video_reader"),
}  # fmt: skip
TRACKERS = {"wandb", "trackio", "tensorboard"}
Rule = tuple[Callable[[Any], bool], str]
"""Whether a value is accepted, and which ones are: "must be ..."."""


def _within(least: float, most: float = math.inf) -> Rule:
    words = f"at least {least}" + (f" and at most {most}" if most < math.inf else "")
    return lambda value: least <= value <= most, words


MANY = 2**31 - 1
# The upper bounds catch typing errors that would fill the machine's memory before anything failed. AdamW divides by eps
# alone where a gradient is 0, so eps must be above 0 in fp32 too.
RULES: dict[str, Rule] = {
    "seed": _within(0, 2**32 - 1), "batch_size": _within(1, 2**20), "gradient_accumulation_steps": _within(1, 2**20),
    "steps": _within(1, MANY), "num_workers": _within(0, 1024), "image_cache": _within(0, 2**50),
    "tolerance_s": _within(0),
    "dataset.episodes": (
        lambda indices: len(indices) == len({*indices}) > 0 <= min(indices),
        "at least one episode, each once and at least 0; null takes all",
    ),
    "dataset.eval_split": (lambda share: 0 <= share < 1, "a share, at least 0 and below 1"),
    "policy.chunk_size": _within(1, 10_000), "policy.empty_cameras": _within(0, 100),
    "policy.prefix_length": _within(-MANY, 2**16), "policy.tokenizer_max_length": _within(1, 2**16),
    "policy.optimizer_lr": (lambda rate: rate > 0, "above 0"),
    "policy.optimizer_betas": (lambda betas: all(0 <= beta < 1 for beta in betas), "at least 0 and below 1, both"),
    "policy.optimizer_eps": _within(1e-37), "policy.optimizer_weight_decay": _within(0),
    "policy.scheduler_warmup_steps": _within(0, MANY), "policy.scheduler_decay_steps": _within(1, MANY),
    "policy.scheduler_decay_lr": _within(0),
    "peft.r": _within(1, 2**16),
    "log_with": (lambda names: {*names} <= TRACKERS, f"a list out of {sorted(TRACKERS)}"),
    **{name: (choices.__contains__, " or ".join(choices)) for name, choices in CHOICES.items()},
}  # fmt: skip
"""What a setting must satisfy unless it is None."""
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "null",
    "Path": "a path (in a file, quote one that looks like a date or a number)",
    "list[int]": "a list of whole numbers such as [0, 1]", "list[str]": "a list of texts such as [a, b]",
    "tuple[int, int]": "two whole numbers such as [512, 512]", "tuple[float, float]": "two numbers such as [0.9, 0.95]",
    "dict[str, str]": "a mapping such as {a: b}",
    "dict[str, PolicyFeature]": "features such as {action: {type: ACTION, shape: [6]}}",
    "dict[str, NormalizationMode]": "modes by feature type such as {STATE: MEAN_STD, ACTION: IDENTITY}",
    "RTCConfig": "settings such as {enabled: true, execution_horizon: 10}",
    "RTCAttentionSchedule": "ZEROS, ONES, LINEAR or EXP",
}  # fmt: skip
"""What a field accepts, by its type."""


@dataclass
class DatasetSettings:
    """The frames to train on.

    repo_id, root, revision  a LeRobotDataset: Hub id, local folder (None: LeRobot's cache), branch or tag
    episodes                 indices to use; None: all
    eval_split               share of each task's episodes to hold out, its last ones
    use_imagenet_stats       normalise cameras, if at all, by ImageNet's mean and std
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
class AdapterSettings:
    """Adapters of PEFT, as LeRobot's ``PeftConfig`` has them: the policy's own weights are frozen. LeRobot's class is
    trained then, which adds, saves and loads them."""

    target_modules: list[str] | str | None = None
    full_training_modules: list[str] | None = None
    method_type: str = "LORA"
    init_type: str | None = None
    r: int = 16
    lora_alpha: int | None = None


@dataclass
class WandbSettings:
    """As LeRobot's ``WandBConfig``; ``project`` names the runs of all trackers."""

    enable: bool = False
    project: str = "lerobot"
    entity: str | None = None
    notes: str | None = None
    run_id: str | None = None
    mode: str | None = None


GROUPS = {"dataset": "repo_id: me/pick", "policy": "type: smolvla", "wandb": "enable: true", "peft": "r: 16"}
"""The groups of settings, each with an example."""


@dataclass
class TrainSettings:
    """A run. Names and defaults are LeRobot's where LeRobot has the setting. TrainingError for values that cannot work.

    policy                       every field of SmolVLA's configuration, with optimizer and schedule
    policy_path                  checkpoint to start from: folder or Hub id; None: fresh weights
    implementation               whose ``SmolVLAPolicy`` is trained, "ours" or "lerobot"; both write the same files
    fast                         "auto": patch for training where possible, with fused AdamW; "on": the same, or an error;
                                 "off": do not patch
    image_cache                  bytes for the tokens of frames under a frozen vision tower, so that later epochs neither
                                 decode nor encode them; 0: none, or with ``image_cache_dir`` as many as it takes
    image_cache_dir              folder that keeps the tokens for other runs; None: they are in memory
    dtype                        "bf16": matrix products under autocast; "auto": bf16 if ``policy.use_amp``, else fp32
    seed                         of weights, data order and noise; None: the process's random state, and the data order of
                                 seed 0, as in LeRobot
    batch_size                   samples per forward pass and process; an optimizer step takes
                                 ``gradient_accumulation_steps`` of them
    steps                        optimizer steps in all, including those before a resume
    num_workers                  processes that read data
    log_freq, save_freq          steps between log lines, between checkpoints (0: only the last)
    eval_steps, max_eval_samples steps between losses on held-out episodes (0: never); frames they use (0: all)
    tolerance_s                  largest error of a timestamp, in seconds
    rename_map                   name of an observation in the dataset -> its name in the policy
    log_with                     trackers of accelerate beside the log file: "wandb", "trackio", "tensorboard"
    wandb, peft                  as LeRobot's; None: no adapters
    """

    dataset: DatasetSettings
    policy: SmolVLAConfig
    output_dir: Path
    policy_path: str | None = None
    implementation: str = "ours"
    fast: str = "auto"
    image_cache: int = 0
    image_cache_dir: str | None = None
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
    log_with: list[str] = field(default_factory=list)
    wandb: WandbSettings = field(default_factory=WandbSettings)
    peft: AdapterSettings | None = None

    def __post_init__(self) -> None:
        self.output_dir = Path(os.path.expanduser(self.output_dir))
        if self.image_cache_dir:  # a resumed run may be started elsewhere
            self.image_cache_dir = os.path.abspath(os.path.expanduser(self.image_cache_dir))
        self.fast = {"True": "on", "False": "off"}.get(self.fast, self.fast)  # as YAML reads these words
        # LeRobot's default is the integer 10, and draccus reads it back as 10.0: a resumed run must write the same file.
        self.policy.optimizer_grad_clip_norm = float(self.policy.optimizer_grad_clip_norm)
        for part, prefix in ((self, ""), (self.dataset, "dataset."), (self.wandb, "wandb.")):
            try:
                check_kinds(part)
            except ValueError as error:
                raise TrainingError(f"--{prefix}{error}") from error
        if self.dataset.root:
            self.dataset.root = os.path.expanduser(self.dataset.root)
        for name in ("log_freq", "save_freq", "eval_steps", "max_eval_samples"):
            setattr(self, name, max(0, getattr(self, name)))  # below 0 is 0, as in LeRobot
        for name, (accepts, words) in RULES.items():
            group, _, key = name.rpartition(".")
            value = getattr(getattr(self, group) if group else self, key, None)
            if value is not None and not accepts(value):
                raise TrainingError(f"--{name}={shown(value)}: must be {words}")
        self._check_together()

    def _check_together(self) -> None:
        """TrainingError for settings of which one needs another."""
        data, adapted, fresh = self.dataset, self.peft or self.policy.use_peft, not self.policy_path
        cached = self.image_cache or self.image_cache_dir
        unlike = {
            "no dataset: give --dataset.repo_id, a Hub id, and --dataset.root for a local folder": not data.repo_id,
            "--image_cache needs the fast path: give --fast=auto, or --image_cache=0 and --image_cache_dir=null":
                cached and self.fast == "off",
            f"--eval_steps={self.eval_steps} needs held-out episodes: begin a new run with --dataset.eval_split=0.1, it "
            "cannot be added with --resume": self.eval_steps and not data.eval_split,
            "--peft.* and --policy.use_peft need --policy.path: adapters change a policy that exists": adapted and fresh,
            "--rename_map needs --policy.path: a fresh policy takes the dataset's names": self.rename_map and fresh,
        }  # fmt: skip
        for message in (message for message, wrong in unlike.items() if wrong):
            raise TrainingError(message)

    @property
    def bf16(self) -> bool:
        return self.dtype == "bf16" or (self.dtype == "auto" and self.policy.use_amp)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a checkpoint's ``run.json``."""
        own = {"policy": self.policy.to_dict(), "output_dir": str(self.output_dir)}
        return {**dataclasses.asdict(self), **own}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainSettings:
        """Inverse of ``to_dict``, by draccus, as LeRobot reads its files.

        raises  TrainingError naming a setting that is unknown or of another type, or another policy
        """
        import draccus

        policy = dict(values["policy"])
        if (kind := policy.pop("type", "smolvla")) != "smolvla":
            raise TrainingError(f"--policy.type={kind}: this command trains smolvla only; use lerobot-train")
        try:
            return draccus.decode(cls, {**values, "policy": policy})
        except draccus.utils.ParsingError as error:
            raise TrainingError(_refusal(error, values)) from error

    def to_lerobot(self) -> dict[str, Any]:
        """``train_config.json``, from which ``lerobot-train --config_path=... --resume=true`` resumes.

        LeRobot takes one forward pass per step, so its batch size is all the samples of one of our steps.
        """
        from lerobot.configs.train import TrainPipelineConfig

        theirs = {entry.name for entry in dataclasses.fields(TrainPipelineConfig)}
        optimizer, scheduler = self.policy.get_optimizer_preset(), self.policy.get_scheduler_preset()
        values = {name: value for name, value in self.to_dict().items() if name in theirs}
        return {
            **values,
            "dataset": {name: value for name, value in values["dataset"].items() if value is not None},
            "job_name": "smolvla",
            "batch_size": self.batch_size * self.gradient_accumulation_steps,
            "use_policy_training_preset": True,
            "optimizer": {"type": "adamw", **dataclasses.asdict(optimizer)},
            "scheduler": {"type": "cosine_decay_with_warmup", **dataclasses.asdict(scheduler)},
        }


def flags(kind: type = TrainSettings, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every setting by LeRobot's name of its flag: ``{"policy.rtc_config.enabled": field, ...}``."""
    found = {}
    hints = typing.get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        found[prefix + entry.name] = entry
        for part in (hints[entry.name], *typing.get_args(hints[entry.name])):
            if dataclasses.is_dataclass(part):
                found.update(flags(typing.cast(type, part), f"{prefix}{entry.name}."))
    return found


def accepted(entry: dataclasses.Field) -> str:
    """The values a field accepts, in words."""
    return " or ".join(WORDS.get(part, part) for part in str(entry.type).split(" | "))


def shown(value: Any) -> str:
    """A value as a command line has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def nearest(name: str, known: Container[str]) -> str:
    """The name, or the group above it, that is known; "" without one."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def _refusal(error: Exception, values: dict[str, Any]) -> str:
    """The message of draccus, or of a class's own check, with the flag, its value and what is accepted."""
    path: Sequence[Any] = ()
    cause: BaseException = error
    # The last place is the closest; a class's own check has none, and knows better what is wrong.
    while cause.__cause__:
        path, cause = getattr(cause, "key_path", ()), cause.__cause__
    known = flags()
    name = nearest(".".join(map(str, getattr(cause, "key_path", path))), known)
    if name in ("", *GROUPS):
        # The message names fields of the policy; the user gave flags.
        names = "|".join(entry.name for entry in dataclasses.fields(SmolVLAConfig))
        return re.sub(rf"\b({names})\b", r"--policy.\1", str(cause))
    value = functools.reduce(operator.getitem, name.split("."), values)
    return f"--{name}={shown(value)}: accepted is {accepted(known[name])}"
