"""What lives beside a model that was patched for training: its ``LossEngine``, its counters, what was said about it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from ..precision import Tier
from ..watch import Watch
from .engine import LossEngine
from .guard import backward_hook_reason, model_reason
from .image_cache import ImageCache

logger = logging.getLogger("smolvla_fast")


class Learning:
    """Engine, counters and messages of one model's training.

    fast, stock  losses computed by the fast path, by stock      fallback  why stock computed the last one it did
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.fast = 0
        self.stock = 0
        self.fallback: str | None = None
        self.engine: LossEngine | None = None
        self._built_for: tuple[Any, ...] = ()
        self._watch: Watch | None = None
        self._told: set[str] = set()

    def prepare(self, tier: Tier, backend: str, device: torch.device, cache_bytes: int) -> LossEngine:
        key = (tier, backend, device, cache_bytes)
        with self.lock:
            if self.engine is None or self._built_for != key:
                cache = ImageCache(cache_bytes) if cache_bytes else None
                self.engine, self._built_for = LossEngine(tier, backend, device, cache), key
                self._watch = None
            return self.engine

    def reason(self, model: Any, tier: Tier) -> str | None:
        """Why no loss of this model takes the fast path, or None. Cheap while nothing in it has changed."""
        with self.lock:
            watch = self._watch
            if watch is not None and watch.same_structure(model) and watch.same_memory():
                return backward_hook_reason(model)  # which chunks do not care for, so the watch does not look
            self._watch = None
            reason = model_reason(model, tier)
            if reason is None:
                assert self.engine is not None, "prepared before it is asked"
                self.engine.look(model)
                self._watch = Watch(model)
            return reason

    def served(self) -> None:
        with self.lock:
            self.fast += 1

    def announce(self, reason: str | None) -> None:
        """Says at patching whether training is on; what is said here is not said again at the first step."""
        with self.lock:
            self.fallback = reason
            if reason is None:
                logger.info("smolvla_fast: training on")
            elif reason not in self._told:
                self._told.add(reason)
                logger.warning("smolvla_fast: training runs stock: %s", reason)

    def fell_back(self, reason: str) -> None:
        with self.lock:
            self.stock += 1
            self.fallback = reason
            told = reason in self._told
            self._told.add(reason)
        if not told:
            logger.warning("smolvla_fast: this training step runs stock: %s", reason)

    @property
    def passed_over(self) -> dict[str, str]:
        return {} if self.engine is None else dict(self.engine.passed_over)

    @property
    def cache(self) -> dict[str, int]:
        cache = None if self.engine is None else self.engine.cache
        return {} if cache is None else cache.to_dict()

    def forget(self) -> None:
        with self.lock:
            self.engine, self._watch = None, None
