"""Writes a small real LeRobotDataset: a scripted hand that picks up a red cube.

The hand starts near the middle, moves above the cube, goes down, closes and lifts. Its state has its height and opening
alone; only the two cameras show its place on the table and the cube's. An action is a velocity over the table, and the next
height and opening. So a policy that ignores images cannot tell left from right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .observations import TASK
from .policies import IMAGES

REPO_ID = "smolvla_fast/pick"
CAMERAS = ("front", "wrist")
FPS = 10
FRAME = (32, 32)
HOME = np.array([0.5, 0.5, 0.9, 1.0])
"""A pose of the hand: place on the table x, y in [0, 1], height z, opening of the gripper; all four in [0, 1]."""

STRIDES = np.array([0.035, 0.035, 0.08, 0.25])
TABLE, RED, BLUE, METAL = (np.array(c) for c in ([158, 120, 80], [215, 35, 35], [50, 80, 200], [40, 42, 48]))


def write_dataset(
    root: str | Path,
    *,
    episodes: int = 12,
    seed: int = 0,
    cameras: Sequence[str] = CAMERAS,
    joints: int = 6,
    frame: tuple[int, int] = FRAME,
    videos: bool = False,
) -> Any:
    """Writes the dataset and returns it, a ``LeRobotDataset`` that has been read back.

    root      a folder that does not exist yet
    episodes  how many; ``seed`` places their cubes
    cameras   "front" sees the table from above, "wrist" the surroundings of the hand
    joints    size of state and action: the hand's four values, rotated by a fixed matrix into so many joint values
    frame     height, width in pixels
    videos    store frames as mp4 instead of png
    raises    ValueError for fewer than 4 joints or an unknown camera, FileExistsError (LeRobot's) for an existing root,
              ImportError without ``lerobot[dataset]``
    """
    unknown = sorted(set(cameras) - set(CAMERAS))
    if unknown or not cameras or joints < len(HOME):
        raise ValueError(
            f"cameras={cameras!r}, joints={joints}: accepted are cameras out of {CAMERAS} and joints >= {len(HOME)}"
        )
    from lerobot.datasets import LeRobotDataset

    names = [f"joint_{index}.pos" for index in range(joints)]
    vector = {"dtype": "float32", "shape": (joints,), "names": names}
    picture = {
        "dtype": "video" if videos else "image",
        "shape": (*frame, 3),
        "names": ["height", "width", "channels"],
    }
    features: dict[str, Any] = {f"{IMAGES}.{camera}": picture for camera in cameras}
    features |= {"observation.state": vector, "action": vector}
    # PyAV comes with LeRobot; left to choose, LeRobot tries torchcodec, which needs FFmpeg and fails at length.
    dataset = LeRobotDataset.create(
        REPO_ID, FPS, features, root=root, robot_type="scripted_hand", use_videos=videos, video_backend="pyav"
    )
    rng = np.random.default_rng(seed)
    # The matrix depends on the number of joints alone, so that all seeds have the same robot.
    turn = np.linalg.qr(np.random.default_rng(joints).standard_normal((joints, joints)))[0][:, : len(HOME)]
    with _quiet():
        for _ in range(episodes):
            _record(dataset, rng, turn, cameras, frame)
        dataset.finalize()
        return LeRobotDataset(REPO_ID, root=root, video_backend="pyav")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of ``datasets``."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _record(
    dataset: Any, rng: np.random.Generator, turn: np.ndarray, cameras: Sequence[str], frame: tuple[int, int]
) -> None:
    """One episode."""
    cube, other = place_blocks(rng)
    poses = list(pick_motion(cube, rng))
    for pose, following in pairwise(poses):
        views = {"front": front_view(pose, cube, other, frame), "wrist": wrist_view(pose, cube, other, frame)}
        dataset.add_frame(
            {
                **{f"{IMAGES}.{camera}": views[camera] for camera in cameras},
                "observation.state": (turn @ [0, 0, *pose[2:]]).astype(np.float32),
                "action": (turn @ command(pose, following)).astype(np.float32),
                "task": TASK,
            }
        )
    dataset.save_episode()


def place_blocks(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Places of the red cube and of a blue distractor, at least 0.3 apart."""
    while True:
        cube, other = rng.uniform(0.12, 0.88, (2, 2))
        if np.abs(cube - other).max() > 0.3:
            return cube, other


def pick_motion(cube: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Poses, one per frame: from near the middle to above the cube, down, close, lift."""
    pose = HOME + np.array([*rng.uniform(-0.05, 0.05, 2), 0, 0])
    yield pose
    for goal in ([*cube, 0.6, 1.0], [*cube, 0.1, 1.0], [*cube, 0.1, 0.2], [*cube, 0.7, 0.2]):
        while np.abs(pose - goal).max() > 1e-9:
            pose = pose + np.clip(goal - pose, -STRIDES, STRIDES)
            yield pose


def command(pose: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The action from one pose to the next: x and y in strides, from -1 to 1, then the next height and opening."""
    return np.array([*((following - pose) / STRIDES)[:2], *following[2:]])


def front_view(pose: np.ndarray, cube: np.ndarray, other: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """The whole table from above, [height, width, 3] uint8."""
    y, x = np.mgrid[0.5 : frame[0], 0.5 : frame[1]] / np.array(frame)[:, None, None]
    view = _table(x, y, cube, other)
    # The hand: two fingers, further apart when open, larger when high and so near to the camera.
    size = 0.03 + 0.03 * pose[2]
    for side in (-1, 1):
        finger = pose[0] + side * (0.05 + 0.05 * pose[3])
        view[(np.abs(x - finger) < size / 2) & (np.abs(y - pose[1]) < size)] = METAL
    return view


def wrist_view(pose: np.ndarray, cube: np.ndarray, other: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
    """The table below the hand, [height, width, 3] uint8: a part of it, wider when the hand is high."""
    y, x = (np.mgrid[0.5 : frame[0], 0.5 : frame[1]] / np.array(frame)[:, None, None] - 0.5) * (
        0.4 + 0.8 * pose[2]
    )
    view = _table(x + pose[0], y + pose[1], cube, other)
    view[:2, : max(1, round(frame[1] * pose[3]))] = METAL  # the gripper's edge, as wide as it is open
    return view


def _table(x: np.ndarray, y: np.ndarray, cube: np.ndarray, other: np.ndarray) -> np.ndarray:
    planks = 1 + 0.06 * np.sin(40 * x) + 0.15 * (y - 0.5)
    view = planks[..., None] * TABLE
    for place, colour in ((other, BLUE), (cube, RED)):
        view[np.maximum(np.abs(x - place[0]), np.abs(y - place[1])) < 0.1] = colour
    return view.clip(0, 255).astype(np.uint8)
