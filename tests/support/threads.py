"""Another thread, let in at a chosen moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

MOMENT, PATIENCE = 0.3, 60
"""Seconds: that a thread gets which a lock may keep out; after which one counts as locked up."""


class Elsewhere(threading.Thread):
    """Another thread does ``work``; what it raises is raised where it is awaited."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.error = work, None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error: BaseException | None = error

    def ended(self) -> None:
        self.join(PATIENCE)
        assert not self.is_alive(), "locked up"
        if self.error is not None:
            raise self.error


def elsewhere(work: Callable[[], Any], wait: float | None = None) -> Elsewhere:
    """By default it has been done on return, else so much time for it is over."""
    thread = Elsewhere(work)
    if wait is None:
        thread.ended()
    else:
        thread.join(wait)
    return thread


def once_after(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, work: Callable[[], Any], wait: float | None = None
) -> None:
    """Another thread does ``work`` right behind the first call of ``owner.name``."""
    stock, done = getattr(owner, name), []

    def function(*args: Any, **kwargs: Any) -> Any:
        found = stock(*args, **kwargs)
        if not done:
            done.append(None)
            elsewhere(work, wait)
        return found

    monkeypatch.setattr(owner, name, function)
