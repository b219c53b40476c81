"""The two ends of a denoise step, with everything that is constant over the steps folded away."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.euler_step import Guidance
from ..reference.guidance import guide
from .linear import linear
from .rms_norm import RMSNorm
from .rms_norm import rms_norm as plain_rms_norm


class Folded(NamedTuple):
    """weight  [E, A]  Wa·Wi        bias  [N, B, 1, E]  Wa·bi + Wt·time + ba for every step"""

    weight: Tensor
    bias: Tensor


def suffix_fold(
    times: Tensor, in_weight: Tensor, in_bias: Tensor, mlp_in_weight: Tensor, mlp_in_bias: Tensor
) -> Folded:
    """See ``reference.suffix_fold``; between the action projection and the first MLP layer there is no nonlinearity."""
    width = in_weight.shape[0]
    on_actions, on_time = mlp_in_weight.float().split(width, dim=1)
    constant = on_actions @ in_bias.float() + mlp_in_bias.float()
    return Folded(on_actions @ in_weight.float(), (times.float() @ on_time.t() + constant)[:, :, None])


def suffix_embed(
    x: Tensor, step: int, folded: Folded, mlp_out_weight: Tensor, mlp_out_bias: Tensor
) -> Tensor:
    """See ``reference.suffix_embed``; returns fp32."""
    hidden = torch.nn.functional.silu(linear(x, folded.weight) + folded.bias[step])
    return linear(hidden, mlp_out_weight, mlp_out_bias).float()


def euler_step(
    h: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor,
    out_bias: Tensor,
    x: Tensor,
    dt: float,
    guidance: Guidance | None = None,
    *,
    rms_norm: RMSNorm = plain_rms_norm,
) -> tuple[Tensor, Tensor]:
    """See ``reference.euler_step``."""
    v = linear(rms_norm(h, norm_weight, eps, out_weight.dtype), out_weight, out_bias).float()
    if guidance is not None:
        v = guide(v, x, guidance.previous, guidance.weights, guidance.time, guidance.weight)
    return torch.add(x, v, alpha=dt), v
