"""Fills --image_cache_dir with the image tokens of a dataset: training with it decodes none of its frames.

    smolvla-fast encode --dataset.repo_id=ME/PICK --policy.path=lerobot/smolvla_base --image_cache_dir=tokens
    smolvla-fast train  --dataset.repo_id=ME/PICK --policy.path=lerobot/smolvla_base --image_cache_dir=tokens ...

Takes the flags of `smolvla-fast train`. Started again, it goes on where it was stopped.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler
from tqdm import tqdm

from ..measure.console import CommandError, Console
from ..train.checkpoint import PRETRAINED
from ..train.data import Data, loader_of, open_data, to_floats
from ..train.errors import TrainingError
from ..train.first_step import try_step
from ..train.flags import read_settings
from ..train.known_frames import KnownFrames, kept, open_known_frames
from ..train.policy import check_policy, make_policy, make_processors, speed_up
from ..train.random_state import seeded
from ..train.readable import KNOWN
from ..train.settings import TrainSettings
from .train import add_arguments

__all__ = ["add_arguments", "run"]


def run(args: Any, console: Console) -> int:
    try:
        settings, checkpoint = read_settings(vars(args))
        if not settings.image_cache_dir:
            raise TrainingError("no --image_cache_dir: give the folder that is to hold the image tokens")
        with seeded(settings.seed):  # as a run, whose fresh weights depend on it
            encode(settings, checkpoint, console)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    return 0


def encode(settings: TrainSettings, checkpoint: Path | None, console: Console) -> None:
    source = checkpoint / PRETRAINED if checkpoint else settings.policy_path
    check_policy(settings)
    data = open_data(settings)
    policy = make_policy(settings, source)
    preprocess, _ = make_processors(settings, data.stats, source, checkpoint is not None)
    device = torch.device(settings.policy.device or "cpu")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)
    try_step(settings, data, policy, preprocess, autocast)
    _, path = speed_up(policy, settings)
    known, words = open_known_frames(settings, data, policy, preprocess, autocast)
    if known.store is None:
        learns = not settings.policy.train_expert_only
        way = (
            "; give --policy.train_expert_only=true, here and to train, which freezes both" if learns else ""
        )
        raise TrainingError(f"no image tokens can be kept: {path}{words}{way}")
    console.line(words.removeprefix(", "))
    begun = time.perf_counter()
    with autocast:
        new, frames = fill(settings, data, preprocess, known)
    took = timedelta(seconds=round(time.perf_counter() - begun))
    console.line(f"encoded {new:,} frames in {took}; {frames - new:,} were known")


def fill(settings: TrainSettings, data: Data, preprocess: Any, known: KnownFrames) -> tuple[int, int]:
    """Encodes what is not known. Returns how many frames that was, and of how many."""
    device, new = settings.policy.device or "cpu", 0
    parts = []
    for part in filter(None, (data.train, data.held_out)):
        index = part.hf_dataset.data.column("index").to_numpy()
        parts.append((part, np.flatnonzero(index < len(known.store)).tolist()))
    total = sum(len(rows) for _, rows in parts)
    with tqdm(total=total, unit="frame", disable=None, dynamic_ncols=True) as bar:
        for part, rows in parts:
            batches = BatchSampler(rows, settings.batch_size, drop_last=False)
            for raw in loader_of(settings, part, batches):
                if not raw[KNOWN].all():
                    known.tokens({**preprocess(to_floats(raw, device)), **kept(raw, device)})
                new += int((~raw[KNOWN]).sum())
                bar.update(len(raw[KNOWN]))
    return new, total
