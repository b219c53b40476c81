"""Sine-cosine embedding of the flow-matching time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def has_fp64(device: torch.device) -> bool:
    """MPS has not, an XPU says, and of others nobody knows."""
    if device.type == "xpu":
        capability: dict[str, bool] = getattr(torch.xpu, "get_device_capability", dict)()
        return bool(capability.get("has_fp64", False))
    return device.type in ("cpu", "cuda")


def time_embedding(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """``[sin(2π·t / p_i), cos(2π·t / p_i)]`` with periods ``p_i`` spaced geometrically between the two given.

    time     [B]  fp32, 1 (noise) down to 0 (actions)
    width    even number of features
    returns  [B, width]  fp64, and fp32 on devices that have no fp64
    replaces ``create_sinusoidal_pos_embedding`` of LeRobot
    """
    if width % 2:
        raise ValueError(
            f"the time embedding needs an even width, got {width}; the expert's hidden size sets it"
        )
    if time.ndim != 1:
        raise ValueError(f"time must have one dimension [batch], got shape {tuple(time.shape)}")
    dtype = torch.float64 if has_fp64(time.device) else torch.float32
    fraction = torch.linspace(0.0, 1.0, width // 2, dtype=dtype, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = (1.0 / period * 2 * math.pi)[None, :] * time[:, None]
    return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
