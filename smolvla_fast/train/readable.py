"""Names the file, episode and frame that cannot be read, across worker processes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, default_collate

from .dataset_files import AGAIN, file_fault, other_backend, place_of
from .errors import TrainingError, root_cause

KNOWN, TOKENS = "image_tokens_known", "image_tokens"
"""Of a sample, bool and [C, tokens, M]; of a batch [B] and, for those that are known, [known, C, tokens, M]."""


class Unreadable(TrainingError):
    """A frame or batch cannot be read. Of the traceback, as which a ``DataLoader`` raises a worker's error anew, the last
    part is kept: the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class Readable(Dataset):
    """A ``LeRobotDataset`` that raises ``Unreadable`` for a frame that cannot be read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:  # of PIL, PyAV, torchcodec, pyarrow, datasets or LeRobot
            raise Unreadable(describe(self.dataset, row, error)) from error


@dataclass
class Collate:
    """Frames to a batch by ``collate`` (None: torch's own). Raises ``Unreadable`` for frames that do not fit together.

    What some frames alone have, as images those that are not ``KNOWN``, is collated of these.
    """

    collate: Callable[[list[Any]], Any] | None

    def __call__(self, frames: list[Any]) -> Any:
        try:
            shared = set.intersection(*map(set, frames))
            all_have = [{key: frame[key] for key in frame if key in shared} for frame in frames]
            batch = (self.collate or default_collate)(all_have)
            for key in sorted(set().union(*frames) - shared):
                batch[key] = default_collate([frame[key] for frame in frames if key in frame])
            return batch
        except Exception as error:
            numbers = [(int(frame["frame_index"]), int(frame["episode_index"])) for frame in frames]
            places = ", ".join(f"{frame} of episode {episode}" for frame, episode in numbers)
            unlike = []
            for key in frames[0]:
                shapes = {str(list(frame[key].shape)) for frame in frames if hasattr(frame.get(key), "shape")}
                unlike += [f"{key} of {' and '.join(sorted(shapes))}"] if len(shapes) > 1 else []
            raise Unreadable(
                f"the frames {places} make no batch: {', '.join(unlike) or root_cause(error)}; {AGAIN}, or leave episodes "
                "out with --dataset.episodes"
            ) from error


def describe(dataset: Any, row: int, error: Exception) -> str:
    """The message for a frame that cannot be read: where it is, why, and what to do."""
    meta, (episode, place) = dataset.meta, place_of(dataset, row)
    key, name, error = _culprit(dataset, row, episode, error)
    what = f"{key or 'a value'} at {place} cannot be read from {name} in {meta.root}"
    leave_out = f"leave episode {episode} out with --dataset.episodes"
    if fault := file_fault(meta.root / name):
        return f"{what}: it {fault}; {AGAIN}, or {leave_out}"
    if type(error).__name__ == "FrameTimestampError":
        return f"{what}: {_off(error, meta.fps, dataset.tolerance_s)}, or {leave_out}"
    other = other_backend(getattr(dataset.reader, "_video_backend", None)) if key in meta.video_keys else None
    decoder = f", try --dataset.video_backend={other}" if other else ""
    return f"{what} ({root_cause(error)}); {AGAIN}{decoder}, or {leave_out}"


def _culprit(dataset: Any, row: int, episode: int, error: Exception) -> tuple[str | None, Path, Exception]:
    """The first camera that fails when read alone, its file and its error; None and the data file without one."""
    meta, data = dataset.meta, dataset.meta.get_data_file_path(episode)
    time = float(dataset.hf_dataset.data.column("timestamp")[row].as_py())
    for key in meta.camera_keys:
        try:
            if key in meta.image_keys:
                dataset.hf_dataset.select_columns([key])[row]
            else:
                dataset.reader._query_videos({key: [time]}, episode)
        except Exception as own:
            return key, data if key in meta.image_keys else meta.get_video_file_path(episode, key), own
    return None, data, error


def _off(error: Exception, fps: float, tolerance: float) -> str:
    """How far a time is from the video's nearest frame, and the tolerance that accepts it, below half a frame's time."""
    found = re.search(r"\(tensor\(\[([^\]]+)\]", str(error))
    off = max(map(float, found[1].split(","))) if found else math.inf
    near = f"the nearest frame is off by {off:.3g} s, --tolerance_s={tolerance:g} allows less"
    if off < 0.5 / fps:
        return f"{near}; give --tolerance_s={math.ceil(off * 1100) / 1000:g}"
    return f"{near if found else 'it has no frame there'}; the video does not fit the data, {AGAIN}"
