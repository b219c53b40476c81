"""From a LeRobotDataset to batches: opened, compared with the configuration, looked through, dealt out in a known order."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..smolvla import FeatureType, NormalizationMode, PolicyFeature, SmolVLAConfig
from ..smolvla.features import ACTION, OBS_STATE
from ..smolvla.normalization import statistics_fault
from .dataset_files import check_backend, check_files, find_fault, first_line
from .errors import TrainingError
from .readable import Batches, Collate, Readable
from .settings import TrainSettings

logger = logging.getLogger(__name__)


@dataclass
class Data:
    """What a run reads.

    train, held_out  ``LeRobotDataset`` with ``delta_timestamps``; held_out is None without ``dataset.eval_split``
    """

    train: Any
    held_out: Any | None

    @property
    def meta(self) -> Any:
        return self.train.meta


def open_data(settings: TrainSettings) -> Data:
    """Opens the dataset, fills ``settings.policy``'s features from it where they are empty, and checks both.

    raises  TrainingError: no LeRobot, no such dataset, another camera or size than the policy's, missing statistics,
            values that are not finite
    """
    LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps = _lerobot()
    from .reader import read_by_column

    wanted, policy = settings.dataset, settings.policy
    where = dict(root=wanted.root, revision=wanted.revision)
    try:
        meta = LeRobotDatasetMetadata(wanted.repo_id, **where)
        # PyAV is named for a dataset without videos, which need no decoder: choosing one loads FFmpeg, or says at length
        # that it cannot.
        check_backend(wanted.video_backend, bool(meta.video_keys))
        backend = wanted.video_backend or (None if meta.video_keys else "pyav")
        train_episodes, eval_episodes = split_episodes(settings, meta)

        def read(episodes: list[int] | None) -> Any:
            return LeRobotDataset(
                wanted.repo_id, **where, episodes=episodes, video_backend=backend, tolerance_s=settings.tolerance_s,
                delta_timestamps=resolve_delta_timestamps(policy, meta), return_uint8=True,
            )  # fmt: skip

        fill_features(policy, meta.features, settings.rename_map)
        check_statistics(policy, meta.stats, settings.rename_map)
        data = Data(read(train_episodes), read(eval_episodes) if eval_episodes else None)
        for part in filter(None, (data.train, data.held_out)):
            check_files(part)
            check_values(part)
            read_by_column(part)
            if wanted.use_imagenet_stats:
                _take_imagenet_stats(part.meta)
    except TrainingError:
        raise
    except Exception as error:
        # The Hub, datasets, pyarrow and LeRobot each raise errors of their own.
        raise TrainingError(_not_opened(settings, error)) from error
    return data


def _not_opened(settings: TrainSettings, error: Exception) -> str:
    from lerobot.utils.constants import HF_LEROBOT_HOME

    wanted = settings.dataset
    root = Path(wanted.root or HF_LEROBOT_HOME / wanted.repo_id).expanduser()
    # Where a file is missing LeRobot asks the Hub for it, so its error may be of the network.
    fault = find_fault(root, wanted.episodes) if wanted.root or root.is_dir() else None
    return (
        f"cannot open the dataset {wanted.repo_id} ({wanted.root or 'no --dataset.root'}): "
        + (f"in {root}, {fault}" if fault else first_line(error))
        + ". Accepted is the Hub id of a LeRobotDataset v3.0, or its folder (the one that holds meta/) as --dataset.root"
    )


def _lerobot() -> tuple[Any, Any, Any]:
    try:
        from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps
    except ImportError as error:
        raise TrainingError(
            f"LeRobot 0.6's datasets are needed to train and cannot be imported ({error}); on Python 3.12 or later run "
            '`pip install "smolvla_fast[train]"`'
        ) from error
    return LeRobotDataset, LeRobotDatasetMetadata, resolve_delta_timestamps


def split_episodes(settings: TrainSettings, meta: Any) -> tuple[list[int] | None, list[int]]:
    """Episodes to learn from (None: all) and to hold out: of each task the last ``ceil(n * eval_split)``, as in LeRobot."""
    chosen = settings.dataset.episodes
    unknown = [index for index in chosen or [] if not 0 <= index < meta.total_episodes]
    if unknown:
        raise TrainingError(
            f"dataset.episodes={chosen}: the dataset has episodes 0 to {meta.total_episodes - 1}, not {unknown}"
        )
    if not settings.dataset.eval_split:
        return chosen, []
    by_task: dict[str, list[int]] = {}
    for index in chosen if chosen is not None else range(meta.total_episodes):
        by_task.setdefault((meta.episodes["tasks"][index] or [""])[0], []).append(index)
    train: list[int] = []
    held_out: list[int] = []
    for episodes in by_task.values():
        kept = len(episodes) - math.ceil(len(episodes) * settings.dataset.eval_split)
        train += episodes[:kept]
        held_out += episodes[kept:]
    if not train:
        raise TrainingError(
            f"dataset.eval_split={settings.dataset.eval_split} leaves no episode to learn from; give a smaller share"
        )
    return train, held_out


def fill_features(config: SmolVLAConfig, features: dict[str, Any], rename_map: dict[str, str]) -> None:
    """Takes empty ``input_features`` and ``output_features`` from the dataset; what is declared is compared with it."""
    found = policy_features(features, rename_map)
    if not config.output_features:
        config.output_features = {k: f for k, f in found.items() if f.type is FeatureType.ACTION}
    if not config.input_features:
        config.input_features = {k: f for k, f in found.items() if f.type is not FeatureType.ACTION}
    cameras = [key for key, feature in found.items() if feature.type is FeatureType.VISUAL]
    expected = [key for key in config.image_features if "empty_camera" not in key]
    missing = [key for key in expected if key not in found]
    if not cameras:
        raise TrainingError(
            f"the dataset has no camera, SmolVLA needs at least one; its features are {sorted(found)}"
        )
    left_out = missing[config.empty_cameras :]
    if left_out and rename_map and set(cameras) <= set(expected):
        # Each of the dataset's cameras has been given its place. LeRobot trains so too, and leaves the others out.
        logger.warning(
            "the dataset lacks the cameras %s of the policy, which is trained without them; --policy.empty_cameras=%d puts "
            "masked blank frames in their place",
            left_out, len(missing),
        )  # fmt: skip
    elif left_out:
        raise TrainingError(
            f"the dataset lacks the cameras {missing} of the policy; it has {cameras}. Give --rename_map "
            f'\'{{"{cameras[0]}": "{missing[0]}"}}\' if cameras have other names (with each of '
            f"them renamed, the policy is trained without the rest), --policy.empty_cameras={len(missing)} to "
            "train with blank frames in their place, or --policy.input_features=null to take the dataset's features"
        )
    for key, declared, limit in (
        (ACTION, config.action_feature, "max_action_dim"),
        (OBS_STATE, config.robot_state_feature, "max_state_dim"),
    ):
        if key not in found:
            raise TrainingError(
                f"the dataset has no {key!r}, which SmolVLA learns from; it has {sorted(found)}"
            )
        size = found[key].shape[0]
        if declared is not None and declared.shape[0] != size:
            field = "output_features" if key == ACTION else "input_features"
            raise TrainingError(
                f"{key!r} has {size} values in the dataset and {declared.shape[0]} in the policy's configuration. To train "
                f"for another robot than the checkpoint's, give --policy.{field}=null, which takes the dataset's features"
            )
        if size > getattr(config, limit):
            raise TrainingError(
                f"{key!r} has {size} values in the dataset, the policy accepts at most {limit}={getattr(config, limit)}; "
                f"give --policy.{limit}={size} (fresh weights only)"
            )


def policy_features(features: dict[str, Any], rename_map: dict[str, str]) -> dict[str, PolicyFeature]:
    """The dataset's features as a policy has them: cameras as (channels, height, width), names after ``rename_map``."""
    from lerobot.utils.feature_utils import dataset_to_policy_features

    return {
        rename_map.get(key, key): PolicyFeature(FeatureType(feature.type.value), tuple(feature.shape))
        for key, feature in dataset_to_policy_features(features).items()
    }


