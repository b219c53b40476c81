"""Trains SmolVLA on a LeRobotDataset, with LeRobot's flags: a fresh policy or a checkpoint, on images or video.

    smolvla-fast train --dataset.repo_id=ME/PICK --policy.path=lerobot/smolvla_base --batch_size=64 --steps=20000 \\
        --rename_map='{"observation.images.up": "observation.images.camera1"}' --output_dir=outputs/pick
    smolvla-fast train --resume=true --output_dir=outputs/pick

A fine-tuned checkpoint has its own names of cameras: rename each of the dataset's to one of them. `lerobot-eval` and
`lerobot-train --resume=true` read the checkpoints. train_log.jsonl and its curve, train_log.png, are written beside them.
Started as `-m smolvla_fast.cli train` by `accelerate launch --multi_gpu` or torchrun, several processes train together.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from ..measure.console import CommandError, Console
from ..train.errors import TrainingError
from ..train.flags import LEROBOTS, SETTINGS, read_settings
from ..train.log import Window, read_log
from ..train.settings import CHOICES, GROUPS, TrainSettings, accepted, shown
from ..training import Run, train
from .subject import count_dtypes

NOTES = {
    "resume": "go on from the last checkpoint of --output_dir, or from that of --config_path",
    "config_path": "a file of settings, as LeRobot's; with --resume: a checkpoint's train_config.json",
    "policy.path": "checkpoint to start from: folder or Hub id; without it, fresh weights",
    "policy.type": "smolvla, as in LeRobot",
    "policy.device": "cpu, cuda, cuda:N, mps (default: the best there is)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    titles = {"policy": "every field of LeRobot's SmolVLAConfig", "peft": "adapters, as LeRobot adds them"}
    group = {name: parser.add_argument_group(name, titles.get(name)) for name in ("run", *GROUPS)}
    for name in (*NOTES, *(name for name in (*SETTINGS, *LEROBOTS) if name not in NOTES)):
        place = group.get(name.partition(".")[0], group["run"])
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if name == "resume" else {}
        # Absent unless given, so that a resumed run knows which flags are new.
        options |= {"default": argparse.SUPPRESS, "help": NOTES.get(name) or _note(name)}
        place.add_argument(f"--{name}", dest=name, metavar="", **options)


def _note(name: str) -> str:
    if name in LEROBOTS:
        values = LEROBOTS[name][0]
        return f"lerobot-train's: {'ignored' if values is None else ' or '.join(map(shown, values))}"
    entry = SETTINGS[name]
    text = " or ".join(map(str, CHOICES[name])) if name in CHOICES else accepted(entry)
    plain = isinstance(entry.default, (str, int, float, tuple))
    return f"{text} (default: {entry.default})" if plain else text


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        settings, checkpoint = read_settings(vars(args))
        with closing(Progress(settings, console)) as progress:
            done = train(settings, resume=checkpoint, on_begin=progress.begin, on_step=progress.step)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    if done.place[0] == 0:
        console.line(f"trained to step {done.step}; checkpoints and log are in {settings.output_dir}")
    return 0


class Progress:
    """A bar on a terminal, or a line every ``log_freq`` steps elsewhere, and in the end the curve."""

    def __init__(self, settings: TrainSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.bar: Any = None
        self.window = Window()

    def close(self) -> None:
        # The curve matters most for a run that stopped, by an error or by hand.
        if self.bar is not None:
            self.bar.close()
            draw(self.settings, self.console)

    def begin(self, run: Run) -> None:
        held_out, steps = run.data.held_out, self.settings.steps
        dtypes = count_dtypes(run.policy)
        weights = ", ".join(f"{count:,} {name}" for name, count in dtypes.items())
        trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
        self.console.line(
            f"{len(run.data.train):,} frames of {run.data.train.num_episodes} episodes"
            + (f", {len(held_out):,} frames of {held_out.num_episodes} episodes held out" if held_out else "")
            + f"; {sum(dtypes.values()):,} parameters ({weights}), {trained:,} of them trained, on "
            f"{self.settings.policy.device}{' under bf16 autocast' if self.settings.bf16 else ''}, {run.path}"
        )
        self.console.line(
            f"steps {run.step + 1} to {steps}, {run.samples} samples each, "
            f"{run.step * run.samples / len(run.data.train):.1f} epochs done"
        )
        self.bar = tqdm(initial=run.step, total=steps, unit="step", disable=None, dynamic_ncols=True)
        self.samples = run.samples

    def step(self, step: int, facts: dict[str, float]) -> None:
        self.window.add(self.samples, **facts)
        means, steps = self.window.means(), self.settings.steps
        speed = f"{means['samples_per_s']:.3g}"
        shown = {"loss": f"{facts['loss']:.4f}", "grad norm": f"{facts['grad_norm']:.3g}", "samples/s": speed}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.settings.log_freq and step % self.settings.log_freq == 0:
            self.window = Window()
            left = timedelta(seconds=round((steps - step) * self.samples / means["samples_per_s"]))
            if self.bar.disable:
                self.console.line(
                    f"step {step:>6,} of {steps:,}  loss {means['loss']:.4f}  grad norm {means['grad_norm']:.3g}  "
                    f"lr {facts['lr']:.2e}  {speed} samples/s  {left} left"
                )


def draw(settings: TrainSettings, console: Console) -> None:
    """Saves the loss curve beside the log, or prints why there is none."""
    path = settings.output_dir / "train_log.png"
    try:
        from ..measure.plot import loss_curve

        log = read_log(settings.output_dir)
        if not any("loss" in entry for entry in log):
            why = "" if settings.log_freq else ", as --log_freq=0 asks for"
            raise ValueError(f"no step was logged{why}")
        loss_curve(log, f"SmolVLA, {settings.output_dir.name}", path)
        console.line(f"wrote {path}")
    except ImportError:
        console.line('no curve: matplotlib is not installed; run `pip install "smolvla_fast[cli]"`')
    except (OSError, ValueError) as error:
        console.line(f"no curve: {error}")
