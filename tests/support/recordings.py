"""A policy with processors, recordings that fit it, and `verify` on them: fixtures of the tests of `verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smolvla_fast.cli import main
from smolvla_fast.smolvla import SmolVLAPolicy, make_smolvla_pre_post_processors
from smolvla_fast.testing.observations import TASK, make_observation
from smolvla_fast.testing.policies import make_policy

JOINTS, CAMERAS = 6, ("front", "wrist")
MEAN, STD = [10.0 * i for i in range(JOINTS)], [1.0 + i for i in range(JOINTS)]
RENAMED = {
    f"observation.images.{name}": f"observation.images.camera{i + 1}" for i, name in enumerate(CAMERAS)
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with statistics of its own, whose preprocessor renames the dataset's cameras."""
    root = tmp_path_factory.mktemp("policy")
    policy = make_policy("tiny", origin="ours", folder=root / "vlm", num_steps=3)
    policy.save_pretrained(root / "saved")
    stats = {
        "observation.state": {"mean": [0.1] * JOINTS, "std": [0.5] * JOINTS},
        "action": {"mean": MEAN, "std": STD},
    }
    before, after = make_smolvla_pre_post_processors(policy.config, stats)
    before.steps[0].rename_map = RENAMED
    for pipeline in (before, after):
        pipeline.save_pretrained(root / "saved")
    return root / "saved"


def writer() -> Any:
    """``write_dataset``; skips where LeRobot 0.6's datasets are not installed."""
    for package in ("datasets", "lerobot.datasets"):
        pytest.importorskip(package, reason="LeRobot 0.6's datasets")
    if not hasattr(sys.modules["lerobot.datasets"], "LeRobotDataset"):
        pytest.skip("the datasets of an older LeRobot")
    from smolvla_fast.testing.dataset import write_dataset

    return write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short episodes."""
    write_dataset = writer()
    from support.training_runs import drop_episode_statistics

    root = tmp_path_factory.mktemp("recorded") / "pick"
    write_dataset(root, episodes=4)
    drop_episode_statistics(root)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """Two episodes of saved observations: as a robot gives them, .npz, and as LeRobot prepares them, .pt."""
    root, policy = tmp_path_factory.mktemp("log"), SmolVLAPolicy.from_pretrained(saved)
    for number in range(4):
        drawn = make_observation(policy, seed=number)
        frames = {
            f"observation.images.{name}": drawn[RENAMED[f"observation.images.{name}"]] for name in CAMERAS
        }
        part = root / f"episode_{number // 2}"
        part.mkdir(exist_ok=True)
        state = drawn["observation.state"]
        if number < 2:
            bytes_ = {k: (255 * v[0].permute(1, 2, 0)).byte().numpy() for k, v in frames.items()}
            np.savez(
                part / f"{number}.npz", **bytes_, **{"observation.state": state[0].numpy(), "task": TASK}
            )
        else:
            torch.save({**frames, "observation.state": state, "task": [TASK]}, part / f"{number}.pt")
    return root


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all the rest: `verify` as it is without matplotlib."""
    monkeypatch.setitem(sys.modules, "smolvla_fast.measure.difference_charts", None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the command with ``--threads 1``: the same sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(saved: Path, report: Path, *arguments: str) -> tuple[int, Any]:
    """Exit status and figures, on one thread of the CPU."""
    where = ["--device", "cpu", "--threads", "1", "--json", str(report)]
    status = main(["verify", "--policy.path", str(saved), *where, *arguments])
    return status, json.loads(report.read_text(encoding="utf-8"))


def refuses(saved: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["verify", "--policy.path", str(saved), "--device", "cpu", *arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "did not foresee" not in message, message
    assert "loading the policy" not in message, "refused before the weights are read"
    return message
