"""Finds which file of a LeRobotDataset v3.0 on this machine is missing, cut off or garbage.

meta/info.json, stats.json, tasks.parquet, episodes/chunk-000/file-000.parquet
data/chunk-000/file-000.parquet         videos/CAMERA/chunk-000/file-000.mp4
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .errors import TrainingError

INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
AGAIN = "download or copy the dataset again"


def first_line(error: BaseException) -> str:
    """Type and first line of an error's root cause, for the libraries below write long messages.

    A line that ends in a colon takes the next one with it.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = next((index for index, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return f"{type(error).__name__}: {' '.join(lines[: more + 1])}" if lines else type(error).__name__


def spans(numbers: Iterable[int]) -> str:
    """``0 to 3, 7``"""
    inside = np.sort([*numbers])
    runs = np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1)
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def check_backend(name: str | None, videos: bool) -> None:
    """TrainingError for a decoder that cannot be loaded, where there are videos to decode."""
    if name == "torchcodec" and videos:
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            raise TrainingError(
                f"dataset.video_backend=torchcodec cannot be loaded ({first_line(error)}); give "
                "--dataset.video_backend=pyav, or install torchcodec and FFmpeg, whose libraries it loads"
            ) from error


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

    folder = Path(root or HF_LEROBOT_HOME / repo_id).expanduser()
    # LeRobot asks the Hub for a missing file, so its own error may be one of the network.
    fault = _find_fault(folder, episodes) if root or folder.is_dir() else None
    return (
        f"cannot open the dataset {repo_id} ({root or 'no --dataset.root'}): "
        + (f"in {folder}, {fault}" if fault else first_line(error))
        + ". Accepted is the Hub id of a LeRobotDataset v3.0, or its folder (the one that holds meta/) as --dataset.root"
    )


def _find_fault(root: Path, episodes: list[int] | None) -> str | None:
    try:
        return next(_faults(root, episodes), None)
    except OSError as error:
        return f"{error.filename or root} cannot be read ({first_line(error)})"
    except Exception as error:  # a file may hold values of any type where a dataset has another
        return f"its files do not fit together ({first_line(error)}); {AGAIN}"


def _faults(root: Path, episodes: list[int] | None) -> Iterator[str]:
    from lerobot.datasets import LeRobotDatasetMetadata, io_utils

    if not root.is_dir():
        yield "it is no folder" if root.exists() else "there is no such folder"
    elif not (root / INFO).exists():
        held = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        yield f"{INFO} is missing, so it is not known to be a LeRobotDataset; it holds {held}"
    yield from _read(root, INFO, lambda: _version(root))
    version, major = _version(root)
    convert = f"convert_dataset_v21_to_v30 --repo-id=ID --root={root} --push-to-hub=false"
    way = f"convert it with `python -m lerobot.scripts.{convert}`" if major < 3 else "install a newer LeRobot"
    if major != 3:
        yield f"it is a LeRobotDataset {version}, and v3.0 is read; {way}"
    yield from _read(root, INFO, lambda: io_utils.load_info(root))
    info = io_utils.load_info(root)
    if info.total_episodes < 1:
        yield f"{INFO} says that it has no episodes; record some"
    yield from _read(root, TASKS, lambda: io_utils.load_tasks(root))
    yield from _read(root, STATS, lambda: io_utils.load_stats(root))
    yield from _tables(root, EPISODES)
    yield from _read(root, EPISODES, lambda: io_utils.load_episodes(root))
    # All that it reads is there, so that it does not ask the Hub.
    meta = LeRobotDatasetMetadata("local/dataset", root)
    if len(meta.episodes) != meta.total_episodes:
        yield f"{EPISODES} describes {len(meta.episodes)} episodes and {INFO} {meta.total_episodes}; {AGAIN}"
    yield from _features(meta.features)
    yield from _missing_files(meta, range(meta.total_episodes) if episodes is None else episodes)
    yield from _tables(root, "data", meta.features)


def _missing_files(meta: Any, episodes: Iterable[int]) -> Iterator[str]:
    """Faults of the files of these episodes that show without reading them."""
    files: dict[Path, list[int]] = {}
    for index in episodes:
        videos = [meta.get_video_file_path(index, key) for key in meta.video_keys]
        for path in (meta.get_data_file_path(index), *videos):
            files.setdefault(path, []).append(index)
    for path, held_in in sorted(files.items()):
        exists = (meta.root / path).is_file()
        if (
            fault := video_fault(meta.root / path)
            if path.suffix == ".mp4"
            else None
            if exists
            else "is missing"
        ):
            which = f"episode{'s' if len(held_in) > 1 else ''} {spans(held_in)}"
            part = len(held_in) < meta.total_episodes
            leave_out = ", or leave them out with --dataset.episodes" if part else ""
            yield f"{path} of the {which} {fault}; {AGAIN}{leave_out}"


def _features(features: dict[str, Any]) -> Iterator[str]:
    """Faults of the declared features that show without the data."""
    for key, feature in features.items():
        camera = feature.get("dtype") in ("image", "video")
        examples = {"shape": "[480, 640, 3]" if camera else "[6]", "names": '["height", "width", "channels"]'}
        for what in ("shape", "names") if camera else ("shape",):
            value = feature.get(what)
            if not isinstance(value, (list, tuple)) or not value or (camera and len(value) != 3):
                yield (
                    f"{INFO} has {what} {json.dumps(value)} for {'the camera ' if camera else ''}{key!r}; accepted is a "
                    f"list such as {examples[what]}"
                )


def _columns(table: Any, features: dict[str, Any]) -> Iterator[str]:
    """Features that a table lacks, or holds in another shape than is declared."""
    for key, feature in features.items():
        dtype, declared = feature.get("dtype"), feature.get("shape")
        if dtype == "video":
            continue
        if key not in table.column_names:
            yield f"the column {key!r} is missing, there are {table.column_names}"
        elif dtype not in ("image", "string", "language"):
            try:
                _, found = flat_values(table.column(key))
            except ValueError:  # rows of several lengths, which `reader.numbers` refuses
                continue
            if list(declared) != (found or [1]):  # LeRobot declares a single number as [1]
                yield f"{key!r} has the shape {list(declared)} there and {found or 'of one number'} in the data"


def flat_values(column: Any) -> tuple[Any, list[int]]:
    """The numbers of a column of nested lists, and the shape of one row. ValueError for rows of several lengths."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(column.type, pa.BaseExtensionType):  # datasets keeps arrays of two and more dimensions so
        column = column.cast(column.type.storage_type)
    column, shape = column.combine_chunks(), []
    while pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        lengths = pc.list_value_length(column).unique().to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            raise ValueError(f"lists of the lengths {lengths}")
        shape += lengths
        column = column.flatten()
    return column, shape


def _version(root: Path) -> tuple[str, int]:
    version = str(json.loads((root / INFO).read_text(encoding="utf-8"))["codebase_version"])
    return version, int(version.lstrip("v").split(".")[0])


def _read(root: Path, name: str, read: Callable[[], Any]) -> Iterator[str]:
    """The fault of the file that ``read`` reads, if there is one."""
    try:
        read()
    except Exception as error:  # of json, pandas, pyarrow, datasets and LeRobot
        state = f"cannot be read ({first_line(error)})" if (root / name).exists() else "is missing"
        yield f"{name} {state}; {AGAIN}"


def _tables(root: Path, folder: str, features: dict[str, Any] | None = None) -> Iterator[str]:
    """Faults of all parquet files of a folder: LeRobot reads every one, whichever episodes are wanted.

    features  as they are declared, where the files hold them
    """
    import pyarrow.parquet as pq

    paths = sorted((root / folder).glob("*/*.parquet"))
    if not paths:
        yield f"{folder}/chunk-*/file-*.parquet is missing; {AGAIN}"
    for path in paths:
        try:
            with path.open("rb") as file:  # given a path, pyarrow would accept a folder of files
                table = pq.read_table(file)
        except Exception as error:
            yield f"{path.relative_to(root)} cannot be read ({first_line(error)}); {AGAIN}"
            continue
        for unlike in _columns(table, features or {}):
            yield f"{path.relative_to(root)} does not fit {INFO}: {unlike}; mend {INFO}, or {AGAIN}"


def video_fault(path: Path) -> str | None:
    """The fault of a video that shows without decoding it; None where there is none."""
    import av

    try:
        if not path.exists():
            return "is missing"
        if not path.stat().st_size:
            return "is empty"
        if _is_cut_off(path):
            return f"is cut off at {path.stat().st_size} bytes"
        with av.open(str(path)) as container:
            found = bool(container.streams.video)
        return None if found else "has no video in it"
    except (OSError, ValueError) as error:  # PyAV's are both
        return f"cannot be read ({first_line(error)})"


def _is_cut_off(path: Path) -> bool:
    """Whether the boxes of an mp4, each headed by its size, reach beyond the end of the file."""
    end, at = path.stat().st_size, 0
    with path.open("rb") as file:
        while at < end:
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            if size == 1:
                size = int.from_bytes(head[8:16], "big")
            if size < 8 or not head[4:8].isalnum():
                return False  # a last box of open length, or no mp4 at all
            at += size
    return at > end


def check_files(dataset: Any) -> None:
    """TrainingError unless an open ``LeRobotDataset`` has every row of its episodes, and whole videos."""
    meta, columns = dataset.meta, dataset.hf_dataset.data
    chosen = sorted(dataset.episodes if dataset.episodes is not None else range(meta.total_episodes))
    begins, ends = (np.asarray(meta.episodes[f"dataset_{side}_index"]) for side in ("from", "to"))
    found = columns.column("index").to_numpy()
    rows = np.sort(found)
    wanted = np.concatenate([np.arange(begins[index], ends[index]) for index in chosen])
    if not np.array_equal(rows, wanted) or (dataset.episodes is None and found[0] != 0):
        counts, declared = np.searchsorted(rows, ends) - np.searchsorted(rows, begins), ends - begins
        episode = next((index for index in chosen if counts[index] != declared[index]), chosen[0])
        has = f"{counts[episode]} rows instead of {declared[episode]}"
        raise TrainingError(
            f"{meta.get_data_file_path(episode)} of {meta.root} does not hold what {EPISODES} says: episode {episode} has "
            f"{has if counts[episode] != declared[episode] else 'other rows'}; {AGAIN}"
        )
    tasks = columns.column("task_index").to_numpy()
    if tasks.min() < 0 or tasks.max() >= len(meta.tasks):
        named = f"{len(meta.tasks)} tasks, the data names task {tasks.max()}"
        raise TrainingError(f"{TASKS} of {meta.root} has {named}; {AGAIN}")
    _check_nulls(meta, columns)
    for fault in _missing_files(meta, chosen):
        raise TrainingError(f"in {meta.root}, {fault}")


def _check_nulls(meta: Any, columns: Any) -> None:
    """TrainingError for a missing picture, and for a column of nulls: what datasets reads where a file lacks the column."""
    for key in sorted(set(columns.column_names) & set(meta.features) - set(meta.video_keys)):
        column = columns.column(key)
        if column.null_count and column.null_count == len(column):
            raise TrainingError(
                f"the column {key!r} that {INFO} of {meta.root} declares is missing from its data, or empty; "
                f"mend {INFO}, or {AGAIN}"
            )
        if column.null_count and key in meta.image_keys:
            row = int(np.asarray(column.is_null()).argmax())
            episode, frame = (columns.column(name)[row].as_py() for name in ("episode_index", "frame_index"))
            raise TrainingError(
                f"{key} at frame {frame} of episode {episode} is null in {meta.get_data_file_path(episode)} of {meta.root}, "
                f"as {column.null_count} are; {AGAIN}, or leave such episodes out with --dataset.episodes"
            )
