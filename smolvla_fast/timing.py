"""Where the time of a chunk goes: milliseconds by stage, for a stock and for a patched policy."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

STAGES = ("vision", "prefix", "denoise")

_clock: ContextVar[defaultdict[str, float] | None] = ContextVar("smolvla_fast_clock", default=None)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def section(name: str) -> Iterator[None]:
    """Adds the time spent inside to stage ``name`` while ``stage_times`` is running in this context; else free."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    _synchronize()
    start = time.perf_counter()
    yield
    _synchronize()
    clock[name] += (time.perf_counter() - start) * 1e3


def stage_times(policy: Any, batch: dict[str, Any], noise: Tensor) -> dict[str, float]:
    """Run one chunk and return its time in ms: "vision", "prefix", "denoise", "other" and "total".

    policy  a SmolVLA policy, patched or not        batch  as ``predict_action_chunk`` takes it; not changed
    noise   [B, S, A] fp32, so that no random state moves

    A stock policy is timed by replacing three methods on the instance for the length of the call.
    """
    clock: defaultdict[str, float] = defaultdict(float)
    model = policy.model
    token = _clock.set(clock)
    try:
        with _stock_sections(model):
            _synchronize()
            start = time.perf_counter()
            policy.predict_action_chunk(dict(batch), noise=noise)
            _synchronize()
            total = (time.perf_counter() - start) * 1e3
    finally:
        _clock.reset(token)
    times = {stage: clock[stage] for stage in STAGES}
    return {**times, "other": total - sum(times.values()), "total": total}


@contextmanager
def _stock_sections(model: Any) -> Iterator[None]:
    if hasattr(type(model), "stock_class"):
        yield
        return
    pair = model.vlm_with_expert
    inside_step = False

    def denoise_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside_step
        inside_step = True
        with section("denoise"):
            return type(model).denoise_step(model, *args, **kwargs)

    def prefill(*args: Any, **kwargs: Any) -> Any:
        if inside_step:
            return type(pair).forward(pair, *args, **kwargs)
        with section("prefix"):
            return type(pair).forward(pair, *args, **kwargs)

    def embed_image(*args: Any, **kwargs: Any) -> Any:
        with section("vision"):
            return type(pair).embed_image(pair, *args, **kwargs)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (model, "denoise_step", denoise_step),
        (pair, "forward", prefill),
        (pair, "embed_image", embed_image),
    ]
    for owner, name, function in replaced:
        owner.__dict__[name] = function
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            del owner.__dict__[name]
