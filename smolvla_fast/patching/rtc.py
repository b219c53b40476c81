"""Real-time chunking as data, from what the caller passes and the live config."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..model.dense import why_not_dense
from ..ops.reference.euler_step import Guidances
from ..ops.reference.guidance import SCHEDULES, guidance_weight, prefix_weights


def guided(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call of ``sample_actions`` is guided by what is left of the chunk before."""
    return bool(model._rtc_enabled() and kwargs.get("prev_chunk_left_over") is not None)


def guidance_reason(model: Any, kwargs: dict[str, Any], batch: int, device: torch.device) -> str | None:
    """Why real-time chunking sends this call to stock, or None. What is accepted is said in full: whatever else a caller
    passes is for stock to answer or to refuse."""
    processor = getattr(model, "rtc_processor", None)
    if processor is not None and processor.is_debug_enabled():
        return "the RTC debug tracker records every step of stock"
    if not model._rtc_enabled():
        return None
    if processor is None:
        return "RTC without a processor: stock raises its own error"
    if not guided(model, kwargs):
        return None
    config, previous = processor.rtc_config, kwargs["prev_chunk_left_over"]
    horizon = kwargs.get("execution_horizon")
    for name, value, least in (
        ("inference_delay", kwargs.get("inference_delay"), 0),
        ("execution_horizon", config.execution_horizon if horizon is None else horizon, 1),
    ):
        if not isinstance(value, Integral) or value < least:
            return f"{name}={value!r}; accepted are integers of {least} or more"
    schedule, limit = config.prefix_attention_schedule, config.max_guidance_weight
    if getattr(schedule, "name", schedule) not in SCHEDULES:
        return f"prefix_attention_schedule={schedule!r}; accepted are {', '.join(SCHEDULES)}"
    if not isinstance(limit, Real):
        return f"max_guidance_weight={limit!r}; accepted are numbers"
    why = why_not_dense(previous)
    if why is not None or previous.dtype is not torch.float32 or previous.device != device:
        found = f"is {why}" if why is not None else f"is {previous.dtype} on {previous.device}"
        return f"prev_chunk_left_over {found}; accepted is a float32 tensor on {device}"
    chunk, width = model.config.chunk_size, model.config.max_action_dim
    full = (batch, chunk, width)
    shape = tuple(previous.shape) if previous.ndim == 3 else (1, *previous.shape)
    fits = len(shape) == 3 and all(1 <= n <= most for n, most in zip(shape[1:], full[1:], strict=True))
    # Stock pads rows and columns, and one chunk then serves a whole batch; a chunk of full size it does not spread.
    if not fits or not (shape == full or (shape[0] in (1, batch) and shape[1:] != full[1:])):
        return f"prev_chunk_left_over {tuple(previous.shape)} does not fit into a chunk {full}: stock has its own answer"
    return None


def guidance_of(model: Any, kwargs: dict[str, Any], noise: Tensor) -> Guidances | None:
    """Guidance for every step of one chunk, or None where it is not guided.

    kwargs    as ``guidance_reason`` lets them pass: prev_chunk_left_over [T, a] or [B, T, a], the unexecuted
              actions of the previous chunk, T <= S and a <= A, padded here with zeros; inference_delay, actions that will
              have run before this chunk arrives; execution_horizon, in place of the config's where given
    noise     [B, S, A] of the chunk
    replaces  the first half of ``RTCProcessor.denoise_step`` of LeRobot
    """
    if not guided(model, kwargs):
        return None
    config, steps, device = model.rtc_processor.rtc_config, model.config.num_steps, noise.device
    previous, horizon = kwargs["prev_chunk_left_over"].to(device), kwargs.get("execution_horizon")
    previous = previous if previous.ndim == 3 else previous[None]
    horizon = min(config.execution_horizon if horizon is None else horizon, previous.shape[1])
    if previous.shape[1] < noise.shape[1] or previous.shape[2] < noise.shape[2]:
        padded = torch.zeros(noise.shape, device=device)
        padded[:, : previous.shape[1], : previous.shape[2]] = previous
        previous = padded
    schedule = getattr(config.prefix_attention_schedule, "name", config.prefix_attention_schedule)
    weights = prefix_weights(schedule, kwargs["inference_delay"], horizon, noise.shape[1])[None, :, None]
    times = (1.0 + step * (-1.0 / steps) for step in range(steps))
    strengths = torch.stack([guidance_weight(time, config.max_guidance_weight) for time in times])
    # Elsewhere than on CUDA a copy that does not block may read memory that is free by then.
    weights, strengths = (
        each.to(device, non_blocking=device.type == "cuda") for each in (weights, strengths)
    )
    return Guidances(previous, weights, strengths)
