"""How far apart two right answers in fp32 may be: said in terms of what stock itself moves by.

Two programs that add up the same numbers in another order differ in last bits, and a deep network makes more of these than a
shallow one, on some weights more than on others. A constant bound is then too tight for some policies and too loose for the
rest. So stock is asked: it is run once more with the sums of its matrix products in reverse order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

FP32_BOUND = 1e-5
"""Relative L2 allowed to fp32 against fp32 on any policy. A missing scale or mask shows at 1e-2 and above."""

MOVEMENTS = 3.0
"""How many times stock's own movement the fast path may be off: each is one draw of the same rounding errors, and one
of them may be lucky. On 68 policies of 32 layers at tiny widths, random weights of three sharpnesses: 2.7 at worst, 1.0 on
average."""

CAP = 1e-4
"""Where stock moves by more, nothing is excused: one product in bf16 costs 1e-3 and more."""


class ReversedSums(TorchFunctionMode):
    """Inside, this thread's linear layers and patch convolutions sum over their inputs from the last to the first.

    ``x·wᵀ = flip(x)·flip(w)ᵀ`` in real numbers. Deterministic, on any device; no setting of the process is touched.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, *rest = args
            return func(x.flip(-1), weight.flip(-1), *rest, **kwargs)
        if func in (F.conv2d, torch.conv2d):
            x, weight, *rest = args
            if (x.shape[-1] % weight.shape[-1], x.shape[-2] % weight.shape[-2]) == (0, 0):
                return func(x.flip(1, 2, 3), weight.flip(1, 2, 3), *rest, **kwargs).flip(2, 3)
        return func(*args, **kwargs)


def fp32_bound(movement: float) -> float:
    """The bound, relative L2, where stock moves by ``movement``: that times MOVEMENTS, from FP32_BOUND to CAP."""
    return min(max(FP32_BOUND, MOVEMENTS * movement), CAP)
