"""Trains SmolVLA on a LeRobotDataset, with LeRobot's flags: a fresh policy or a checkpoint, on images or video.

    smolvla-fast train --dataset.repo_id=ME/PICK --policy.path=lerobot/smolvla_base --batch_size=64 --steps=20000 \\
        --rename_map='{"observation.images.up": "observation.images.camera1"}' --output_dir=outputs/pick
    smolvla-fast train --resume=true --output_dir=outputs/pick

A fine-tuned checkpoint knows cameras by its own names: rename each of the dataset's. Checkpoints are LeRobot's:
`lerobot-eval` and `lerobot-train --resume=true` take them. Beside them lie train_log.jsonl and train_log.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..smolvla import SmolVLAConfig
from ..smolvla.configuration_smolvla import best_device
from ..train.checkpoint import STATE, Checkpoints, read_run
from ..train.errors import TrainingError
from ..train.log import Window, read_log
from ..train.settings import (
    CHOICES,
    FREE_ON_RESUME,
    DatasetSettings,
    TrainSettings,
    check_same,
    flatten,
    nest,
)
from ..training import Run, train
from .console import CommandError, Console

logger = logging.getLogger(__name__)

# Fields that are given in another way: the first two by their own fields, the third by --policy.path.
OWN = ("policy", "dataset", "policy_path", "output_dir", "pretrained_path")
# Flags of lerobot-train for what is not here: the one value that asks for nothing of it (None: any does), and what to do
# about another.
LEROBOTS = {
    "job_name": (None, ""),
    "wandb.enable": ("false", "loss and samples a second go to train_log.jsonl in --output_dir, the curve to train_log.png"),
    "wandb.project": (None, ""), "wandb.entity": (None, ""), "wandb.notes": (None, ""), "wandb.mode": (None, ""),
    "wandb.disable_artifact": (None, ""),
    "dataset.image_transforms.enable": ("false", "leave it out, or train with lerobot-train, which has them"),
    "dataset.streaming": ("false", "download the dataset, or name its folder with --dataset.root"),
    "use_policy_training_preset": ("true", "set --policy.optimizer_* and --policy.scheduler_*"),
}  # fmt: skip
HELP = {
    "policy.optimizer_lr": "peak learning rate", "policy.scheduler_warmup_steps": "steps of linear warm-up",
    "policy.scheduler_decay_steps": "steps of the cosine", "policy.scheduler_decay_lr": "where the cosine ends",
    "policy.device": "cpu, cuda, cuda:N, mps (default: the best there is)",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument(
        "--output_dir", help="where log and checkpoints go; must not hold a run, but to resume it"
    )
    run.add_argument(
        "--resume", nargs="?", const=True, default=False, type=_boolean,
        help="go on from the last checkpoint of --output_dir, or from that of --config_path",
    )  # fmt: skip
    run.add_argument("--config_path", help="with --resume: a checkpoint's train_config.json")
    for entry in dataclasses.fields(TrainSettings):
        _add(run, entry.name, entry, entry.default)
    data = parser.add_argument_group("dataset")
    policy = parser.add_argument_group("policy", "every field of LeRobot's SmolVLAConfig")
    policy.add_argument("--policy.path", dest="policy_path", default=argparse.SUPPRESS,
                        help="checkpoint to start from: folder or Hub id; without it, fresh weights")  # fmt: skip
    policy.add_argument("--policy.type", choices=["smolvla"], default="smolvla", help="as in LeRobot")
    lerobots = parser.add_argument_group(
        "lerobot-train's", "accepted where they ask for nothing, refused otherwise"
    )
    for name, (value, _) in LEROBOTS.items():
        lerobots.add_argument(
            f"--{name}", metavar="", default=argparse.SUPPRESS, help=f"{value} only" if value else "ignored"
        )
    for group, name, kind in ((data, "dataset", DatasetSettings), (policy, "policy", SmolVLAConfig)):
        for entry in dataclasses.fields(kind):
            _add(group, f"{name}.{entry.name}", entry, entry.default)


def _add(group: Any, name: str, entry: dataclasses.Field, default: Any) -> None:
    if entry.name in OWN:
        return
    text = HELP.get(name, f"{entry.type}")
    if default not in (None, "", dataclasses.MISSING):
        text += f" (default: {default})"
    # Left out unless given, so that a resumed run knows what was asked for anew.
    group.add_argument(
        f"--{name}", metavar="", default=argparse.SUPPRESS, choices=CHOICES.get(name), type=_parser(str(entry.type)),
        help=text,
    )  # fmt: skip


def _parser(kind: str) -> Callable[[str], Any]:
    """Reads a flag of a field's type: text as it is, the rest as JSON (``true``, ``null``, ``[0.9, 0.95]``)."""

    def read(text: str) -> Any:
        word = text.lower()
        if word in ("null", "none") and "None" in kind:
            return None
        if kind.startswith("str"):
            return text
        try:
            value = json.loads(word if word in ("true", "false", "null", "none") else text)
        except json.JSONDecodeError:
            return text  # the settings say what they accept
        return float(value) if kind.startswith("float") and type(value) is int else value

    return read


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def run(args: argparse.Namespace, console: Console) -> int:
    progress: Progress | None = None
    try:
        settings, checkpoint = read_settings(vars(args))
        with Progress(settings, console) as progress:
            done = train(settings, resume=checkpoint, on_begin=progress.begin, on_step=progress.step)
    except BaseException as error:
        # Where a run went is asked above all of one that stopped, by an error or by hand.
        if progress is not None and progress.bar is not None:
            draw(progress.settings.output_dir, console)
        if isinstance(error, TrainingError):
            raise CommandError(str(error)) from error
        raise
    console.line(f"trained to step {done.step}; checkpoints and log are in {settings.output_dir}")
    draw(settings.output_dir, console)
    return 0


