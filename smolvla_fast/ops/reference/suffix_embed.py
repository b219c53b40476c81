"""Noisy actions and the time of a denoise step to the expert's input tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import Memory
from . import Cost, randn

CASES = (
    dict(B=1, S=50, A=32, E=720, N=10),
    dict(B=2, S=7, A=5, E=48, N=3),
)


def suffix_fold(times: Tensor, action_in: tuple[Tensor, Tensor], time_in: tuple[Tensor, Tensor]) -> Any:
    """What of the suffix embedding depends on the step but not on the actions; computed once a chunk.

    times      [N, B, E]  ``time_embedding`` of every step
    action_in  (weight [E, A], bias [E])      time_in  (weight [E, 2E], bias [E])
    returns    an opaque value for ``suffix_embed`` of the same backend (here: nothing is folded, as in stock)
    """
    return times, action_in, time_in


def suffix_embed(
    x: Tensor, step: int, folded: Any, time_out: tuple[Tensor, Tensor], *, memory: Memory | None = None
) -> Tensor:
    """``y = silu([x·Wiᵀ + bi | time]·Waᵀ + ba)·Woᵀ + bo``.

    x        [B, S, A]  fp32, the noisy actions        step  index into the times given to ``suffix_fold``
    time_out (weight [E, E], bias [E])      memory  see ``ops.memory``
    returns  [B, S, E]
    replaces ``embed_suffix`` of LeRobot's ``VLAFlowMatching``
    """
    times, action_in, time_in = folded
    actions = F.linear(x, *action_in)
    time = times[step].to(actions.dtype)[:, None, :].expand_as(actions)
    hidden = F.silu(F.linear(torch.cat([actions, time], dim=2), *time_in))
    return F.linear(hidden, *time_out)


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    """What ``suffix_fold`` and ``suffix_embed`` take, but for the step."""
    b, s, a, e, n = (case[name] for name in "BSAEN")

    def affine(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        weight = randn(outputs, inputs, dtype=dtype, generator=generator, scale=inputs**-0.5)
        return weight, randn(outputs, dtype=dtype, generator=generator, scale=0.3)

    return {
        "x": randn(b, s, a, dtype=dtype, generator=generator),
        "times": randn(n, b, e, dtype=dtype, generator=generator).clamp(-1, 1),
        "action_in": affine(e, a),
        "time_in": affine(e, 2 * e),
        "time_out": affine(e, e),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    """One step, folded: the action projection of width A straight to E, then the output linear."""
    b, s, a, e = (case[name] for name in "BSAE")
    return Cost(2.0 * b * s * (a * e + e * e), float(itemsize) * (b * s * (a + e) + a * e + e * e + 2 * e))
