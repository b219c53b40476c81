"""Finds which file of a LeRobotDataset v3.0 on this machine is missing, cut off or garbage.

meta/info.json, stats.json, tasks.parquet, episodes/chunk-000/file-000.parquet
data/chunk-000/file-000.parquet         videos/CAMERA/chunk-000/file-000.mp4
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np

from .errors import TrainingError, root_cause

INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
AGAIN = "download or copy the dataset again"


def place_of(dataset: Any, row: int) -> tuple[int, str]:
    """The episode of a row of an open ``LeRobotDataset``, and the row in words: ``frame 3 of episode 1``."""
    columns = dataset.hf_dataset.data
    episode, frame = (int(columns.column(f"{name}_index")[row].as_py()) for name in ("episode", "frame"))
    return episode, f"frame {frame} of episode {episode}"


def check_backend(name: str | None, videos: bool) -> str | None:
    """What to open a dataset with. TrainingError for a decoder that cannot be loaded, where there are videos to decode."""
    if name == "torchcodec" and videos:
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise TrainingError(
                f"dataset.video_backend=torchcodec cannot be loaded ({root_cause(error)}); give "
                "--dataset.video_backend=pyav, or install torchcodec and FFmpeg, whose libraries it loads"
            ) from error
    # Without videos any decoder will do; left to choose, LeRobot tries to load FFmpeg and fails at length.
    return name or (None if videos else "pyav")


def other_backend(name: str | None) -> str | None:
    """A decoder other than ``name`` that can be loaded here, if there is one."""
    other = "pyav" if name == "torchcodec" else "torchcodec"
    with suppress(TrainingError):
        check_backend(other, videos=True)
        return other
    return None


def not_opened(repo_id: str, root: str | None, episodes: list[int] | None, error: Exception) -> str:
    """The message for a dataset that LeRobot cannot open: the first fault of its files, or ``error``, and what to do."""
    from lerobot.utils.constants import HF_LEROBOT_HOME

    folder, fault = Path(root or HF_LEROBOT_HOME / repo_id), root_cause(error)
    # LeRobot asks the Hub for a missing file, so its own error may be one of the network.
    if root or folder.is_dir():
        try:
            fault = next((f"in {folder}, {found}" for found in _faults(folder, episodes)), fault)
        except Exception as unlike:  # a file may hold values of any type where a dataset has another
            where = getattr(unlike, "filename", None) or f"the files in {folder}"
            fault = f"{where} cannot be read, or not together ({root_cause(unlike)}); {AGAIN}"
    return (
        f"cannot open the dataset {repo_id} ({root or 'no --dataset.root'}): {fault}. Accepted is the Hub id of a "
        "LeRobotDataset v3.0, or its folder (the one that holds meta/) as --dataset.root"
    )


def _faults(root: Path, episodes: list[int] | None) -> Iterator[str]:
    from lerobot.datasets import LeRobotDatasetMetadata, io_utils
    from packaging.version import parse

    if not root.is_dir():
        yield "it is no folder" if root.exists() else "there is no such folder"
    elif not (root / INFO).exists():
        held = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        yield f"{INFO} is missing, so it is not known to be a LeRobotDataset; it holds {held}"
    yield from _unread(root, INFO, lambda root: parse(io_utils.load_info(root).codebase_version))
    info = io_utils.load_info(root)
    if (major := parse(info.codebase_version).major) != 3:
        command = f"python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id=ID --root={root} --push-to-hub=false"
        way = f"convert it with `{command}`" if major < 3 else "install a newer LeRobot"
        yield f"it is a LeRobotDataset {info.codebase_version}, and v3.0 is read; {way}"
    if info.total_episodes < 1:
        yield f"{INFO} says that it has no episodes; record some"
    yield from _unread(root, TASKS, io_utils.load_tasks)
    yield from _unread(root, STATS, io_utils.load_stats)
    yield from _unread_tables(root, EPISODES)
    # All that it reads is there, so that it does not ask the Hub.
    meta = LeRobotDatasetMetadata("local/dataset", root)
    if len(meta.episodes) != meta.total_episodes:
        yield f"{EPISODES} describes {len(meta.episodes)} episodes and {INFO} {meta.total_episodes}; {AGAIN}"
    yield from _undeclared(meta.features)
    yield from _missing_files(meta, range(meta.total_episodes) if episodes is None else episodes)
    yield from _unread_tables(root, "data", meta.features)


def files_of(meta: Any, episodes: Iterable[int]) -> dict[Path, list[int]]:
    """The files of data and video, below ``meta.root``, that hold these episodes, each with those that it holds."""
    files: dict[Path, list[int]] = {}
    for index in episodes:
        videos = [meta.get_video_file_path(index, key) for key in meta.video_keys]
        for path in (meta.get_data_file_path(index), *videos):
            files.setdefault(path, []).append(index)
    return files


def _missing_files(meta: Any, episodes: Iterable[int]) -> Iterator[str]:
    """Faults of the files of these episodes that show without reading them."""
    for path, held in sorted(files_of(meta, episodes).items()):
        if fault := file_fault(meta.root / path):
            way = f"{AGAIN}, or leave them out with --dataset.episodes"
            which = shorten(
                f"episode{'s' if held[1:] else ''} {', '.join(map(str, held))}", 80, placeholder=" ..."
            )
            yield f"{path} of {which} {fault}; {way if len(held) < meta.total_episodes else AGAIN}"


def _undeclared(features: dict[str, Any]) -> Iterator[str]:
    """Faults of the declared features that show without the data."""
    for key, feature in features.items():
        camera = feature.get("dtype") in ("image", "video")
        examples = {"shape": [480, 640, 3] if camera else [6], "names": ["height", "width", "channels"]}
        for what, example in examples.items() if camera else [("shape", [6])]:
            value = feature.get(what)
            if not isinstance(value, (list, tuple)) or not value or (camera and len(value) != 3):
                which = f"{'the camera ' if camera else ''}{key!r}"
                accepted = f"accepted is a list such as {json.dumps(example)}"
                yield f"{INFO} has {what} {json.dumps(value)} for {which}; {accepted}"


def _unread(root: Path, name: str, read: Callable[[Path], Any]) -> Iterator[str]:
    """The fault of the file ``name`` that ``read`` reads, if there is one."""
    try:
        read(root)
    except Exception as error:  # of json, pandas, pyarrow, datasets and LeRobot
        state = f"cannot be read ({root_cause(error)})" if (root / name).exists() else "is missing"
        yield f"{name} {state}; {AGAIN}"


def _unread_tables(root: Path, folder: str, features: dict[str, Any] | None = None) -> Iterator[str]:
    """Faults of all parquet files of a folder: LeRobot reads every one, whichever episodes are wanted.

    features  as they are declared, where the files hold them
    """
    from pyarrow.parquet import ParquetFile

    paths = sorted((root / folder).glob("*/*.parquet"))
    if not paths:
        yield f"{folder}/chunk-*/file-*.parquet is missing; {AGAIN}"
    for path in paths:
        name = path.relative_to(root)
        try:
            table = ParquetFile(path).read()
        except Exception as error:
            yield f"{name} cannot be read ({root_cause(error)}); {AGAIN}"
            continue
        if not len(table):
            yield f"{name} holds no rows; {AGAIN}"
            continue
        for unlike in _unlike(table, features or {}):
            yield f"{name} does not fit {INFO}: {unlike}; mend {INFO}, or {AGAIN}"


def _unlike(table: Any, features: dict[str, Any]) -> Iterator[str]:
    """Features that a table lacks, or holds in another shape than is declared."""
    for key, feature in features.items():
        if feature["dtype"] != "video" and key not in table.column_names:
            yield f"the column {key!r} is missing, there are {table.column_names}"
        elif feature["dtype"] not in ("video", "image", "string", "language"):
            found = list(np.shape(table[key][0].as_py())) or [1]  # LeRobot declares a single number as [1]
            if list(feature["shape"]) != found:
                yield f"{key!r} has the shape {list(feature['shape'])} there and {found} in the data"


def file_fault(path: Path) -> str | None:
    """The fault of a file that shows without decoding it; None where there is none."""
    import av

    try:
        if not path.exists():
            return "is missing"
        if path.suffix != ".mp4":
            return None
        with av.open(str(path)) as container:
            if not container.streams.video:
                return "has no video in it"
            stream = container.streams.video[0]
            container.seek(stream.duration or 0, stream=stream)
            last = [packet for packet in container.demux(stream) if packet.size][-1:]
        return None if last and not last[0].is_corrupt else f"is cut off at {path.stat().st_size} bytes"
    except (OSError, av.FFmpegError) as error:
        return f"cannot be read ({root_cause(error)})"


def check_files(dataset: Any) -> None:
    """TrainingError unless an open ``LeRobotDataset`` has every row of its episodes, and whole videos."""
    chosen = sorted(range(dataset.meta.total_episodes) if dataset.episodes is None else dataset.episodes)
    for fault in chain(_rows(dataset, chosen), _nulls(dataset), _missing_files(dataset.meta, chosen)):
        raise TrainingError(f"in {dataset.meta.root}, {fault}")


def _rows(dataset: Any, chosen: list[int]) -> Iterator[str]:
    """Rows of the chosen episodes that are not those that the metadata declare, and tasks that are not declared."""
    meta, columns = dataset.meta, dataset.hf_dataset.data
    begins, ends = (np.asarray(meta.episodes[f"dataset_{side}_index"]) for side in ("from", "to"))
    found = columns.column("index").to_numpy()
    rows = np.sort(found)
    wanted = np.concatenate([np.arange(begins[index], ends[index]) for index in chosen])
    if not np.array_equal(rows, wanted) or (dataset.episodes is None and found[0] != 0):
        counts, declared = np.searchsorted(rows, ends) - np.searchsorted(rows, begins), ends - begins
        episode = next((index for index in chosen if counts[index] != declared[index]), chosen[0])
        yield (
            f"{meta.get_data_file_path(episode)} does not hold what {EPISODES} says: episode {episode} has "
            f"{counts[episode]} rows instead of rows {begins[episode]} to {ends[episode] - 1} in this order; {AGAIN}"
        )
    tasks = columns.column("task_index").to_numpy()
    if tasks.min() < 0 or tasks.max() >= len(meta.tasks):
        yield f"{TASKS} has {len(meta.tasks)} tasks, the data names task {tasks.max()}; {AGAIN}"


def _nulls(dataset: Any) -> Iterator[str]:
    """A missing picture, and a column of nulls: what datasets reads where a file lacks the column."""
    meta, columns = dataset.meta, dataset.hf_dataset.data
    for key in sorted(set(columns.column_names) & set(meta.features) - set(meta.video_keys)):
        column = columns.column(key)
        if 0 < column.null_count == len(column):
            yield f"the column {key!r} that {INFO} declares is missing from its data, or empty; mend {INFO}, or {AGAIN}"
        elif column.null_count and key in meta.image_keys:
            episode, place = place_of(dataset, int(np.asarray(column.is_null()).argmax()))
            yield (
                f"{key} at {place} is null in {meta.get_data_file_path(episode)}, as {column.null_count} are; {AGAIN}, "
                "or leave such episodes out with --dataset.episodes"
            )