def read_settings(flags: dict[str, Any]) -> tuple[TrainSettings, Path | None]:
    """Settings of the run and the checkpoint it goes on from, if it does.

    flags   name -> value of every flag that was given         raises  TrainingError
    """
    for name, (value, instead) in LEROBOTS.items():
        if value and flags.get(name, value).lower() != value:
            raise TrainingError(f"--{name}={flags[name]}: this command accepts {value} only; {instead}")
    flags = {name: value for name, value in flags.items() if name not in LEROBOTS}
    known = {entry.name for entry in dataclasses.fields(TrainSettings)} - {"dataset", "policy"}
    asked = {k: v for k, v in flags.items() if k in known or k.startswith(("dataset.", "policy."))}
    asked = {k: v for k, v in asked.items() if k != "policy.type" and (k != "output_dir" or v)}
    if asked.get("policy.push_to_hub"):
        raise TrainingError(
            "--policy.push_to_hub=true: this command uploads nothing; upload a checkpoint's pretrained_model"
        )
    if flags.get("resume"):
        return _resumed(asked, flags.get("config_path"))
    if flags.get("config_path"):
        raise TrainingError("--config_path names a checkpoint to go on from; add --resume=true")
    base: dict[str, Any] = {"type": "smolvla", "device": best_device()}
    if asked.get("policy_path"):
        try:
            base = SmolVLAConfig.from_pretrained(asked["policy_path"]).to_dict()
        except (OSError, ValueError) as error:
            raise TrainingError(f"--policy.path={asked['policy_path']}: {error}") from error
    base |= {"push_to_hub": False, "pretrained_path": asked.get("policy_path")}
    asked.setdefault("output_dir", f"outputs/train/{datetime.now():%Y-%m-%d/%H-%M-%S}_smolvla")
    return TrainSettings.from_dict(nest({"dataset": {}, "policy": base}, asked)), None


