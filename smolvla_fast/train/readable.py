"""Names the file, episode and frame that cannot be read, across worker processes.

A ``DataLoader`` turns a worker's error into a text with its traceback. So a worker returns the message in place of the
batch, and the training process raises it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from .dataset_files import AGAIN, first_line, other_backend, video_fault
from .errors import TrainingError

KNOWN, TOKENS = "image_tokens_known", "image_tokens"
"""Of a sample, bool and [C, tokens, M]; of a batch [B] and, for those that are known, [known, C, tokens, M]."""


@dataclass
class Unreadable:
    """Returned instead of a frame or batch that cannot be read."""

    message: str


class Readable(Dataset):
    """A ``LeRobotDataset`` that returns ``Unreadable`` where it would raise."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except (
            Exception
        ) as error:  # PIL, PyAV, torchcodec, pyarrow, datasets and LeRobot each raise their own
            return Unreadable(describe(self.dataset, row, error))


@dataclass
class Collate:
    """Frames to a batch by ``collate`` (None: torch's own), or to the first ``Unreadable`` among them.

    Where some frames are ``KNOWN``, images are those of the others, and tokens theirs.
    """

    collate: Callable[[list[Any]], Any] | None

    def __call__(self, frames: list[Any]) -> Any:
        for frame in frames:
            if isinstance(frame, Unreadable):
                return frame
        try:
            return self._collated(frames)
        except Exception as error:
            where = ", ".join(
                f"{int(frame['frame_index'])} of episode {int(frame['episode_index'])}" for frame in frames
            )
            shapes = {
                key: sorted(
                    {str(list(frame[key].shape)) for frame in frames if hasattr(frame.get(key), "shape")}
                )
                for key in frames[0]
            }
            unlike = ", ".join(
                f"{key} of {' and '.join(found)}" for key, found in shapes.items() if len(found) > 1
            )
            return Unreadable(
                f"the frames {where} make no batch: {unlike or first_line(error)}; {AGAIN}, or leave episodes out with "
                "--dataset.episodes"
            )

    def _collated(self, frames: list[dict[str, Any]]) -> dict[str, Any]:
        collate = self.collate or default_collate
        if KNOWN not in frames[0]:
            return collate(frames)
        shared = set.intersection(*map(set, frames))
        batch = collate([{key: frame[key] for key in frame if key in shared} for frame in frames])
        for known in (False, True):
            if own := [frame for frame in frames if frame[KNOWN] is known]:
                batch |= default_collate([{k: v for k, v in f.items() if k not in shared} for f in own])
        return batch


class Batches:
    """The batches of a ``DataLoader`` over ``Readable`` frames, as often as they are iterated over.

    raises  TrainingError for a frame or batch that cannot be read
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if isinstance(batch, Unreadable):
                raise TrainingError(batch.message)
            yield batch


def describe(dataset: Any, row: int, error: Exception) -> str:
    """The message for a frame that cannot be read: where it is, why, and what to do."""
    meta, columns = dataset.meta, dataset.hf_dataset.data
    episode, frame = (int(columns.column(name)[row].as_py()) for name in ("episode_index", "frame_index"))
    key, name, error = _culprit(dataset, row, episode, error)
    what = (
        f"{key or 'a value'} at frame {frame} of episode {episode} cannot be read from {name} in {meta.root}"
    )
    leave_out = f"leave episode {episode} out with --dataset.episodes"
    fault = video_fault(Path(meta.root) / name) if key in meta.video_keys else None
    if fault:
        return f"{what}: it {fault}; {AGAIN}, or {leave_out}"
    if type(error).__name__ == "FrameTimestampError":
        return f"{what}: {_off(error, meta.fps, dataset.tolerance_s)}, or {leave_out}"
    other = other_backend(getattr(dataset.reader, "_video_backend", None)) if key in meta.video_keys else None
    decoder = f", try --dataset.video_backend={other}" if other else ""
    return f"{what} ({first_line(error)}); {AGAIN}{decoder}, or {leave_out}"


def _culprit(dataset: Any, row: int, episode: int, error: Exception) -> tuple[str | None, str, Exception]:
    """The first camera that fails when read alone, its file and its error; None and the data file without one."""
    meta = dataset.meta
    for key in meta.image_keys:
        try:
            dataset.hf_dataset.select_columns([key])[row]
        except Exception as own:
            return key, str(meta.get_data_file_path(episode)), own
    time = float(dataset.hf_dataset.data.column("timestamp")[row].as_py())
    for key in meta.video_keys:
        try:
            dataset.reader._query_videos({key: [time]}, episode)
        except Exception as own:
            return key, str(meta.get_video_file_path(episode, key)), own
    return None, str(meta.get_data_file_path(episode)), error


def _off(error: Exception, fps: float, tolerance: float) -> str:
    """How far a time is from the video's nearest frame, and the tolerance that accepts it, below half a frame's time."""
    found = re.search(r"\(tensor\(\[([^\]]+)\]", str(error))
    off = max(map(float, found[1].split(","))) if found else math.inf
    near = f"the nearest frame is off by {off:.3g} s, --tolerance_s={tolerance:g} allows less"
    if off < 0.5 / fps:
        return f"{near}; give --tolerance_s={math.ceil(off * 1100) / 1000:g}"
    return f"{near if found else 'it has no frame there'}; the video does not fit the data, {AGAIN}"
