"""What ``patch`` was asked for, the one variable that turns all of it off, and what holds for one thread alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

DISABLE = "SMOLVLA_FAST_DISABLE"
TRAINING = "SMOLVLA_FAST_TRAINING"
SETTINGS = "_smolvla_fast"
"""The attribute of a patched model that holds its ``Settings``."""


@dataclass(frozen=True)
class Settings:
    """What ``patch`` was asked for; travels with copies and pickles of the model."""

    precision: str
    backend: str
    training: bool = False
    image_cache: int = 0
    tune: str = "cached"
    """"cached" or "off": a copy of a policy that was tuned when it was patched is not tuned again."""
    trial: bool = True
    """Whether what is unread or untried may be tried."""


def is_on(name: str) -> bool:
    """Whether a variable of the environment is set to anything but a no."""
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def disabled() -> bool:
    return is_on(DISABLE)


_stock: ContextVar[bool] = ContextVar("smolvla_fast_stock_layers", default=False)


@contextmanager
def stock_layers() -> Iterator[None]:
    """Inside, in this thread, the layers of patched policies are stock's: what falls back to stock is stock throughout."""
    token = _stock.set(True)
    try:
        yield
    finally:
        _stock.reset(token)


def stock_wanted() -> bool:
    return _stock.get()
