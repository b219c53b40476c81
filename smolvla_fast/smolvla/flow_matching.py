"""Flow matching (arXiv 2210.02747): random noise and times, and the integration from noise to actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .rtc import RTCProcessor


def sample_noise(shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Standard normal fp32, drawn from the default generator of ``device``."""
    return torch.normal(mean=0.0, std=1.0, size=tuple(shape), dtype=torch.float32, device=device)


def sample_time(batch: int, device: torch.device | str) -> Tensor:
    """[B] fp32 in (0.001, 1): ``0.999 · Beta(1.5, 1) + 0.001``, which favours times near noise.

    Drawn on the CPU from the default generator, as LeRobot does (MPS has no Beta sampler).
    """
    beta = torch.distributions.Beta(torch.tensor(1.5), torch.tensor(1.0))
    return (beta.sample(torch.Size((batch,))).to(device) * 0.999 + 0.001).to(torch.float32)


def _at(denoise: Callable[[Tensor, Tensor], Tensor], times: Tensor, x: Tensor) -> Tensor:
    return denoise(x, times)


def euler_integrate(
    denoise: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    num_steps: int,
    *,
    rtc_processor: RTCProcessor | None = None,
    rtc_enabled: bool = False,
    inference_delay: int | None = None,
    prev_chunk_left_over: Tensor | None = None,
    execution_horizon: int | None = None,
) -> Tensor:
    """``x ← x - v(x, t) / N`` for ``t = 1, 1 - 1/N, ... 1/N``.

    denoise    (x [B, S, A], time [B] fp32) -> velocity [B, S, A]
    noise      [B, S, A], left untouched
    num_steps  N >= 1, ValueError otherwise
    The other arguments are those of ``RTCProcessor.denoise_step``.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if rtc_enabled and rtc_processor is None:
        raise ValueError(
            "rtc_config was enabled after the policy was made: call policy.init_rtc_processor() first"
        )
    dt = -1.0 / num_steps
    x_t = noise
    for step in range(num_steps):
        time = 1.0 + step * dt
        times = torch.tensor(time, dtype=torch.float32, device=noise.device).expand(noise.shape[0])
        if rtc_enabled and rtc_processor is not None:
            v_t = rtc_processor.denoise_step(
                x_t=x_t,
                prev_chunk_left_over=prev_chunk_left_over,
                inference_delay=inference_delay,
                time=time,
                original_denoise_step_partial=partial(_at, denoise, times),
                execution_horizon=execution_horizon,
            )
        else:
            v_t = denoise(x_t, times)
        x_t = x_t + dt * v_t
        if rtc_processor is not None and rtc_processor.is_debug_enabled():
            rtc_processor.track(time=time, x_t=x_t, v_t=v_t)
    return x_t