def check_statistics(config: SmolVLAConfig, stats: dict[str, Any] | None, rename_map: dict[str, str]) -> None:
    """TrainingError unless every feature that is normalised has finite statistics of its size."""
    names = {new: old for old, new in rename_map.items()}
    for key, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or "empty_camera" in key:
            continue
        fault = statistics_fault(names.get(key, key), feature, mode, stats)
        if fault:
            raise TrainingError(
                f"meta/stats.json: {fault}; normalisation {mode.value} of {key!r} needs it. Compute it with "
                "`lerobot-edit-dataset --operation.type recompute_stats` (see its --help), or switch normalisation off "
                "with --policy.normalization_mapping"
            )


def check_values(dataset: Any) -> None:
    """TrainingError for the first state or action with NaN or infinity. One pass over the columns, without the images."""
    from .reader import numbers

    for key in (OBS_STATE, ACTION):
        values = numbers(dataset.hf_dataset, key).flatten(1)
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            episode, frame = (
                dataset.hf_dataset.data.column(name)[row].as_py() for name in ("episode_index", "frame_index")
            )
            raise TrainingError(
                f"{key!r} is {values[row, column].item()} at frame {frame} of episode {episode} (value {column}), and "
                f"{len(bad[:, 0].unique())} frames have such values. Repair the recording, or leave the episodes out with "
                "--dataset.episodes"
            )


