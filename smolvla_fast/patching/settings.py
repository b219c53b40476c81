"""What ``patch`` was asked for, and the one variable that turns all of it off."""

from __future__ import annotations

import os
from dataclasses import dataclass

DISABLE = "SMOLVLA_FAST_DISABLE"
SETTINGS = "_smolvla_fast"
"""The attribute of a patched model that holds its ``Settings``."""


@dataclass(frozen=True)
class Settings:
    """What ``patch`` was asked for; travels with copies and pickles of the model."""

    precision: str
    backend: str
    training: bool = False
    image_cache: int = 0


def disabled() -> bool:
    return os.environ.get(DISABLE, "").lower() not in ("", "0", "false", "no", "off")
