"""Real-time chunking as data, from what the caller passes and the live config."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .reference.euler_step import Guidance
from .reference.guidance import guidance_weight, prefix_weights


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


def fits(previous: Tensor, chunk: int, width: int) -> bool:
    """Whether what is left of the previous chunk can be padded to [B, chunk, width]; stock asserts it."""
    if previous.ndim not in (2, 3):
        return False
    rows, columns = previous.shape[-2:]
    return rows <= chunk and columns <= width


def plan_guidance(
    config: Any,
    previous: Tensor,
    delay: int,
    horizon: int | None,
    shape: torch.Size,
    device: torch.device,
    steps: int,
) -> Guidances:
    """Guidance for every step of one chunk.

    config    the live ``RTCConfig``: schedule, execution_horizon, max_guidance_weight
    previous  [T, a] or [B, T, a]  unexecuted actions of the previous chunk, T <= S and a <= A; padded with zeros
    delay     actions that will have run before this chunk arrives        horizon  overrides the config's where given
    shape     [B, S, A] of the chunk
    replaces  the first half of ``RTCProcessor.denoise_step`` of LeRobot
    """
    batch, chunk, width = shape
    previous = (previous if previous.ndim == 3 else previous[None]).to(device)
    horizon = min(config.execution_horizon if horizon is None else horizon, previous.shape[1])
    if previous.shape[1] < chunk or previous.shape[2] < width:
        padded = torch.zeros(batch, chunk, width, device=device)
        padded[:, : previous.shape[1], : previous.shape[2]] = previous
        previous = padded
    schedule = config.prefix_attention_schedule
    weights = prefix_weights(getattr(schedule, "name", schedule), delay, horizon, chunk)[None, :, None]
    weights = weights.to(device, non_blocking=True)
    times = (1.0 + step * (-1.0 / steps) for step in range(steps))
    strengths = torch.stack([guidance_weight(time, config.max_guidance_weight) for time in times])
    return Guidances(previous, weights, strengths.to(device, non_blocking=True))


def guided(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call of ``sample_actions`` is guided by what is left of the chunk before."""
    return bool(model._rtc_enabled() and kwargs.get("prev_chunk_left_over") is not None)


def guidance_reason(model: Any, kwargs: dict[str, Any]) -> str | None:
    """Why real-time chunking sends this call to stock, or None."""
    processor = getattr(model, "rtc_processor", None)
    if processor is not None and processor.is_debug_enabled():
        return "the RTC debug tracker records every step of stock"
    if not guided(model, kwargs):
        return None
    if processor is None or kwargs.get("inference_delay") is None:
        return "RTC without a processor or an inference_delay: stock raises its own error"
    previous = kwargs["prev_chunk_left_over"]
    if previous.dtype is not torch.float32:
        return f"prev_chunk_left_over is {previous.dtype}; float32 is accepted"
    if not fits(previous, model.config.chunk_size, model.config.max_action_dim):
        return f"prev_chunk_left_over {tuple(previous.shape)} does not fit into a chunk: stock raises its own error"
    return None


def guidance_of(model: Any, kwargs: dict[str, Any], noise: Tensor) -> Guidances | None:
    """``plan_guidance`` for one call, or None where it is not guided."""
    if not guided(model, kwargs):
        return None
    return plan_guidance(
        model.rtc_processor.rtc_config,
        kwargs["prev_chunk_left_over"],
        kwargs["inference_delay"],
        kwargs.get("execution_horizon"),
        noise.shape,
        noise.device,
        model.config.num_steps,
    )
