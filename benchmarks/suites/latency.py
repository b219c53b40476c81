"""Latency as a robot sees it: chunk after chunk on one policy, alone and beside the threads that read its cameras.

A robot's process also reads cameras, so that processor time and caches are shared. Rounds of both loads are taken in turn.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
    with Cameras(cameras) as read:
        for name in (each for each in TIERS if each != "exact"):  # which is stock's own calls
            alone = setup.tier(name, case)
            busy = setup.tier(name, case, label=f"{name} beside {cameras} cameras")
            busy.facts["ratio_to"] = name
            busy.run = partial(read.beside, busy.run)
            variants += [alone, busy]
        measure(setup.named("latency", case), variants, rounds(pytestconfig, CHUNKS, CHUNKS), suite="latency")


class Cameras:
    """A thread a camera, which decodes a JPEG and turns BGR to RGB FPS times a second, as LeRobot's OpenCVCamera does."""

    def __init__(self, count: int) -> None:
        frame = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        self._sent = cv2.imencode(".jpg", cv2.resize(frame, (WIDTH, HEIGHT)))[1]
        self._reading, self._done = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(count)]

    def __enter__(self) -> Cameras:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        for each in self._threads:
            each.join()

    def beside(self, run: Callable[[], Any]) -> None:
        """``run()`` while the cameras are read; the threads themselves go on, so that none is started in its time."""
        self._reading.set()
        try:
            run()
        finally:
            self._reading.clear()

    def _read(self) -> None:
        due = time.perf_counter()
        while not self._done.wait(max(0.0, due - time.perf_counter())):
            due += 1 / FPS
            if self._reading.is_set():
                cv2.cvtColor(cv2.imdecode(self._sent, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
