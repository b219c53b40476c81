"""Real-time chunking (RTC, arXiv 2506.07339): settings, the guided denoising step, and its debug record.

The maths is in ``smolvla_fast.ops.reference.guidance``. LeRobot differentiates ``x - t·v`` with ``v`` held constant; that
Jacobian is the identity, so this takes no gradient and also works under ``torch.inference_mode``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..ops.reference.guidance import guidance_weight, guide, prefix_weights
from .features import parse_enum


class RTCAttentionSchedule(str, Enum):
    """How the weight of the previous chunk falls between the inference delay and the execution horizon."""

    ZEROS = "ZEROS"
    ONES = "ONES"
    LINEAR = "LINEAR"
    EXP = "EXP"


@dataclass
class RTCConfig:
    """Settings of real-time chunking.

    max_guidance_weight  upper bound of the correction's strength, > 0
    execution_horizon    number of actions guided towards the previous chunk
    debug, debug_maxlen  keep a record of the last ``debug_maxlen`` denoising steps
    """

    enabled: bool = True
    prefix_attention_schedule: RTCAttentionSchedule = RTCAttentionSchedule.LINEAR
    max_guidance_weight: float = 10.0
    execution_horizon: int = 10
    debug: bool = False
    debug_maxlen: int = 100

    def __post_init__(self) -> None:
        self.prefix_attention_schedule = parse_enum(
            RTCAttentionSchedule, self.prefix_attention_schedule, "rtc_config.prefix_attention_schedule"
        )
        for name in ("max_guidance_weight", "debug_maxlen"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"rtc_config.{name} must be positive, got {value}")

    @classmethod
    def parse(cls, value: Any) -> RTCConfig | None:
        """From None, JSON, or any object with these attributes (LeRobot's ``RTCConfig``)."""
        if value is None or isinstance(value, cls):
            return value
        names = [f.name for f in fields(cls)]
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(names))
            if unknown:
                raise ValueError(f"rtc_config has unknown fields {unknown}; accepted are {names}")
            return cls(**value)
        return cls(**{name: getattr(value, name) for name in names if hasattr(value, name)})


@dataclass
class DebugStep:
    """The record of one denoising step; tensors are copies."""

    step_idx: int = 0
    x_t: Tensor | None = None
    v_t: Tensor | None = None
    x1_t: Tensor | None = None
    correction: Tensor | None = None
    err: Tensor | None = None
    weights: Tensor | None = None
    guidance_weight: float | Tensor | None = None
    time: float | None = None
    inference_delay: int | None = None
    execution_horizon: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


class Tracker:
    """The last ``maxlen`` denoising steps, one entry per time; a second report for a time completes its entry."""

    def __init__(self, enabled: bool = False, maxlen: int | None = 100):
        self.enabled = enabled
        self._steps: dict[float, DebugStep] = {}
        self._maxlen = maxlen
        self._counter = 0

    def __len__(self) -> int:
        return len(self._steps)

    def reset(self) -> None:
        self._steps.clear()
        self._counter = 0

    def get_all_steps(self) -> list[DebugStep]:
        return list(self._steps.values())

    def track(self, time: float | Tensor, **values: Any) -> None:
        if not self.enabled:
            return
        time = time.item() if isinstance(time, Tensor) else time
        # Times of different calls that differ in the last bits are the same step.
        key = round(time, 6)
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = DebugStep(step_idx=self._counter, time=time)
            self._counter += 1
            if self._maxlen is not None and len(self._steps) > self._maxlen:
                del self._steps[next(iter(self._steps))]
        for name, value in values.items():
            if value is None:
                continue
            if isinstance(value, Tensor) and name != "guidance_weight":
                value = value.detach().clone()
            if name in DebugStep.__dataclass_fields__:
                setattr(step, name, value)
            else:
                step.metadata[name] = value


