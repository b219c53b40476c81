"""Opens a LeRobotDataset, checks it against the configuration, and reads batches from it in a reproducible order."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from ..smolvla import NormalizationMode, SmolVLAConfig
from ..smolvla.features import ACTION, OBS_PREFIX, OBS_STATE
from ..smolvla.normalization import statistics_fault
from .dataset_files import check_backend, check_files, not_opened, place_of
from .errors import TrainingError
from .features import fill_features, policy_names
from .readable import Collate, Readable
from .settings import TrainSettings

logger = logging.getLogger(__name__)
IDENTITY = NormalizationMode.IDENTITY


@dataclass
class Data:
    """The datasets of a run.

    train, held_out  ``LeRobotDataset`` with ``delta_timestamps``; held_out is None without ``dataset.eval_split``
    names            {name in the dataset: name in the policy}
    """

    train: Any
    held_out: Any | None
    names: dict[str, str]

    @property
    def stats(self) -> dict[str, Any]:
        """The dataset's numeric statistics, under the policy's names."""
        return {
            self.names[key]: {n: v for n, v in entry.items() if np.asarray(v).dtype.kind in "biuf"}
            for key, entry in (self.train.meta.stats or {}).items()
            if key in self.names and isinstance(entry, Mapping)
        }


def open_data(settings: TrainSettings) -> Data:
    """Opens the dataset, fills empty features of ``settings.policy`` from it, and checks both.

    raises  TrainingError: no such dataset, another camera or size than the policy's, missing statistics,
            values that are not finite; ImportError without LeRobot 0.6
    """
    from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps

    from .reader import read_by_column

    wanted, policy = settings.dataset, settings.policy
    where = dict(root=wanted.root, revision=wanted.revision)
    try:
        meta = LeRobotDatasetMetadata(wanted.repo_id, **where)
        backend = check_backend(wanted.video_backend, bool(meta.video_keys))
        train_episodes, eval_episodes = split_episodes(settings, meta)
        names = policy_names(meta.features, settings.rename_map)
        fill_features(settings, meta.features, names)
        read = partial(
            LeRobotDataset, wanted.repo_id, **where, video_backend=backend, tolerance_s=settings.tolerance_s,
            delta_timestamps=resolve_delta_timestamps(policy, meta), return_uint8=True,
        )  # fmt: skip
        held_out = read(episodes=eval_episodes) if eval_episodes else None
        data = Data(read(episodes=train_episodes), held_out, names)
        for part in filter(None, (data.train, data.held_out)):
            check_files(part)
            check_values(part, names)
            read_by_column(part)
            if wanted.use_imagenet_stats:
                _take_imagenet_stats(part.meta)
        check_statistics(policy, meta.stats, names)
    except TrainingError:
        raise
    except Exception as error:
        # The Hub, datasets, pyarrow and LeRobot each raise their own.
        raise TrainingError(not_opened(wanted.repo_id, wanted.root, wanted.episodes, error)) from error
    return data


def split_episodes(settings: TrainSettings, meta: Any) -> tuple[list[int] | None, list[int]]:
    """Episodes to train on (None: all) and to hold out: the last ``ceil(n * eval_split)`` of each task, as in LeRobot."""
    chosen, share = settings.dataset.episodes, settings.dataset.eval_split
    if unknown := [index for index in chosen or [] if index >= meta.total_episodes]:
        last = meta.total_episodes - 1
        raise TrainingError(f"--dataset.episodes={chosen}: there are episodes 0 to {last}, not {unknown}")
    if not share:
        return chosen, []
    by_task: dict[str, list[int]] = {}
    for index in range(meta.total_episodes) if chosen is None else chosen:
        by_task.setdefault((meta.episodes["tasks"][index] or [""])[0], []).append(index)
    train, held_out = list[int](), list[int]()
    for episodes in by_task.values():
        kept = len(episodes) - math.ceil(len(episodes) * share)
        train += episodes[:kept]
        held_out += episodes[kept:]
    if not train:
        alone = all(len(episodes) == 1 for episodes in by_task.values())
        advice = "leave it out: no task has a second episode" if alone else "give a smaller share"
        raise TrainingError(f"--dataset.eval_split={share} leaves no episode to train on; {advice}")
    return train, held_out


def check_statistics(config: SmolVLAConfig, stats: dict[str, Any] | None, names: dict[str, str]) -> None:
    """TrainingError unless every normalised feature has finite statistics of its size; a warning for a renamed one."""
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for source, key in names.items():
        kind = features[key].type.value if key in features else ""
        if (mode := config.normalization_mapping.get(kind, IDENTITY)) is IDENTITY:
            continue
        if fault := statistics_fault(source, features[key], mode, stats, "meta/stats.json"):
            raise TrainingError(
                f"meta/stats.json: {fault}; normalisation {mode.value} of {key!r} needs it. Compute it with `lerobot-edit-"
                "dataset --operation.type recompute_stats`, or switch it off with --policy.normalization_mapping"
            )
        if key != source:
            logger.warning("%s, renamed, is normalised by its statistics; lerobot-train does not", source)


def check_values(dataset: Any, names: dict[str, str]) -> None:
    """TrainingError for an observation that is not numeric, and for the first state or action with NaN or infinity.

    Takes one pass over the columns, without the images.
    """
    from .reader import numbers

    for key, name in names.items():
        if key in dataset.meta.camera_keys or not (key == ACTION or key.startswith(OBS_PREFIX)):
            continue
        values = numbers(dataset.hf_dataset, key)
        if name not in (OBS_STATE, ACTION):  # SmolVLA does not read it
            continue
        values = values.reshape(len(values), -1)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise TrainingError(
                f"{key!r} is {values[row, column].item()} at {place_of(dataset, row)[1]} (value {column}), and "
                f"{len(bad[:, 0].unique())} frames have such values. Repair them, or leave them out with --dataset.episodes"
            )


def _take_imagenet_stats(meta: Any) -> None:
    from lerobot.utils.constants import IMAGENET_STATS

    imagenet = {name: torch.tensor(value, dtype=torch.float32) for name, value in IMAGENET_STATS.items()}
    for key in (set(meta.camera_keys) - set(meta.depth_keys)) & set(meta.stats or {}):
        own = meta.stats[key] if isinstance(meta.stats[key], Mapping) else {}
        meta.stats[key] = {**own, **imagenet}


class Shares:
    """The part of each batch that one process reads, as a ``batch_sampler``: together they read the batches of one process
    with a batch as large as theirs together.

    place  this process's number, and how many there are
    """

    def __init__(self, rows: Any, size: int, place: tuple[int, int]) -> None:
        self.batches, self.place = BatchSampler(rows, size * place[1], drop_last=False), place

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            # Every process takes part in every step: one without a share reads a frame that counts nothing.
            yield rows[share(len(rows), self.place)] or rows[:1]


def share(count: int, place: tuple[int, int]) -> slice:
    """Which of ``count`` samples belong to the process at ``place``."""
    index, processes = place
    return slice(count * index // processes, count * (index + 1) // processes)


def frames_of(settings: TrainSettings, frames: int, number: int, processes: int) -> int:
    """Samples of batch ``number`` over all processes: as many as fit, or the rest of ``frames`` that ends an epoch."""
    size = settings.batch_size * processes
    return min(size, frames - number % math.ceil(frames / size) * size)


def training_batches(
    settings: TrainSettings, dataset: Any, first: int, place: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, Any]]:
    """Endless batches, in an order per epoch that seed and epoch number decide.

    first  number of batches to skip: those that a resumed run has seen
    place  as of ``Shares``
    """
    from lerobot.datasets import EpisodeAwareSampler

    sampler = EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"], dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes, shuffle=True, seed=settings.seed or 0,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )  # fmt: skip
    size = settings.batch_size * place[1]
    epoch, batches = divmod(first, math.ceil(len(sampler) / size))
    sampler.load_state_dict({"epoch": epoch, "start_index": batches * size})
    loader = loader_of(settings, dataset, Shares(sampler, settings.batch_size, place))
    while True:
        yield from loader


def few_samples(settings: TrainSettings, dataset: Any) -> dict[str, Any]:
    """The first and the last frame as a batch, read in this process."""
    rows = [[0, len(dataset) - 1]]
    return next(iter(loader_of(replace(settings, num_workers=0), dataset, rows)))


def held_out_batches(
    settings: TrainSettings, dataset: Any, place: tuple[int, int] = (0, 1)
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batches of the held-out frames in order, all or ``max_eval_samples`` of them evenly spread, each behind how many
    frames all processes read for it."""
    count = min(len(dataset), settings.max_eval_samples or len(dataset))
    rows = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    loader = loader_of(settings, dataset, Shares(rows, settings.batch_size, place))
    for number, raw in enumerate(loader):
        yield frames_of(settings, count, number, place[1]), raw


def loader_of(settings: TrainSettings, dataset: Any, batches: Any) -> DataLoader:
    from lerobot.utils.collate import lerobot_collate_fn

    workers = settings.num_workers
    return DataLoader(
        Readable(dataset),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        # Video decoders do not survive a fork.
        multiprocessing_context="spawn" if workers and dataset.meta.video_keys else None,
        pin_memory=torch.device(settings.policy.device or "cpu").type == "cuda",
        collate_fn=Collate(lerobot_collate_fn if dataset.meta.has_language_columns else None),
        # Without a generator of its own, every epoch would take a number from the one that draws noise.
        generator=torch.Generator().manual_seed(settings.seed or 0),
    )


def to_floats(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Moves uint8 camera frames to the device, a quarter of fp32's traffic, and converts them there to fp32 in [0, 1]."""
    frames = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.dtype is torch.uint8}
    floats = {k: v.to(device, non_blocking=True).to(torch.float32) / 255.0 for k, v in frames.items()}
    return {**batch, **floats}