def _take_imagenet_stats(meta: Any) -> None:
    from lerobot.utils.constants import IMAGENET_STATS

    for key in set(meta.camera_keys) & set(meta.stats or {}):
        meta.stats[key].update(
            {name: torch.tensor(v, dtype=torch.float32) for name, v in IMAGENET_STATS.items()}
        )


def training_batches(settings: TrainSettings, dataset: Any, first: int) -> Iterator[dict[str, Any]]:
    """Batches for ever, epoch after epoch, each epoch in an order that seed and its number decide.

    first  how many batches are left out: those that the run saw before it was stopped
    """
    from lerobot.datasets import EpisodeAwareSampler

    sampler = EpisodeAwareSampler(
        dataset.meta.episodes["dataset_from_index"],
        dataset.meta.episodes["dataset_to_index"],
        episode_indices_to_use=dataset.episodes,
        shuffle=True,
        seed=settings.seed or 0,
        absolute_to_relative_idx=dataset.absolute_to_relative_idx,
    )
    epoch, batches = divmod(first, math.ceil(len(sampler) / settings.batch_size))
    sampler.load_state_dict({"epoch": epoch, "start_index": batches * settings.batch_size})
    loader = _loader(settings, Readable(dataset), dataset.meta, sampler=sampler)
    while True:
        yield from loader


def held_out_batches(settings: TrainSettings, dataset: Any) -> Batches:
    """Batches of the held-out frames in order; of more than ``max_eval_samples`` frames that many, evenly spread."""
    count, most = len(dataset), settings.max_eval_samples
    chosen = (
        np.linspace(0, count - 1, most).round().astype(int).tolist() if 0 < most < count else range(count)
    )
    return _loader(settings, Subset(Readable(dataset), chosen), dataset.meta)


def _loader(settings: TrainSettings, dataset: Any, meta: Any, **options: Any) -> Batches:
    from lerobot.utils.collate import lerobot_collate_fn

    workers = settings.num_workers
    if workers:
        options |= dict(persistent_workers=True, prefetch_factor=4)
        if meta.video_keys:
            options["multiprocessing_context"] = "spawn"  # decoders do not survive a fork
    loader = DataLoader(
        dataset,
        batch_size=settings.batch_size,
        num_workers=workers,
        pin_memory=torch.device(settings.policy.device or "cpu").type == "cuda",
        collate_fn=Collate(lerobot_collate_fn if meta.has_language_columns else None),
        # Its own, or every epoch would take a number from the generator that noise is drawn from.
        generator=torch.Generator().manual_seed(settings.seed or 0),
        **options,
    )
    return Batches(loader)


def to_floats(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Camera frames of bytes to the device, a quarter of the traffic, and there to fp32 in [0, 1]."""

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype is not torch.uint8:
            return value
        return value.to(device, non_blocking=True).to(torch.float32) / 255.0

    return {key: convert(value) for key, value in batch.items()}
