"""Offline, one thread: the comparisons are of bits, and the models are tiny."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

try:
    _lerobot = version("lerobot")
except PackageNotFoundError:
    _lerobot = "none"
if not _lerobot.startswith("0.6."):
    # Bit for bit with 0.6.1: older releases have other modules, and Python below 3.12 can install no newer one.
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    return f"plain-PyTorch SmolVLA: compared with lerobot 0.6.1, installed is {_lerobot}"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """kind -> folder of a tiny backbone, made on first use."""
    from support.smolvla_pairs import make_backbone

    root = tmp_path_factory.mktemp("backbones")
    return lambda kind="plain": make_backbone(root, kind)
