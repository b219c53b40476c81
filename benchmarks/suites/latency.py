"""Latency as a robot sees it: chunk after chunk on one policy, alone and beside the threads that read its cameras.

A robot's process also reads cameras, so that processor time and caches are shared. Rounds of both loads are taken in turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cv2
import numpy as np

from benchmarks.harness.flags import counts
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import Case
from smolvla_fast.model.precision import TIERS

CHUNKS = 200
FPS, HEIGHT, WIDTH = 30, 480, 640
"""What a USB camera of an SO-101 sends, as JPEG."""


def test_latency(measure: Any, make_setup: Any, pytestconfig: Any) -> None:
    setup = make_setup()
    (cameras,) = counts(pytestconfig.option.cameras, "--cameras", (2,))
    case, variants = Case(cameras), []
    for name in TIERS:
        if name == "exact":
            continue
        alone = setup.tier(name, case)
        busy = setup.tier(name, case, label=f"{name} beside {cameras} cameras")
        busy.facts["ratio_to"] = name
        busy.run = partial(beside_cameras, busy.run, cameras)
        variants += [alone, busy]
    measure(setup.named("latency", case), variants, rounds(pytestconfig, CHUNKS, CHUNKS), suite="latency")


def beside_cameras(run: Any, cameras: int) -> None:
    with reading(cameras):
        run()


@contextmanager
def reading(cameras: int) -> Iterator[None]:
    """A thread a camera does to FPS frames a second what LeRobot's OpenCVCamera does to one: decodes, turns BGR to RGB."""
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    sent = cv2.imencode(".jpg", cv2.resize(frame, (WIDTH, HEIGHT)))[1]
    done = threading.Event()

    def read() -> None:
        due = time.perf_counter()
        while not done.wait(max(0.0, due - time.perf_counter())):
            cv2.cvtColor(cv2.imdecode(sent, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
            due += 1 / FPS

    threads = [threading.Thread(target=read, daemon=True) for _ in range(cameras)]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        done.set()
        for each in threads:
            each.join()
