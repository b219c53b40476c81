"""Checks and times the candidates of every op of one policy on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .result import Tuning

SECONDS = 90.0
"""How long a tuning may take where nobody says."""


def tune(
    model: Any,
    engine: Any,
    *,
    inputs: Sequence[Any] | None = None,
    noise: Tensor | None = None,
    seconds: float = SECONDS,
    progress: Callable[[str, float], None] | None = None,
) -> Tuning:
    """A plan for this model on this machine.

    model     a patched ``VLAFlowMatching``      engine  what serves it, without a plan
    inputs    images, image_masks, tokens, token_masks, state, as ``sample_actions`` takes them; drawn where not given
    progress  called with what begins and the share that is done, in [0, 1]
    """
    raise NotImplementedError("this version has no tuner")
