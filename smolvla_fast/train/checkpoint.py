"""Checkpoints in LeRobot's layout, written whole or not at all.

    output_dir/checkpoints/000100/pretrained_model/   config.json, model.safetensors, processors, train_config.json
                                  training_state/     optimizer, scheduler, random state, step, run.json
                           last -> 000100, or last.txt with that name on a disk without symbolic links

A checkpoint is written under another name, flushed to the disk, and only then renamed; `last` is replaced in one step. So
a process killed at any point, or a full disk, leaves the earlier checkpoints as they were.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from . import random_state
from .disk import advice, flush, replace
from .errors import TrainingError

logger = logging.getLogger(__name__)

PRETRAINED, STATE, LAST, NOTE = "pretrained_model", "training_state", "last", "last.txt"
OPTIMIZER, GROUPS = "optimizer_state.safetensors", "optimizer_param_groups.json"
SCHEDULER, RANDOM = "scheduler_state.json", "rng_state.safetensors"
STEP, RUN = "training_step.json", "run.json"
PARTIAL, OLD = ".partial", ".old"
ANOTHER = f"take another checkpoint, with --config_path=CHECKPOINT/{PRETRAINED}/train_config.json"


class Checkpoints:
    """The checkpoints of one run.

    folder  ``output_dir/checkpoints``, made when the first one is written
    """

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "checkpoints"

    def save(self, step: int, total_steps: int, write: Callable[[Path], None]) -> None:
        """Lets ``write(folder)`` fill a folder, makes it the checkpoint of ``step`` and points `last` at it.

        raises  TrainingError where the disk is full or refuses; then earlier checkpoints stay and nothing of this one does
        """
        final = self.folder / f"{step:0{max(6, len(str(total_steps)))}d}"
        aside, old = (final.with_name(f".{final.name}{end}") for end in (PARTIAL, OLD))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            aside.mkdir()
            write(aside)
            for path in (*aside.rglob("*"), aside, self.folder):
                flush(path)  # or the rename may reach the disk before the bytes
            if final.exists():  # a run resumed at an earlier step writes this one again
                os.rename(final, old)
            os.rename(aside, final)
            self._point_at(final.name)
            flush(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            go_on = "go on with --resume=true and the same" if self.last() else "begin again with another"
            free = shutil.disk_usage(next(p for p in self.folder.parents if p.exists())).free
            raise TrainingError(
                f"cannot write checkpoint {final}: {error} ({free / 2**20:,.0f} MiB free there); {self.kept()}. "
                f"{advice(error).capitalize()} and {go_on} --output_dir"
            ) from error

    def _point_at(self, name: str) -> None:
        """Makes `last` a link to a checkpoint, or `last.txt` a note where links are refused, never both."""
        link, note, aside = (self.folder / entry for entry in (LAST, NOTE, f".{LAST}{PARTIAL}"))
        try:
            aside.symlink_to(name)
            replace(aside, link)
            note.unlink(missing_ok=True)
        except OSError as error:
            if not note.exists():
                logger.warning(
                    "%s cannot be made a symbolic link (%s); %s names the last checkpoint instead. --resume=true reads it, "
                    "other programs want the folder of a step", link, error.strerror or error, note,
                )  # fmt: skip
            aside.unlink(missing_ok=True)
            aside.write_text(name, encoding="utf-8")
            flush(aside)
            replace(aside, note)
            with suppress(OSError):  # there is none, or a folder in its place
                link.unlink()

    def _clear(self) -> None:
        """Removes what a killed process left half written, and moves back a checkpoint that it moved aside."""
        for path in self.folder.glob(f".*{OLD}"):
            place = path.with_name(path.name[1 : -len(OLD)])
            shutil.rmtree(path) if place.exists() else os.rename(path, place)
        for path in self.folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def last(self) -> Path | None:
        """The newest whole checkpoint: the one `last` names or, where a kill left it dangling, the highest step."""
        link, note = self.folder / LAST, self.folder / NOTE
        name = os.readlink(link) if link.is_symlink() else ""
        with suppress(OSError, ValueError):
            name = name or note.read_text(encoding="utf-8").strip()
        if name and (self.folder / name / STATE).is_dir():
            return self.folder / name
        steps = [p for p in self.folder.glob("[0-9]*") if p.name.isdigit() and (p / STATE).is_dir()]
        # A kill between the two renames of `save` leaves a whole checkpoint moved aside; of equal steps the first wins.
        steps += [p for p in self.folder.glob(f".[0-9]*{OLD}") if (p / STATE).is_dir()]
        # A copy of the run that followed links has a folder instead of the link.
        copied = link if (link / STATE).is_dir() else None
        return max(steps, key=lambda p: int("".join(filter(str.isdigit, p.name))), default=copied)

    def kept(self) -> str:
        """In words, what is there after a save that failed."""
        last = self.last()
        return f"the last checkpoint, {last}, is whole" if last else "there is no checkpoint before it"


def save_state(folder: Path, run: Any) -> None:
    """Writes ``training_state`` of a ``Run``: the files that LeRobot's ``load_training_state`` reads, and ``run.json``."""
    from lerobot.optim import save_optimizer_state, save_scheduler_state

    folder, state, processes = folder / STATE, run.optimizer.state_dict(), run.place[1]
    folder.mkdir()
    # How an update is computed belongs to the run, not to the checkpoint, as in LeRobot's file.
    groups = [{**group, "fused": None} for group in state["param_groups"]]
    save_optimizer_state(run.optimizer, folder, {**state, "param_groups": groups})
    save_scheduler_state(run.scheduler, folder)
    save_file(random_state.collect(), folder / RANDOM)
    place = {"step": run.step, "num_processes": processes, "batch_size": run.samples // processes}
    write_json(folder / STEP, place)
    facts = {"settings": run.settings.to_dict(), "asked": run.asked, "frames": len(run.data.train)}
    write_json(folder / RUN, {**facts, "processes": processes})


def load_state(checkpoint: Path, optimizer: Optimizer, scheduler: LRScheduler) -> int:
    """Restores optimizer, scheduler and the process's random state; returns the step. TrainingError for broken files."""
    from lerobot.utils.utils import unflatten_dict

    folder = checkpoint / STATE
    try:
        entries = unflatten_dict(load_file(folder / OPTIMIZER))["state"]
        groups = _read(folder / GROUPS)
        for group, own in zip(groups, optimizer.param_groups, strict=False):  # torch refuses another number
            group["fused"] = own["fused"]
        optimizer.load_state_dict({"state": {int(i): entries[i] for i in entries}, "param_groups": groups})
        scheduler.load_state_dict(_read(folder / SCHEDULER))
        step = int(_read(folder / STEP)["step"])
        random_state.restore(load_file(folder / RANDOM))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        said = f"{folder} cannot be resumed from ({type(error).__name__}: {error}); {ANOTHER}"
        raise TrainingError(said) from error
    return step


def read_run(checkpoint: Path) -> dict[str, Any]:
    """``run.json``. TrainingError where it is missing, as in LeRobot's own checkpoints, or holds no settings."""
    path = checkpoint / STATE / RUN
    try:
        facts = _read(path)
        if not isinstance(facts["settings"]["policy"], dict):
            raise ValueError("its policy is no object")
        return facts
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"it has no {error}" if isinstance(error, KeyError) else error
        raise TrainingError(
            f"{path} cannot be read ({cause}), so this run's settings are unknown. From a checkpoint of LeRobot's begin a "
            f"new run, with --policy.path={checkpoint / PRETRAINED} and a new --output_dir"
        ) from error


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=4), encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
