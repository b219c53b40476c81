"""The ends of a training step: the point on the path from actions to noise, and the squared error of the velocity there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

CASES = (
    dict(B=8, S=50, A=32),
    dict(B=64, S=50, A=32),
    dict(B=1, S=50, A=32),
    dict(B=3, S=7, A=5),
)


def flow_point(actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """``x_t = t·noise + (1 - t)·actions`` (rectified flow, arXiv 2209.03003).

    actions, noise  [B, S, A]  fp32      time  [B]  fp32, 1 is noise
    returns         [B, S, A]  fp32
    replaces        the first lines of ``forward`` of LeRobot's ``VLAFlowMatching``
    """
    t = time[:, None, None]
    return t * noise + (1 - t) * actions


def flow_loss(v: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
    """``(u - v)²`` with the velocity ``u = noise - actions`` that takes actions to noise along a straight line.

    v               [B, S, A]  the velocity the expert gives
    actions, noise  [B, S, A]  fp32
    returns         [B, S, A]  fp32, unreduced; the gradient to v is ``-2·(u - v)`` times that of the result, to noise and
                    actions the same times -1 and 1
    replaces        ``u_t = noise - actions`` and ``F.mse_loss(u_t, v_t, reduction="none")`` there
    """
    return F.mse_loss(noise - actions, v.to(actions.dtype), reduction="none")


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    shape = tuple(case[name] for name in "BSA")
    wide = torch.promote_types(dtype, torch.float32)
    v = randn(*shape, dtype=dtype, generator=generator)
    actions, noise = (randn(*shape, dtype=wide, generator=generator) for _ in range(2))
    return {"v": v, "actions": actions, "noise": noise}


def cost(case: dict[str, int], itemsize: int) -> Cost:
    size = case["B"] * case["S"] * case["A"]
    return Cost(3.0 * size, size * (float(itemsize) + 12.0))
