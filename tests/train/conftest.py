"""Offline, one thread: comparisons are of bits, models and datasets are tiny. Needs LeRobot 0.6's datasets."""

from __future__ import annotations

import os
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

try:
    _lerobot = version("lerobot")
except PackageNotFoundError:
    _lerobot = "none"
if not _lerobot.startswith("0.6.") or not all(map(find_spec, ("datasets", "av"))):
    # The data of LeRobot 0.6: Python below 3.12 can install no newer than 0.4.4.
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    return f"training: with the datasets of lerobot 0.6, installed is {_lerobot}"


@contextmanager
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def one_thread():
    with _one_thread():
        yield


@pytest.fixture(scope="session")
def bench_top(tmp_path_factory):
    """A tiny backbone and a dataset of 4 short episodes, written once."""
    from support.training_runs import BenchTop

    return BenchTop(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def finished(bench_top):
    """A run of 4 steps with a checkpoint at 2 and at 4. Not to be changed: copy it."""
    folder = bench_top.root / "finished"
    # Made before a test's own fixtures; its bits are compared with those of a test's run.
    with _one_thread():
        assert bench_top.command(folder, "--steps=4", "--save_freq=2", "--log_freq=1") == 0
    return folder


@pytest.fixture
def no_curve(monkeypatch):
    """It takes longer than the run."""
    monkeypatch.setattr("smolvla_fast.cli.train.draw", lambda *_: None)


@pytest.fixture(scope="session")
def demo():
    """The example ``train_demo.py`` as a module."""
    path = Path(__file__).parents[2] / "examples" / "train_demo.py"
    spec = spec_from_file_location("train_demo", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
