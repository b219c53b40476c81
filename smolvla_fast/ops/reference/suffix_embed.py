"""Noisy actions and the time of a denoise step to the expert's input tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(B=1, S=50, A=32, E=720, N=10),
    dict(B=2, S=7, A=5, E=48, N=3),
)


def suffix_fold(
    times: Tensor, in_weight: Tensor, in_bias: Tensor, mlp_in_weight: Tensor, mlp_in_bias: Tensor
) -> Any:
    """What of the suffix embedding depends on the step but not on the actions; computed once a chunk.

    times      [N, B, E]  ``time_embedding`` of every step       in_weight  [E, A]       mlp_in_weight  [E, 2E]
    returns    an opaque value for ``suffix_embed`` of the same backend (here: nothing is folded, as in stock)
    """
    return times, in_weight, in_bias, mlp_in_weight, mlp_in_bias


def suffix_embed(x: Tensor, step: int, folded: Any, mlp_out_weight: Tensor, mlp_out_bias: Tensor) -> Tensor:
    """``y = silu([x·Wiᵀ + bi | time]·Waᵀ + ba)·Woᵀ + bo``.

    x        [B, S, A]  fp32, the noisy actions        step  index into the times given to ``suffix_fold``
    returns  [B, S, E]
    replaces ``embed_suffix`` of LeRobot's ``VLAFlowMatching``
    """
    times, in_weight, in_bias, mlp_in_weight, mlp_in_bias = folded
    actions = F.linear(x, in_weight, in_bias)
    time = times[step].to(actions.dtype)[:, None, :].expand_as(actions)
    hidden = F.silu(F.linear(torch.cat([actions, time], dim=2), mlp_in_weight, mlp_in_bias))
    return F.linear(hidden, mlp_out_weight, mlp_out_bias)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    b, s, a, e, n = (case[name] for name in "BSAEN")
    return {
        "x": randn(b, s, a, dtype=dtype, generator=generator),
        "times": randn(n, b, e, dtype=dtype, generator=generator).clamp(-1, 1),
        "in_weight": randn(e, a, dtype=dtype, generator=generator, scale=a**-0.5),
        "in_bias": randn(e, dtype=dtype, generator=generator, scale=0.3),
        "mlp_in_weight": randn(e, 2 * e, dtype=dtype, generator=generator, scale=(2 * e) ** -0.5),
        "mlp_in_bias": randn(e, dtype=dtype, generator=generator, scale=0.3),
        "mlp_out_weight": randn(e, e, dtype=dtype, generator=generator, scale=e**-0.5),
        "mlp_out_bias": randn(e, dtype=dtype, generator=generator, scale=0.3),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    """One step, folded: the action projection of width A straight to E, then the output linear."""
    b, s, a, e = (case[name] for name in "BSAE")
    return Cost(2.0 * b * s * (a * e + e * e), float(itemsize) * (b * s * (a + e) + a * e + e * e + 2 * e))
