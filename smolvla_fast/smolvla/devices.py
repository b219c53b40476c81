"""The devices that LeRobot accepts, and which of them this machine has."""

from __future__ import annotations

import torch


def device_is_available(device: str) -> bool:
    """Whether this machine has ``device``; ValueError for a name that LeRobot does not accept either."""
    if device.startswith("cuda"):
        return torch.cuda.is_available()
    if device == "mps":
        return torch.backends.mps.is_available()
    if device == "xpu":
        return hasattr(torch, "xpu") and torch.xpu.is_available()
    if device == "cpu":
        return True
    raise ValueError(f"device {device!r} is not known; accepted are 'cpu', 'cuda', 'cuda:N', 'mps' and 'xpu'")


def best_device() -> str:
    return next(kind for kind in ("cuda", "mps", "xpu", "cpu") if device_is_available(kind))
