"""Triton launchers with their outputs between guards: memory that was not written, or written beside, shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from support.contract import to_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64
"""Elements before and behind an output; a multiple of 16 bytes in every dtype, as the allocator aligns."""
UNWRITTEN = 12345
"""What integers hold there, for which there is no NaN."""
NO_BOOL = 77
"""What a byte of a mask holds there: neither False nor True."""


def guarded(launcher: Callable[..., Any], device: str = DEVICE) -> Callable[..., Any]:
    """The launcher on the device for inputs on the host, its results back there.

    What it allocates starts as NaN with NaN around it, and the NaN around it must stay.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        wholes: list[Tensor] = []
        allocate = torch.empty

        def empty(*shape: Any, dtype: torch.dtype | None = None, device: Any = device) -> Tensor:
            numel = allocate(*shape, device="meta").numel()
            fill = torch.nan if dtype is None or dtype.is_floating_point else UNWRITTEN
            kind = torch.uint8 if dtype is torch.bool else dtype
            whole = torch.full(
                (numel + 2 * GUARD,), NO_BOOL if kind is torch.uint8 else fill, dtype=kind, device=device
            )
            wholes.append(whole)
            return whole[GUARD : GUARD + numel].view(*shape).view(dtype or whole.dtype)

        def empty_like(like: Tensor, **_: Any) -> Tensor:
            return empty(like.shape, dtype=like.dtype, device=like.device)

        args, kwargs = to_device(args, device), to_device(kwargs, device)
        with patch.object(torch, "empty", empty), patch.object(torch, "empty_like", empty_like):
            out = launcher(*args, **kwargs)
        assert wholes, "the launcher allocated nothing"
        for whole in wholes:
            of_bools = whole.dtype is torch.uint8
            for guard in (whole[:GUARD], whole[-GUARD:]):
                left = (
                    guard.isnan()
                    if whole.is_floating_point()
                    else guard.eq(NO_BOOL if of_bools else UNWRITTEN)
                )
                assert left.all(), "wrote beside its output"
            assert not of_bools or whole[GUARD:-GUARD].le(1).all(), "left a mask unwritten"
        return to_device(out, "cpu")

    return call
