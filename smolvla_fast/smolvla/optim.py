"""The training presets of a SmolVLA configuration: AdamW, and a cosine decay after a linear warm-up."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

logger = logging.getLogger(__name__)


@dataclass
class AdamWConfig:
    """AdamW (arXiv 1711.05101). The training loop clips by ``grad_clip_norm``; the optimizer does not."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    grad_clip_norm: float = 10.0

    def build(self, params: Iterable[Any], fused: bool | None = None) -> torch.optim.AdamW:
        """An optimizer over parameters or parameter groups.

        fused  use torch's one-kernel update, which rounds differently; None: torch's choice, as in LeRobot
        """
        return torch.optim.AdamW(
            params, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused
        )


@dataclass
class CosineDecayWithWarmupSchedulerConfig:
    """Linear from ``peak_lr / (warmup + 1)`` to ``peak_lr``, then half a cosine from step 0 down to ``decay_lr``.

    A run shorter than ``num_decay_steps`` shortens both parts in proportion, so that it still ends at ``decay_lr``.
    """

    num_warmup_steps: int
    num_decay_steps: int
    peak_lr: float
    decay_lr: float

    def build(self, optimizer: torch.optim.Optimizer, num_training_steps: int) -> LambdaLR:
        """A scheduler to step once per optimizer step."""
        warmup, decay = self.num_warmup_steps, self.num_decay_steps
        if num_training_steps < decay:
            warmup = int(warmup * (num_training_steps / decay))
            decay = num_training_steps
            logger.info("learning rate schedule shortened to %d steps, %d of them warm-up", decay, warmup)
        floor = self.decay_lr / self.peak_lr

        def factor(step: int) -> float:
            if step < warmup:
                first = 1 / (warmup + 1)
                return first if step <= 0 else (first - 1) * (1 - step / warmup) + 1
            cosine = 0.5 * (1 + math.cos(math.pi * min(step, decay) / decay))
            return (1 - floor) * cosine + floor

        return LambdaLR(optimizer, factor, -1)
