"""A chunk before the first real one, so that this is not slow: what is built, compiled or captured is so by then."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..measure.rounds import synchronize
from .call_rules import Call
from .eligibility import INFERENCE
from .inputs import chunk_inputs, made_inputs, made_noise
from .rtc import guidance_reason, guided
from .served import uncounted


def warm_up(policy: Any, example: Any) -> str | None:
    """One chunk and, with real-time chunking on, a guided one: the two graphs that a robot replays.

    No chunk where every one goes to stock: RTC's debug tracker would keep a record of these, RTC without a processor raises.
    returns  why stock serves such calls whatever the model, as under autocast, or None
    """
    model = policy.model
    device = model.state_proj.weight.device
    reason = guidance_reason(model, {}, 1, device)
    if reason is not None:
        return reason
    calls: list[dict[str, Any]] = [{}]
    # Guidance is data of one shape: leftovers are padded to a chunk, so one number stands for any of them.
    left = dict(inference_delay=0, prev_chunk_left_over=torch.ones(1, 1, device=device))
    if guided(model, left) and guidance_reason(model, left, 1, device) is None:
        calls.append(left)
    for kwargs in calls:
        with uncounted():
            reason = _one(policy, example, kwargs)
    return reason


def _one(policy: Any, example: Any, kwargs: dict[str, Any]) -> str | None:
    """One chunk of an example batch, or of drawn numbers where it is True."""
    model = policy.model
    with torch.no_grad():
        inputs = made_inputs(model) if example is True else chunk_inputs(policy, example)
        noise = made_noise(model, len(inputs[-1]))
        model.sample_actions(*inputs, noise=noise, **kwargs)
        return INFERENCE.call_reason(model, Call(*inputs, noise, kwargs=kwargs))


def took(device: torch.device, started: float, checked: float) -> str:
    """How long a warm-up took, in its parts: a look through the model; the first chunk, which compiles and captures."""
    synchronize(device)
    ended = time.perf_counter()
    return f"; warm-up {ended - started:.2f} s (checks {checked - started:.2f} s, first chunk {ended - checked:.2f} s)"
