"""Which launches may begin before those ahead of them have ended. Asked of by ``dependent_launch.py``; needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_wanted: ContextVar[bool] = ContextVar("dependent_launches", default=True)
_behind_event: ContextVar[bool] = ContextVar("behind_event", default=False)


@contextmanager
def dependent_launches(wanted: bool) -> Iterator[None]:
    """Inside, launches may begin before those ahead of them have ended, or not: for measuring what that saves."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def wait_for_event() -> None:
    """The next launch here begins when all ahead of it has ended: its stream has just been told to wait for another.

    In a graph such a launch depends on nodes of two streams. A programmatic dependency is one between two kernels
    (``cudaGraphDependencyTypeProgrammatic``). Which of several dependencies become programmatic where a launch behind
    ``cudaStreamWaitEvent`` is captured, CUDA 13's headers do not say; so all of them are as ever.
    """
    _behind_event.set(True)


def may_begin_early() -> bool:
    """Of the launch that asks: once for each."""
    wanted = _wanted.get() and not _behind_event.get()
    _behind_event.set(False)
    return wanted
