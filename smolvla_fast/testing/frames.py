"""Camera frames made by code, with what noise and zeros lack: edges, flat areas, shading, sensor noise."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_frame(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One frame, [3, height, width] fp32 in [0, 1]: a table with coloured blocks, a wall and a gripper.

    generator  places and colours everything, so each camera and each seed sees another scene
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    y = torch.linspace(0, 1, height)[:, None]
    x = torch.linspace(0, 1, width)[None, :]
    horizon = float(uniform(0.2, 0.4))
    wall = uniform(0.55, 0.85, 3, 1, 1) * (1 - 0.3 * y)
    planks = 0.06 * torch.sin(40 * x / (0.4 + y) + float(uniform(0, 6)))
    table = torch.tensor([0.62, 0.45, 0.28])[:, None, None] * (0.75 + 0.35 * y) + planks
    frame = torch.where(y < horizon, wall.expand(3, height, width), table)

    for _ in range(5):
        side = float(uniform(0.06, 0.16))
        left, top = float(uniform(0.02, 0.98 - side)), float(uniform(horizon, 0.95 - side))
        colour = uniform(0.05, 0.95, 3, 1, 1)
        inside = (x > left) & (x < left + side)
        shadow = inside.roll(max(1, width // 60), dims=1) & (y > top + side) & (y < top + 1.2 * side)
        frame = torch.where(shadow, 0.55 * frame, frame)
        frame = torch.where(inside & (y > top) & (y < top + side), 0.8 * colour, frame)
        lid = inside & (y > top - 0.3 * side) & (y <= top)
        frame = torch.where(lid, (1.2 * colour).clamp(max=1), frame)

    centre, reach = float(uniform(0.35, 0.65)), float(uniform(0.35, 0.6))
    opening = float(uniform(0.04, 0.1))
    for finger in (centre - opening, centre + opening):
        metal = (x - finger).abs() < 0.02
        frame = torch.where(metal & (y < reach), 0.12 + 0.3 * (x - finger + 0.02) / 0.04, frame)
    palm = ((x - centre).abs() < opening + 0.04) & (y < 0.55 * reach)
    frame = torch.where(palm, torch.full_like(frame, 0.2), frame)

    lamp = 1.1 - 0.6 * ((x - float(uniform(0.2, 0.8))) ** 2 + (y - 0.3) ** 2)
    noise = 0.01 * torch.randn(3, height, width, generator=generator)
    return (frame * lamp + noise).clamp(0, 1)
