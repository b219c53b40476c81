"""Real-time chunking (RTC, arXiv 2506.07339): steer a chunk towards what is left of the previous one.

LeRobot differentiates ``x1 = x - t·v`` with ``v`` taken as constant, so the Jacobian is the identity and the guided
velocity is an elementwise expression of the same bits. No backward pass is needed, hence it runs under inference mode
and inside a captured graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCHEDULES = ("ZEROS", "ONES", "LINEAR", "EXP")


def prefix_weights(schedule: str, start: int, end: int, total: int) -> Tensor:
    """How strongly each of ``total`` actions is held to the previous chunk: 1 up to ``start``, 0 from ``end`` on.

    schedule  "ZEROS" | "ONES" | "LINEAR" | "EXP", the shape between the two   (LeRobot's ``RTCAttentionSchedule``)
    start     actions already committed (the inference delay)      end  the execution horizon
    returns   [total]  fp32 on the CPU
    """
    start = min(start, end)
    if schedule == "ZEROS":
        weights = torch.zeros(total)
        weights[:start] = 1.0
        return weights
    if schedule == "ONES":
        weights = torch.ones(total)
        weights[end:] = 0.0
        return weights
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown RTC schedule {schedule!r}; accepted are {', '.join(SCHEDULES)}")
    steps = total - max(total - end, 0) - start
    ramp = torch.tensor([]) if end <= start or steps <= 0 else torch.linspace(1, 0, steps + 2)[1:-1]
    if schedule == "EXP":
        ramp = ramp * torch.expm1(ramp).div(math.e - 1)
    if total - end > 0:
        ramp = torch.cat([ramp, torch.zeros(total - end)])
    if min(start, total) > 0:
        ramp = torch.cat([torch.ones(min(start, total)), ramp])
    return ramp


def guidance_weight(time: float, max_guidance_weight: float) -> Tensor:
    """``min(max, (1-τ)/τ · ((1-τ)² + τ²)/(1-τ)²)`` with ``τ = 1 - time``: weak near noise, bounded near the end.

    time     1 (noise) down to 0      returns  0-dim fp32 on the CPU
    """
    limit = torch.as_tensor(max_guidance_weight)
    tau = torch.as_tensor(1 - time)
    squared = (1 - tau) ** 2
    inverse_r2 = (squared + tau**2) / squared
    c = torch.nan_to_num((1 - tau) / tau, posinf=max_guidance_weight)
    return torch.minimum(torch.nan_to_num(c * inverse_r2, posinf=max_guidance_weight), limit)


def guide(v: Tensor, x: Tensor, previous: Tensor, weights: Tensor, time: float, weight: Tensor) -> Tensor:
    """``v - g·((previous - (x - t·v))·w)``.

    v, x, previous  [B, S, A]  fp32        weights  [1, S, 1]        weight  0-dim, ``guidance_weight(time)``
    returns         [B, S, A]
    replaces        ``RTCProcessor.denoise_step`` of LeRobot, autograd included
    """
    error = (previous - (x - time * v)) * weights
    return v - weight * error