class RTCProcessor:
    """Guides each denoising step towards the rest of the previous chunk. Corresponds to LeRobot's class of this name."""

    def __init__(self, rtc_config: RTCConfig):
        self.rtc_config = rtc_config
        self.tracker = Tracker(enabled=True, maxlen=rtc_config.debug_maxlen) if rtc_config.debug else None

    def track(self, time: float | Tensor, **values: Any) -> None:
        if self.tracker is not None:
            self.tracker.track(time, **values)

    def get_all_debug_steps(self) -> list[DebugStep]:
        return self.tracker.get_all_steps() if self.tracker is not None else []

    def is_debug_enabled(self) -> bool:
        return self.tracker is not None and self.tracker.enabled

    def reset_tracker(self) -> None:
        if self.tracker is not None:
            self.tracker.reset()

    def get_prefix_weights(self, start: int, end: int, total: int) -> Tensor:
        """The configured schedule over ``total`` actions; see ``reference.guidance.prefix_weights``."""
        name = "rtc_config.prefix_attention_schedule"
        schedule = parse_enum(RTCAttentionSchedule, self.rtc_config.prefix_attention_schedule, name)
        return prefix_weights(schedule.value, start, end, total)

    def denoise_step(
        self,
        x_t: Tensor,
        prev_chunk_left_over: Tensor | None,
        inference_delay: int | None,
        time: float,
        original_denoise_step_partial: Callable[[Tensor], Tensor],
        execution_horizon: int | None = None,
    ) -> Tensor:
        """The velocity at ``x_t``, corrected if there is a previous chunk.

        x_t                   [B, S, A] or [S, A]  fp32
        prev_chunk_left_over  [B, <=S, <=A] or [<=S, <=A], padded with zeros; None for the first chunk
        inference_delay       actions that will have been executed before this chunk is ready
        execution_horizon     overrides the configured one; never beyond the previous chunk's length
        returns               the shape of x_t
        raises                TypeError without a delay, ValueError when the previous chunk is larger than x_t
        """
        if prev_chunk_left_over is None:
            return original_denoise_step_partial(x_t)
        if inference_delay is None:
            raise TypeError("inference_delay must be an integer when prev_chunk_left_over is given, got None")

        squeezed = x_t.ndim < 3
        x_t = (x_t.unsqueeze(0) if squeezed else x_t).detach()
        previous = (
            prev_chunk_left_over if prev_chunk_left_over.ndim == 3 else prev_chunk_left_over.unsqueeze(0)
        )
        horizon = self.rtc_config.execution_horizon if execution_horizon is None else execution_horizon
        horizon = min(horizon, previous.shape[1])
        previous = _fit_previous(previous, x_t)

        weights = self.get_prefix_weights(inference_delay, horizon, x_t.shape[1]).to(x_t.device)[
            None, :, None
        ]
        strength = guidance_weight(time, self.rtc_config.max_guidance_weight)
        v_t = original_denoise_step_partial(x_t)
        guided = guide(v_t, x_t, previous, weights, time, strength)

        if self.is_debug_enabled():
            x1_t = x_t - time * v_t
            err = (previous - x1_t) * weights
            shown = {"x1_t": x1_t, "err": err, "correction": err}
            self.track(
                time,
                **{name: value.squeeze(0) if squeezed else value for name, value in shown.items()},
                weights=weights,
                guidance_weight=strength,
                inference_delay=inference_delay,
                execution_horizon=horizon,
            )
        return guided.squeeze(0) if squeezed else guided


def _fit_previous(previous: Tensor, x_t: Tensor) -> Tensor:
    """``previous`` padded with zeros to the shape of ``x_t``."""
    fits = previous.shape[0] in (1, x_t.shape[0]) and all(
        p <= x for p, x in zip(previous.shape[1:], x_t.shape[1:], strict=False)
    )
    if previous.ndim != 3 or not fits:
        raise ValueError(
            f"prev_chunk_left_over of shape {tuple(previous.shape)} does not fit a chunk of shape "
            f"{tuple(x_t.shape)}: "
            "batch must agree (or be 1), time and action width may not be larger"
        )
    if previous.shape == x_t.shape:
        return previous
    padded = torch.zeros(x_t.shape, device=x_t.device)
    padded[:, : previous.shape[1], : previous.shape[2]] = previous
    return padded