def _resumed(asked: dict[str, Any], config_path: str | None) -> tuple[TrainSettings, Path]:
    if config_path:
        path = Path(config_path)
        checkpoint = (path.parent if path.suffix == ".json" else path).parent
        if not (checkpoint / STATE).is_dir():
            raise TrainingError(
                f"--config_path={config_path} lies in no checkpoint; give .../STEP/pretrained_model/train_config.json"
            )
    else:
        if "output_dir" not in asked:
            raise TrainingError(
                "--resume=true needs the run's --output_dir, or the --config_path of a checkpoint"
            )
        found = Checkpoints(Path(asked["output_dir"])).last()
        if found is None:
            raise TrainingError(
                f"--output_dir={asked['output_dir']} holds no whole checkpoint to resume; leave out --resume for a new run"
            )
        checkpoint = found
    facts = read_run(checkpoint)
    saved = facts["settings"]
    # With the flags as they were given: features that were left to the dataset are filled in by now.
    check_same(flatten(saved), flatten(facts.get("asked", saved)), asked, checkpoint)
    free = {name: value for name, value in asked.items() if name in FREE_ON_RESUME}
    settings = TrainSettings.from_dict(nest(saved, free))
    if (
        settings.steps != saved["steps"]
        and min(settings.steps, saved["steps"]) < settings.policy.scheduler_decay_steps
    ):
        logger.warning(
            "the run was to have %d steps and now %d: its learning rates go on along the new schedule",
            saved["steps"], settings.steps,
        )  # fmt: skip
    return settings, checkpoint


class Progress:
    """A bar on a terminal; elsewhere a line every ``log_freq`` steps."""

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.bar: Any = None
        self.window = Window()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *reason: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def begin(self, run: Run) -> None:
        held_out = run.data.held_out
        counts = (
            [p.numel() for p in run.policy.parameters()],
            [p.numel() for p in run.policy.parameters() if p.requires_grad],
        )
        self.console.line(
            f"{len(run.data.train):,} frames of {run.data.train.num_episodes} episodes"
            + (f", {len(held_out):,} frames of {held_out.num_episodes} episodes held out" if held_out else "")
            + f"; {sum(counts[0]):,} parameters, {sum(counts[1]):,} of them trained, on {self.settings.policy.device} in "
            f"{'bf16 autocast' if self.settings.bf16 else 'fp32'}, {run.path}"
        )
        self.console.line(
            f"steps {run.step + 1} to {self.settings.steps}, {run.samples} samples each, "
            f"{run.step * run.samples / len(run.data.train):.1f} epochs done"
        )
        self.bar = tqdm(
            initial=run.step, total=self.settings.steps, unit="step", disable=None, dynamic_ncols=True
        )
        self.samples = run.samples

    def step(self, step: int, facts: dict[str, float]) -> None:
        self.window.add(self.samples, **facts)
        means = self.window.means()
        if not self.bar.disable:
            rate = f"{means['samples_per_s']:.3g}"
            self.bar.set_postfix(
                {"loss": f"{facts['loss']:.4f}", "grad norm": f"{facts['grad_norm']:.3g}", "samples/s": rate},
                refresh=False,
            )
            self.bar.update()
        every = self.settings.log_freq
        if every and step % every == 0:
            if self.bar.disable:
                left = (self.settings.steps - step) * self.samples / means["samples_per_s"]
                self.console.line(
                    f"step {step:>6,} of {self.settings.steps:,}  loss {means['loss']:.4f}  "
                    f"grad norm {means['grad_norm']:.3g}  lr {facts['lr']:.2e}  "
                    f"{means['samples_per_s']:.3g} samples/s  {timedelta(seconds=round(left))} left"
                )
            self.window = Window()


def draw(output_dir: Path, console: Console) -> None:
    """Saves the loss curve beside the log, or says why there is none."""
    try:
        from .plot import loss_curve
    except ImportError:
        console.line('no curve: matplotlib is not installed; run `pip install "smolvla_fast[cli]"`')
        return
    path = output_dir / "train_log.png"
    try:
        log = read_log(output_dir)
        if not any("loss" in entry for entry in log):
            raise ValueError("no step is in the log, and none comes there with --log_freq=0")
        loss_curve(log, f"SmolVLA, {output_dir.name}", path)
    except (OSError, ValueError) as error:
        console.line(f"no curve: {error}")
        return
    console.line(f"wrote {path}")
