"""What a resumed run keeps of its checkpoint's settings, and what it may change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .checkpoint import PRETRAINED, read_run
from .errors import TrainingError
from .settings import GROUPS, TrainSettings

logger = logging.getLogger(__name__)

# The last category changes the weights: by the order of sums, and on another device by its noise.
FREE_ON_RESUME = {
    "steps",
    "log_freq", "save_freq", "save_checkpoint", "eval_steps", "max_eval_samples",  # what is measured and kept
    "output_dir", "dataset.root", "dataset.video_backend", "num_workers",  # where and how it reads and writes
    "fast", "image_cache", "image_cache_dir", "policy.device",  # how a step is computed
    "log_with", "wandb.enable", "wandb.project", "wandb.entity", "wandb.notes", "wandb.run_id", "wandb.mode",
}  # fmt: skip
"""What a resumed run may change."""


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """``{"dataset": {"root": ...}}`` as ``{"dataset.root": ...}``, one level deep."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inside = value if name in GROUPS else None
        flat |= {f"{name}.{key}": entry for key, entry in inside.items()} if inside else {name: value}
    return flat


def go_on(asked: dict[str, Any], checkpoint: Path) -> TrainSettings:
    """The settings of a resumed run: the checkpoint's, with those of ``asked`` that ``FREE_ON_RESUME`` allows.

    asked   nested values of the flags given now
    raises  TrainingError naming every setting that is not free, and differs from the checkpoint's and from those that
            began the run: features are empty there, where the dataset filled them in later
    """
    from draccus.utils import deflatten
    from mergedeep import merge

    facts = read_run(checkpoint)
    saved = TrainSettings.from_dict(facts["settings"]).to_dict()  # an older one lacks newer settings
    wished, refused = merge({}, saved, asked), None
    if "path" in wished["policy"]:  # under the name that a run keeps it by
        wished["policy_path"] = wished["policy"].pop("path")
    try:
        wished = TrainSettings.from_dict(wished).to_dict()
    except TrainingError as error:  # raised below: a setting that may not change at all is the better message
        refused = error
    now, was, first = map(flatten, (wished, saved, facts.get("asked", facts["settings"])))
    changed = [name for name in {**was, **now} if now.get(name) != was.get(name)]
    other = [
        f"{name} ({was.get(name)!r} in the checkpoint, {now.get(name)!r} asked for)"
        for name in changed
        if name not in FREE_ON_RESUME and (name not in now or now[name] != first.get(name))
    ]
    if other:
        raise TrainingError(
            f"cannot resume {checkpoint} with another configuration: {'; '.join(other)}. Leave these flags out to go on as "
            f"it was (free are {', '.join(sorted(FREE_ON_RESUME))}), or start a new run from its weights with "
            f"--policy.path={checkpoint / PRETRAINED} and a new --output_dir"
        )
    if refused is not None:
        raise refused
    free = {name: now[name] for name in changed if name in FREE_ON_RESUME}
    settings = TrainSettings.from_dict(merge(saved, deflatten(free)))
    before = was["steps"]
    if settings.steps != before and min(settings.steps, before) < settings.policy.scheduler_decay_steps:
        logger.warning("steps: %d, not %d: learning rates follow the new schedule", settings.steps, before)
    return settings


def batch_size_of(settings: TrainSettings, before: int, processes: int) -> int:
    """``batch_size`` with which ``processes`` take as many samples a step as the ``before`` of a checkpoint did."""
    samples = settings.batch_size * before
    if samples % processes:
        raise TrainingError(
            f"the run was begun by {before} processes with --batch_size={settings.batch_size}, {samples} samples together, "
            f"which {processes} processes cannot share equally; resume with another number of them"
        )
    if processes != before:
        logger.warning(
            "processes: %d now, %d at the checkpoint: batch_size is %d now, for as many samples a step",
            processes, before, samples // processes,
        )  # fmt: skip
    return samples // processes
