"""What is kept beside one live model for one kind of work: its engine, its counters, what the log has said.

Never copied, never pickled. Threads may share it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from .change_detector import ChangeDetector, detector_of
from .eligibility import Eligibility
from .settings import DISABLE, SETTINGS, Settings, disabled
from .untried import Untried

logger = logging.getLogger("smolvla_fast")

E = TypeVar("E")

_counts: ContextVar[bool] = ContextVar("smolvla_fast_counts", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Chunks of this thread inside are a warm-up's, not the robot's."""
    token = _counts.set(False)
    try:
        yield
    finally:
        _counts.reset(token)


def counts() -> bool:
    """Whether a chunk of this thread counts."""
    return _counts.get()


class Served(Generic[E]):
    """Chunks and losses each have one; they differ in rules and in how an engine is made.

    fast, stock     calls by the engine, by stock
    last_fallback   why stock ran the last time it did, or None
    """

    eligibility: Eligibility
    work: str
    """What one call is, for the log."""
    tries = False
    """Whether it tries what is untried (``untried.py``)."""
    level = logging.WARNING
    """How loud a fallback is."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.settings: Settings | None = None  # of the last look: another thread may unpatch meanwhile
        self.engine: E | None = None
        self.detector: ChangeDetector | None = None
        self._refusal: str | None = None
        self._open = True  # whether the last look ended with a reason
        self.fast = self.stock = 0
        self.last_fallback: str | None = None
        self.logged_reasons: set[str] = set()

    def prepare(self, model: Any, settings: Settings) -> str | None:
        """Makes the engine for the model as it is now, where there is none; why it cannot serve this model, or None."""
        raise NotImplementedError

    def look(self, model: Any) -> tuple[E | None, str | None]:
        """An engine that has looked at this model as it is now, and why it may not serve it whatever the call, or None.
        Cheap while nothing in the model has changed. An engine with a reason, which is ``Untried`` then, may be tried.

        One question under one lock: another thread forgets before it or after it, not in between.
        """
        if disabled():
            return None, f"{DISABLE} is set"
        with self.lock:
            settings = model.__dict__.get(SETTINGS) or self.settings
            if settings is None:
                return None, "the policy was unpatched meanwhile"
            self.settings = settings
            noted = self.detector
            if noted is None or not noted.same(model):
                self.detector = None
                # What stock served the last time it may serve for long: asked before a detector is made, which costs more.
                reason = self.eligibility.model_reason(model) if noted is None else None
                if self._may_serve(reason, settings):
                    detector = detector_of(
                        model
                    )  # before the rules: what changes meanwhile is looked at again
                    reason = self.eligibility.model_reason(model)
                if not self._may_serve(reason, settings):
                    return None, reason
                try:
                    self._refusal = self.prepare(model, settings)
                except (RuntimeError, MemoryError) as error:
                    # A wish that cannot be met where the policy has moved, or want of memory: asked again at the next call.
                    return None, str(error)
                self.detector = detector
            reason = self._refusal or self.eligibility.live_reason(model)
            self._open = reason is not None
            return self.engine if self._may_serve(reason, settings) else None, reason

    def _may_serve(self, reason: str | None, settings: Settings) -> bool:
        return reason is None or (self.tries and settings.trial and isinstance(reason, Untried))

    def served(self) -> None:
        with self.lock:
            self.fast += _counts.get()

    def fell_back(self, reason: str) -> None:
        with self.lock:
            self.stock += _counts.get()
        if self.note(reason):
            logger.log(self.level, "smolvla_fast: this %s runs stock: %s", self.work, reason)

    def note(self, reason: str) -> bool:
        """Keeps the receipt; whether the log has not said it yet."""
        with self.lock:
            self.last_fallback = reason
            new = reason not in self.logged_reasons
            self.logged_reasons.add(reason)
            return new

    def forget(self) -> None:
        """Drops the engine; the next call makes another."""
        with self.lock:
            self.engine, self.detector = None, None

    def after_fork(self) -> None:
        """In a forked child: locks may be held by threads that are not in it, and a look be half done."""
        self.lock, self.detector = threading.RLock(), None
        if self.engine is not None:
            self.engine.after_fork()  # type: ignore[attr-defined]


R = TypeVar("R", bound=Served[Any])


class Registry(Generic[R]):
    """What is kept beside each live model."""

    def __init__(self, make: Callable[[], R]) -> None:
        self._make = make
        self._kept: WeakKeyDictionary[Any, R] = WeakKeyDictionary()
        # Re-entrant, as a collection of garbage under it may end in somebody's unpatch.
        self.lock = threading.RLock()
        _registries.add(self)

    def of(self, model: Any) -> R:
        with self.lock:
            if model not in self._kept:
                self._kept[model] = self._make()
            return self._kept[model]

    def drop(self, model: Any) -> None:
        """Forget a model: counters, engine, graphs and their memory."""
        with self.lock:
            found = self._kept.pop(model, None)
        if found is not None:
            found.forget()

    def after_fork(self) -> None:
        self.lock = threading.RLock()
        for each in list(self._kept.values()):
            each.after_fork()


_registries: WeakSet[Registry[Any]] = WeakSet()


def _after_fork() -> None:
    """In a forked child: locks of the parent may be held by threads that are not in the child."""
    for each in list(_registries):
        each.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
