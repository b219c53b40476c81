"""What lives beside a model that was patched for training: its ``LossEngine``, its counters, what was said about it."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from ..loss.engine import LossEngine
from ..loss.image_cache import ImageCache
from ..model.precision import Tier
from .change_detector import Watch
from .training_eligibility import backward_hook_reason, model_reason

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

    def ready(
        self, model: Any, tier: Tier, backend: str, device: torch.device, cache_bytes: int
    ) -> tuple[LossEngine | None, str | None]:
        """An engine that has looked at this model, and why no loss takes the fast path, or None. Cheap while nothing in the
        model has changed.

        One question under one lock: another thread forgets before it or after it, not in between.
        """
        key = (tier, backend, device, cache_bytes)
        with self.lock:
            if self._built_for != key:
                self.forget()
                self._built_for = key
            watch = self._watch
            if watch is not None and watch.same(model):
                # Chunks do not care for backward hooks, so the watch does not look.
                return self.engine, backward_hook_reason(model)
            self._watch = None
            reason = model_reason(model, tier)
            if reason is not None:
                return None, reason  # cheap, for a model that stock trains is asked at every step
            watch = _watch(model)  # before a look, so that what changes during it is looked at again
            reason = model_reason(model, tier)
            if reason is not None:
                return None, reason
            if self.engine is None:
                cache = ImageCache(cache_bytes) if cache_bytes else None
                self.engine = LossEngine(tier, backend, device, cache)
            self.engine.look(model)
            self._watch = watch
            return self.engine, None

    def renew_locks(self) -> None:
        """In a forked child: locks may be held by threads that are not in it, and a look be half done."""
        self.lock, self._watch = threading.RLock(), None
        if self.engine is not None and self.engine.cache is not None:
            self.engine.cache.renew_lock()

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

    # Below, the engine is read once: another thread may forget it meanwhile.
    @property
    def passed_over(self) -> dict[str, str]:
        engine = self.engine
        return {} if engine is None else dict(engine.passed_over)

    @property
    def cache(self) -> dict[str, int]:
        engine = self.engine
        return {} if engine is None or engine.cache is None else engine.cache.to_dict()

    def forget(self) -> None:
        with self.lock:
            self.engine, self._watch = None, None


def _watch(model: Any) -> Watch | None:
    """None of a foreign structure that cannot be noted: it is looked at every time, and ``model_reason`` says what it is."""
    try:
        return Watch(model)
    except Exception:
        return None
