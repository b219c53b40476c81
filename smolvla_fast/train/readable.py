"""Frames that cannot be read, told by file, episode and frame, from the process that read them to the one that trains.

An error that crosses from a worker becomes a long text with its traceback in it. So a worker hands a sentence over as its
batch, and the error is raised where batches are used.
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


@dataclass
class Unreadable:
    """In the place of a frame or batch: what is wrong with it."""

    message: str


class Readable(Dataset):
    """A ``LeRobotDataset`` whose frames are what it gives, or ``Unreadable``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        try:
            return self.dataset[row]
        except Exception as error:  # of PIL, PyAV, torchcodec, pyarrow, datasets and LeRobot
            return Unreadable(describe(self.dataset, row, error))


@dataclass
class Collate:
    """Frames to a batch by ``collate`` (None: torch's own), or the first of them that is ``Unreadable``."""

    collate: Callable[[list[Any]], Any] | None

    def __call__(self, frames: list[Any]) -> Any:
        for frame in frames:
            if isinstance(frame, Unreadable):
                return frame
        try:
            return (self.collate or default_collate)(frames)
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


class Batches:
    """The batches of a ``DataLoader`` over ``Readable`` frames.

    raises  TrainingError for a frame that cannot be read, or a worker that died
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if died := worker_died(error):
                    raise died from error
                raise
            if isinstance(batch, Unreadable):
                raise TrainingError(batch.message)
            yield batch


def worker_died(error: BaseException) -> TrainingError | None:
    """For torch's error of a worker that died, which comes by a signal and so in the midst of anything; None for others."""
    if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error):
        return None
    return TrainingError(
        f"a process that reads data died ({first_line(error)}), often for want of memory; go on with --resume=true and a "
        "smaller --num_workers, 0 reads in the process that trains"
    )


def describe(dataset: Any, row: int, error: Exception) -> str:
    """Where the frame is that cannot be read, why not, and what to do."""
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
    """The camera that fails by itself, the file it is read from and its error."""
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
    """By how much a video has no frame for a time, and the tolerance that takes it: at half a frame it is another's."""
    found = re.search(r"\(tensor\(\[([^\]]+)\]", str(error))
    off = max(map(float, found[1].split(","))) if found else math.inf
    near = f"the nearest frame is off by {off:.3g} s, --tolerance_s={tolerance:g} allows less"
    if off < 0.5 / fps:
        return f"{near}; give --tolerance_s={math.ceil(off * 1100) / 1000:g}"
    return f"{near if found else 'it has no frame there'}; the video does not fit the data, {AGAIN}"
