"""Final norm, output projection and one Euler step, with real-time chunking guidance where it is on."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import Memory
from . import Cost, compute_dtype, randn
from .guidance import guide
from .rms_norm import rms_norm

CASES = (
    dict(B=1, S=50, E=720, A=32),
    dict(B=2, S=7, E=48, A=5),
)


class Guidance(NamedTuple):
    """RTC as data: what is left of the previous chunk, how strongly to hold to it, and the weight of this step.

    previous  [B, S, A]  fp32, zero-padded        weights  [1, S, 1]  fp32        time  1 .. 0        weight  0-dim fp32
    """

    previous: Tensor
    weights: Tensor
    time: float
    weight: Tensor


class Guidances(NamedTuple):
    """``Guidance`` for all steps of a chunk as data: nothing in it changes a captured graph.

    previous   [B, S, A]  fp32      weights  [1, S, 1]  fp32      strengths  [N]  fp32, ``guidance_weight`` of each step
    """

    previous: Tensor
    weights: Tensor
    strengths: Tensor

    def at(self, step: int) -> Guidance:
        """What one denoise step needs."""
        time = 1.0 + step * (-1.0 / len(self.strengths))
        return Guidance(self.previous, self.weights, time, self.strengths[step])


def euler_step(
    h: Tensor,
    norm: tuple[Tensor, float],
    action_out: tuple[Tensor, Tensor],
    x: Tensor,
    dt: float,
    guidance: Guidance | None = None,
    *,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """``v = rms_norm(h)·Woutᵀ + b;  v ← guide(v, x) if guided;  x' = x + dt·v``.

    h        [B, S, E]      norm  (weight [E], eps)      action_out  (weight [A, E], bias [A])
    x        [B, S, A]  fp32, left as it is unless it lies in ``memory``      dt  -1/N      memory  see ``ops.memory``
    returns  x' and v, both [B, S, A] fp32
    replaces the expert's final norm, ``action_out_proj`` and the body of ``euler_integrate``
    """
    y = rms_norm(h, *norm)
    v = F.linear(y.to(compute_dtype(y)), *action_out)
    if guidance is not None:
        v = guide(v, x, guidance.previous, guidance.weights, guidance.time, guidance.weight)
    return x + dt * v, v


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    b, s, e, a = (case[name] for name in "BSEA")
    wide = torch.promote_types(dtype, torch.float32)
    h = randn(b, s, e, dtype=dtype, generator=generator, scale=3.0)
    norm_weight = 1 + randn(e, dtype=dtype, generator=generator, scale=0.3)
    weight = randn(a, e, dtype=wide, generator=generator, scale=e**-0.5)
    return {
        "h": h,
        "norm": (norm_weight, 1e-5),
        "action_out": (weight, randn(a, dtype=wide, generator=generator, scale=0.3)),
        "x": randn(b, s, a, dtype=wide, generator=generator),
        "dt": -0.1,
        "guidance": Guidance(
            previous=randn(b, s, a, dtype=wide, generator=generator),
            weights=torch.linspace(1, 0, s).to(wide)[None, :, None],
            time=0.7,
            weight=torch.tensor(2.5),
        ),
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    b, s, e, a = (case[name] for name in "BSEA")
    return Cost(2.0 * b * s * e * a, float(itemsize) * b * s * e + 4.0 * (a * e + 3 * b * s * a))
