"""Opens what observations were recorded in: a LeRobotDataset, or a folder with a file for each observation."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..measure.console import CommandError
from ..smolvla.features import ACTION, OBS_PREFIX

KINDS = (".npz", ".pt")
INFO = "info.json"


class Frame(NamedTuple):
    """Which episode, and the frame's number in it. path  its file, in a folder of observations"""

    episode: str
    number: int
    path: Path = Path()


@dataclass
class Recorded:
    """Observations as they lie on the disk.

    source    for the report
    option    the argument that named them, for messages
    episodes  name -> its frames in order
    features  name -> as in a dataset's info.json; {} where only the observations say
    fps       frames a second, or None
    open      frames that were drawn -> what reads one: an observation by the names of the recording, tensors and the
              text "task". Raises CommandError, as does what it returns
    """

    source: str
    option: str
    episodes: dict[str, list[Frame]]
    features: dict[str, Any]
    fps: float | None
    open: Callable[[list[Frame]], Callable[[Frame], dict[str, Any]]]

    def draw(self, count: int, seed: int) -> list[Frame]:
        """``count`` frames over all episodes, or all there are: an equal number from each, spread over its length.

        In an order in which any beginning covers as many episodes as it can.
        """
        rng = np.random.default_rng(seed)
        order = [list(self.episodes)[i] for i in rng.permutation(len(self.episodes))]
        wanted, shares = count, dict.fromkeys(order, 0)
        while wanted and (room := [name for name in order if shares[name] < len(self.episodes[name])]):
            for name in room[:wanted]:
                shares[name] += 1
            wanted -= min(wanted, len(room))
        drawn: list[list[Frame]] = []
        for name in order:
            frames, share = self.episodes[name], shares[name]
            edges = [len(frames) * part // share for part in range(share + 1)] if share else [0]
            own = [frames[rng.integers(*ends)] for ends in pairwise(edges)]
            drawn.append([own[i] for i in rng.permutation(len(own))])
        return [own[turn] for turn in range(max(map(len, drawn))) for own in drawn if turn < len(own)]


def open_dataset(args: argparse.Namespace) -> Recorded:
    """The dataset that ``--dataset.*`` names, by its metadata: data is fetched when frames have been drawn.

    Raises CommandError.
    """
    try:
        from lerobot.datasets import LeRobotDatasetMetadata

        from ..train.dataset_files import check_backend
        from ..train.errors import TrainingError
    except ImportError as error:
        raise CommandError(
            f"LeRobot 0.6's datasets cannot be imported ({error}); on Python 3.12 or later run `pip install "
            '"smolvla_fast[train]"`, or give saved observations with --observations FOLDER'
        ) from error
    option = "--dataset.repo_id" if args.root is None else "--dataset.root"
    source, where = _where(args)
    try:
        meta = LeRobotDatasetMetadata(source, **where)
        check_backend(args.video_backend, bool(meta.video_keys))
        _check_episodes(args.episodes, meta)
    except CommandError:
        raise
    except TrainingError as error:
        raise CommandError(f"{option}: {error}") from error
    except Exception as error:  # the Hub, datasets, pyarrow and LeRobot each raise their own
        raise CommandError(_not_opened(args, args.episodes, error)) from error
    begins, ends = (meta.episodes[f"dataset_{side}_index"] for side in ("from", "to"))
    chosen = range(meta.total_episodes) if args.episodes is None else args.episodes
    episodes = {str(i): [Frame(str(i), number) for number in range(ends[i] - begins[i])] for i in chosen}
    return Recorded(
        f"{source} ({meta.total_episodes} episodes)", option, episodes, meta.features, float(meta.fps),
        lambda frames: _Reader(args, option, bool(meta.video_keys), frames),
    )  # fmt: skip


def _where(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    name = args.repo_id or (Path(args.root).resolve().name if args.root else "")
    return name, dict(root=args.root, revision=args.revision)


def _check_episodes(chosen: list[int] | None, meta: Any) -> None:
    last = meta.total_episodes - 1
    unknown = [index for index in chosen or [] if index > last]
    if unknown:
        raise CommandError(f"--dataset.episodes: the dataset has episodes 0 to {last}, not {unknown}")
    begins, ends = (meta.episodes[f"dataset_{side}_index"] for side in ("from", "to"))
    empty = [i for i in (range(last + 1) if chosen is None else chosen) if begins[i] >= ends[i]]
    if empty:
        raise CommandError(
            f"the dataset's episodes {empty} have no frames; leave them out: --dataset.episodes with the others"
        )


class _Reader:
    """Reads frames of a ``LeRobotDataset``, of the episodes of ``frames`` alone: no other is fetched.

    Raises CommandError for data that is missing or damaged, and when called, with the file, episode and frame that cannot
    be read.
    """

    def __init__(self, args: argparse.Namespace, option: str, videos: bool, frames: list[Frame]) -> None:
        from lerobot.datasets import LeRobotDataset

        from ..train.data import check_values
        from ..train.dataset_files import check_backend, check_files
        from ..train.errors import TrainingError
        from ..train.readable import Readable

        source, where = _where(args)
        episodes = sorted({int(frame.episode) for frame in frames})
        try:
            dataset = LeRobotDataset(
                source, **where, episodes=episodes, tolerance_s=args.tolerance_s,
                video_backend=check_backend(args.video_backend, videos),
            )  # fmt: skip
            check_files(dataset)
            check_values(dataset, {name: name for name in dataset.meta.features})
        except TrainingError as error:
            raise CommandError(f"{option}: {error}") from error
        except Exception as error:  # the Hub, datasets, pyarrow and LeRobot each raise their own
            raise CommandError(_not_opened(args, episodes, error)) from error
        # By the rows that the metadata declare, which `check_files` has compared with the data: a trimmed episode counts its
        # frames from another number than 0.
        self.begins = dataset.meta.episodes["dataset_from_index"]
        self.rows = {
            index: row for row, index in enumerate(dataset.hf_dataset.data.column("index").to_pylist())
        }
        self.frames = Readable(dataset)

    def __call__(self, frame: Frame) -> dict[str, Any]:
        from ..train.errors import TrainingError

        try:
            item = self.frames[self.rows[self.begins[int(frame.episode)] + frame.number]]
        except TrainingError as error:
            raise CommandError(str(error)) from error
        return {key: value for key, value in item.items() if key.startswith(OBS_PREFIX) or key == "task"}


def _not_opened(args: argparse.Namespace, episodes: list[int] | None, error: Exception) -> str:
    from ..train.dataset_files import not_opened

    return not_opened(_where(args)[0], args.root, episodes, error)


def open_folder(args: argparse.Namespace) -> Recorded:
    """``--observations FOLDER``: .npz or .pt files by name, 2 before 10, a subfolder an episode. Raises CommandError."""
    folder = Path(args.observations)
    accepted = (
        f"accepted is a folder with {' or '.join(KINDS)} files, an observation each, a subfolder an episode"
    )
    try:
        if not folder.is_dir():
            kind = "a file" if folder.exists() else "no such folder"
            hint = "; the number of frames is --frames" if args.observations.isdigit() else ""
            raise CommandError(f"--observations {args.observations}: {kind}; {accepted}{hint}")
        subfolders = [path for path in _inside(folder) if path.is_dir()]
        episodes: dict[str, list[Frame]] = {}
        beside = [path.name for path in _inside(folder) if path.suffix in KINDS and path.is_file()]
        if subfolders and beside:
            raise CommandError(
                f"--observations {args.observations}: {beside[0]} lies beside the subfolder {subfolders[0].name}; "
                f"{accepted}. Move it into a subfolder"
            )
        for part in subfolders or [folder]:
            paths = [path for path in _inside(part) if path.suffix in KINDS]
            if not paths:
                raise CommandError(
                    f"--observations: no observation in {part}; {accepted}. Remove an empty episode"
                )
            episodes[part.name] = [Frame(part.name, index, path) for index, path in enumerate(paths)]
    except (OSError, ValueError) as error:
        raise CommandError(f"--observations {args.observations!r}: {error}; {accepted}") from error
    info = read_info(folder / INFO)
    return Recorded(
        str(folder), "--observations", episodes, info.get("features", {}), info.get("fps"),
        lambda frames: lambda frame: read_observation(frame.path),
    )  # fmt: skip


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder, by number, without what programs hide there, such as .ipynb_checkpoints."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=by_number)


def by_number(path: Path) -> tuple[list[str | int], str]:
    """Sort key: ``2.npz`` before ``10.npz``."""
    parts = re.split(r"([0-9]+)", path.name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def read_observation(path: Path) -> dict[str, Any]:
    """One observation: "task", states [n], frames [channels, height, width] fp32 in [0, 1]. Raises CommandError.

    As LeRobot's ``prepare_observation_for_inference`` takes it (frames [height, width, channels], uint8) or returns it.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                values: Any = {name: file[name] for name in file.files}
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        found: dict[str, Any] = {
            name: _value(name, value) for name, value in values.items() if name.startswith(OBS_PREFIX)
        }
        if not found:
            raise ValueError(
                f"it holds {sorted(map(str, values))[:8]}, and no name that begins with {OBS_PREFIX!r}"
            )
        task = values.get("task", "")
        found["task"] = str(task[0] if isinstance(task, (list, tuple)) else task)
    except Exception as error:  # zipfile, pickle, numpy and torch each raise their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CommandError(
            f"{path} is no observation ({reason}); accepted is a dict with 'observation.state', the cameras and 'task', "
            "written by numpy.savez(path, **observation) or torch.save(observation, path)"
        ) from error
    return found


def _value(name: str, value: Any) -> Tensor:
    value = torch.as_tensor(value)
    if ".image" in name:
        value = value[0] if value.ndim == 4 else value
        if value.ndim != 3:
            raise ValueError(f"{name!r} has the shape {list(value.shape)}, a frame has three dimensions")
        if value.shape[-1] in (1, 3, 4) and value.shape[0] not in (1, 3, 4):
            value = value.permute(2, 0, 1)
        value = value.float() / 255 if value.dtype is torch.uint8 else value.float()
        if not (value.min() >= 0 and value.max() <= 1):
            raise ValueError(f"{name!r} has values outside [0, 1]; accepted are uint8, or fp32 in [0, 1]")
        return value.contiguous()
    value = value.float()
    value = value[0] if value.ndim == 2 and len(value) == 1 else value
    if not value.isfinite().all():
        raise ValueError(f"{name!r} holds numbers that are not finite")
    return value


def names_of(feature: Mapping[str, Any] | None) -> list[str]:
    """Names of a feature's values, however LeRobot nests them; [] where there are none."""

    def flat(names: Any) -> list[str]:
        if isinstance(names, Mapping):
            return [each for part in names.values() for each in flat(part)]
        if isinstance(names, (list, tuple)):
            return [each for part in names for each in flat(part)]
        return [] if names is None else [str(names)]

    return flat((feature or {}).get("names"))


def read_info(path: Path) -> dict[str, Any]:
    """fps and the names of actions, from an info.json beside saved observations; {} where there is none. CommandError.

    Of "features", only the action: what was observed, the observations themselves say.
    """
    try:
        info = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        action = info.get("features", {}).get(ACTION)
        fps = info.get("fps")
        if fps is not None and (type(fps) not in (int, float) or not 0 < fps < math.inf):
            raise ValueError(f'"fps" is {json.dumps(fps)}, not a number above 0')
        if action is not None and not isinstance(action, dict):
            raise ValueError(f'the "action" of "features" is {json.dumps(action)}')
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CommandError(
            f"{path}: no info.json as a dataset's ({error}); accepted is "
            '{"fps": 30, "features": {"action": {"names": [...]}}}, or none'
        ) from error
    return {"fps": fps, "features": {} if action is None else {ACTION: action}}
