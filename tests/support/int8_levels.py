"""Attention in 8-bit integers: in torch, step by step, and by the kernel at every level on any x86-64 processor.

What this processor lacks is emulated: emulated.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smolvla_fast.ops.cpu import int8_attention
from smolvla_fast.ops.cpu.int8_attention import Attended
from support import emulated

BLOCK, LOG2E = 64, torch.tensor(1.44269504)
ROUNDER = 12582912.0
SMALLEST, LEAST_FACTOR = 2.0**-119, torch.tensor(2.0**-100)


def _steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows: integers in int64, and their scales."""
    largest = x.abs().amax(-1)
    some = largest >= SMALLEST
    inverse = torch.where(some, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * inverse[..., None]).round().long(), torch.where(some, largest / 127.0, 0.0)


def _power(t: Tensor, series: tuple[float, ...]) -> Tensor:
    """2^t: the whole part in the exponent, the rest by Taylor's series."""
    whole = (t + ROUNDER) - ROUNDER
    f = t - whole
    p = torch.full_like(f, series[0])
    for c in series[1:]:
        p = p * f + c
    return p * torch.exp2(whole)


SHORT = (9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1, 1.0)
LONG = (1.5252734e-5, 1.5403530e-4, 1.3333558e-3, *SHORT)


def emulate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The scheme of csrc/cpu/int8_attention.h: sums of integers in int64, all else in fp32 in the kernel's order.

    q [T, G, D], k, v [S, D]: a KV head with its queries      mask  [T, S] bool      returns  [T, G, D]
    """
    keys, dim = k.shape
    mean = torch.zeros(dim)
    for row in k:  # one after the other, as the kernel adds
        mean = mean + row
    k8, k_scale = _steps(k - mean / torch.tensor(float(keys)))
    q8, q_scale = _steps(q)
    scores = (q8 @ k8.t()).float() * k_scale
    if mask is not None:
        scores = torch.where(mask[:, None], scores, torch.finfo(torch.float32).min)
    factor = torch.maximum(q_scale * (torch.tensor(dim**-0.5) * LOG2E), LEAST_FACTOR)[..., None]
    blocks = list(zip(scores.split(BLOCK, -1), v.split(BLOCK), strict=True))
    most = torch.stack([s.amax(-1) for s, _ in blocks], -1)
    weight = _power(((most - most.amax(-1, keepdim=True)) * factor).clamp(min=-126.0), LONG)
    p8 = []
    for i, (s, _) in enumerate(blocks):
        t = ((s - most[..., i, None]) * factor).clamp(min=-20.0)
        p8.append((_power(t, SHORT) * 255.0).round().long())
    total = torch.zeros(q.shape[:-1])
    for i, each in enumerate(p8):
        total = total + weight[..., i] * each.sum(-1).float()
    weight = weight * (1.0 / total)[..., None]
    out = torch.zeros(q.shape)
    for i, (_, values) in enumerate(blocks):
        v8, v_scale = _steps(values.t())
        out = out + (p8[i] @ v8.t()).float() * v_scale * weight[..., i, None]
    return out


def at_level(name: str) -> Callable[..., Attended]:
    """``int8_attention.attention`` at one of ``LEVELS``: the extension's where it is in use here, else SIMDe's."""

    def attention(*args: Any, **kwargs: Any) -> Attended:
        with emulated.integers_at(name):
            return int8_attention.attention(*args, **kwargs)

    return attention
