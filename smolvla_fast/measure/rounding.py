"""How far apart two right answers in fp32 may be: said in terms of what stock itself moves by.

Two programs that add up the same numbers in another order differ in last bits, and a deep network makes more of these than a
shallow one, on some weights more than on others. A constant bound is then too tight for some policies and too loose for the
rest. So stock is asked: it is run again with the sums of its products in other orders.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FP32_BOUND = 1e-5
"""Relative L2 allowed to fp32 against fp32 on any policy. A missing scale or mask shows at 1e-2 and above."""

MOVEMENTS = 3.0
"""How many times stock's own movement the fast path may be off: each is a draw of the same rounding errors. Measured in
tests/measure/test_rounding.py on policies of 32 layers at tiny widths."""

ORDERS = (None, 0, 1, 2)
"""Orders of sums that stock is tried in: reversed, and shuffled by a seed. One draw may be lucky, four hardly."""


class OtherSums(TorchFunctionMode):
    """Inside, this thread's linear layers, convolutions and ``matmul`` add up in another order.

    ``x·wᵀ = x[:, p]·w[:, p]ᵀ`` in real numbers, p a permutation: the reversal, or one drawn from ``seed``. Deterministic, on
    any device; neither settings nor random state of the process are touched.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed

    def _order(self, size: int, device: torch.device) -> Tensor:
        if self.seed is None:
            return torch.arange(size - 1, -1, -1, device=device)
        return torch.randperm(size, generator=torch.Generator().manual_seed(self.seed)).to(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, *rest = args
            order = self._order(weight.shape[-1], x.device)
            return func(x[..., order], weight[..., order], *rest, **kwargs)
        products = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
        if func in products and not kwargs and min(args[0].ndim, args[1].ndim) > 1:
            order = self._order(args[0].shape[-1], args[0].device)
            return func(args[0][..., order], args[1][..., order, :])
        if func in (F.conv2d, torch.conv2d):
            return self._convolve(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _convolve(
        self, func: Any, x: Tensor, weight: Tensor, bias: Any = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        rest = (bias, stride, padding, dilation, groups)
        if groups == 1:
            order = self._order(x.shape[1], x.device)
            x, weight = x[:, order], weight[:, order]
        kernel = tuple(weight.shape[2:])
        patches = _pair(stride) == kernel and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1)
        if patches and (x.shape[2] % kernel[0], x.shape[3] % kernel[1]) == (0, 0):
            # Patches side by side that fill the image: turned over, each is itself turned over.
            return func(x.flip(2, 3), weight.flip(2, 3), *rest).flip(2, 3)
        return func(x, weight, *rest)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def fp32_bound(movement: float) -> float:
    """The bound, relative L2, where stock moves by ``movement``: MOVEMENTS times that, and no less than FP32_BOUND.

    Where stock moves by 1e-3, say, two right answers differ by as much, and a product in bf16 cannot be told from them: what
    to say then is that stock itself is no nearer to the truth.
    """
    return max(FP32_BOUND, MOVEMENTS * movement)
