"""The two ends of a denoise step, with everything that is constant over the steps folded away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import Memory
from ..reference.euler_step import Guidance
from ..reference.guidance import guide
from .linear import Linear
from .linear import linear as best_linear
from .rms_norm import RMSNorm
from .rms_norm import rms_norm as plain_rms_norm


class Folded(NamedTuple):
    """weight  [E, A]  Wa·Wi        bias  [N, B, 1, E]  Wa·bi + Wt·time + ba for every step"""

    weight: Tensor
    bias: Tensor


def suffix_fold(times: Tensor, action_in: tuple[Tensor, Tensor], time_in: tuple[Tensor, Tensor]) -> Folded:
    """See ``reference.suffix_fold``; between the action projection and the first MLP layer there is no nonlinearity."""
    (in_weight, in_bias), (weight, bias) = action_in, time_in
    on_actions, on_time = weight.float().split(in_weight.shape[0], dim=1)
    constant = on_actions @ in_bias.float() + bias.float()
    return Folded(on_actions @ in_weight.float(), (times.float() @ on_time.t() + constant)[:, :, None])


def suffix_embed(
    x: Tensor,
    step: int,
    folded: Folded,
    time_out: tuple[Tensor, Tensor],
    *,
    memory: Memory | None = None,
    linear: Linear = best_linear,
) -> Tensor:
    """See ``reference.suffix_embed``; returns fp32."""
    hidden = torch.nn.functional.silu(linear(x, folded.weight) + folded.bias[step])
    return linear(hidden, *time_out).float()


def euler_step(
    h: Tensor,
    norm: tuple[Tensor, float],
    action_out: tuple[Tensor, Tensor],
    x: Tensor,
    dt: float,
    guidance: Guidance | None = None,
    *,
    memory: Memory | None = None,
    linear: Linear = best_linear,
    rms_norm: RMSNorm = plain_rms_norm,
) -> tuple[Tensor, Tensor]:
    """See ``reference.euler_step``."""
    v = linear(rms_norm(h, *norm, action_out[0].dtype), *action_out).float()
    if guidance is not None:
        v = guide(v, x, guidance.previous, guidance.weights, guidance.time, guidance.weight)
    return torch.add(x, v, alpha=dt), v
