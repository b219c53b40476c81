"""Everything a training run is told, under LeRobot's names, and the two files a checkpoint keeps of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..smolvla import SmolVLAConfig
from .errors import TrainingError

CHOICES = {
    "implementation": ("ours", "lerobot"),
    "dtype": ("auto", "fp32", "bf16"),
    "fast": ("auto", "on", "off"),
}
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
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise TrainingError(f"{name}={getattr(self, name)!r}: accepted are {', '.join(accepted)}")
        for name, least in dict(
            batch_size=1, gradient_accumulation_steps=1, steps=1, num_workers=0, log_freq=0, save_freq=0,
            eval_steps=0, max_eval_samples=0, image_cache=0,
        ).items():  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise TrainingError(f"{name}={value!r}: must be a whole number of at least {least}")
        if self.image_cache and self.fast == "off":
            raise TrainingError("image_cache needs the fast path: leave out --fast=off, or --image_cache")
        if self.policy.use_peft:
            raise TrainingError(
                "policy.use_peft=true: this trains the policy's own weights and adds no adapter; train adapters with "
                "lerobot-train and its --peft flags, or in a loop of your own around peft.get_peft_model, where "
                "smolvla_fast.patch(policy, training=True) keeps the fast path"
            )
        if not (self.policy.optimizer_lr > 0 and self.policy.scheduler_decay_steps > 0):
            raise TrainingError("policy.optimizer_lr and policy.scheduler_decay_steps must be above 0")
        split = self.dataset.eval_split
        if not 0 <= split < 1:
            raise TrainingError(f"dataset.eval_split={split}: must be a share, at least 0 and below 1")
        if self.eval_steps and not split:
            raise TrainingError(
                "eval_steps needs held-out episodes: give dataset.eval_split, for instance 0.1"
            )
        if self.rename_map and not self.policy_path:
            raise TrainingError(
                "rename_map needs --policy.path: a fresh policy takes the dataset's names, so there is nothing to rename"
            )
        if not self.dataset.repo_id:
            raise TrainingError(
                "no dataset: give --dataset.repo_id (a Hub id such as lerobot/svla_so101_pickplace), and --dataset.root "
                "for a local folder"
            )

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
        """Inverse of ``to_dict``. TrainingError for values of another version or a policy that cannot be."""
        try:
            dataset = DatasetSettings(**values["dataset"])
            policy = SmolVLAConfig.from_dict(values["policy"])
            return cls(**{**values, "dataset": dataset, "policy": policy})
        except (TypeError, KeyError, ValueError, NotImplementedError) as error:
            raise TrainingError(f"these settings do not make a run: {error}") from error

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


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """``{"dataset": {"root": ...}}`` as ``{"dataset.root": ...}``, one level deep: the names of the flags."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("dataset", "policy"):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat


def nest(values: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested settings in which flat ones, as ``flatten`` names them, replace what is there."""
    nested = {k: dict(v) if k in ("dataset", "policy") else v for k, v in values.items()}
    for name, value in flat.items():
        group, _, key = name.rpartition(".")
        (nested[group] if group else nested)[key] = value
    return nested


def check_same(
    saved: dict[str, Any], before: dict[str, Any], asked: dict[str, Any], checkpoint: Path
) -> None:
    """Refuses to go on with another configuration.

    saved, before, asked  flat settings of the checkpoint, those it was begun with, and those that are asked for now, which
                          may be either's           raises  TrainingError naming every one that is neither
    """
    other = [
        f"{name} ({saved.get(name)!r} in the checkpoint, {value!r} asked for)"
        for name, value in asked.items()
        if name not in FREE_ON_RESUME and value not in (saved.get(name), before.get(name))
    ]
    if other:
        raise TrainingError(
            f"cannot resume {checkpoint} with another configuration: {'; '.join(other)}. Leave these flags out to go on as "
            f"it was (free are {', '.join(sorted(FREE_ON_RESUME))}), or start a new run from its weights with "
            f"--policy.path={checkpoint / 'pretrained_model'} and a new --output_dir"
        )
