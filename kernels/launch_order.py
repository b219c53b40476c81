"""Which launches may begin before those ahead of them have ended; ``dependent_launch.py`` asks. Needs no Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_wanted: ContextVar[bool] = ContextVar("dependent_launches", default=True)
_behind_event: ContextVar[bool] = ContextVar("behind_event", default=False)


@contextmanager
def dependent_launches(wanted: bool) -> Iterator[None]:
    """Inside, launches may begin before those ahead of them have ended, or not; inside of one that says no, none may."""
    token = _wanted.set(_wanted.get() and wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def next_launch_in_order() -> None:
    """Mark the next Triton launch of this context as an ordinary one. For right behind a wait for another stream's event.

    In a graph such a launch depends on nodes of two streams. A programmatic dependency is one between two kernels
    (``cudaGraphDependencyTypeProgrammatic``). Which of several dependencies become programmatic where a launch behind
    ``cudaStreamWaitEvent`` is captured, CUDA 13's headers do not say; so none does.
    """
    _behind_event.set(True)


def take_may_begin_early() -> bool:
    """Whether this launch may begin early. Clears the mark, so it is called once a launch."""
    wanted = _wanted.get() and not _behind_event.get()
    _behind_event.set(False)
    return wanted
