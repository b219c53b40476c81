"""Where the time of a chunk goes: milliseconds by stage, for a stock and for a patched policy."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ..measure.rounds import fresh, synchronize, timed_ms
from ..ops import table

STAGES = tuple(table.STAGES)

_clock: ContextVar[tuple[torch.device, defaultdict[str, float]] | None] = ContextVar(
    "smolvla_fast_clock", default=None
)


def is_timed() -> bool:
    """Whether ``stage_times`` is running in this context: then stages run one by one, not as one graph."""
    return _clock.get() is not None


@contextmanager
def section(name: str) -> Iterator[None]:
    """Adds the time spent inside to stage ``name`` while ``stage_times`` is running in this context; else free."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    device, times = clock
    synchronize(device)
    start = time.perf_counter()
    yield
    synchronize(device)
    times[name] += (time.perf_counter() - start) * 1e3


def stage_times(
    policy: Any, batch: dict[str, Any], noise: Tensor, stock_sampler: bool = False
) -> dict[str, float]:
    """Run one chunk and return its time in ms: "vision", "prefix", "denoise", "other" and "total".

    policy  a SmolVLA policy, patched or not        batch  as ``predict_action_chunk`` takes it; not changed
    noise   [B, S, A] fp32, so that no random state moves

    stock_sampler  of a patched policy: LeRobot's own sampler, which calls the policy's layers and steps one by one

    That sampler is timed on a shallow copy that shares the weights, with three methods replaced.
    """
    clock: defaultdict[str, float] = defaultdict(float)
    batch = fresh(batch)
    if stock_sampler or not hasattr(type(policy.model), "stock_class"):
        policy = _with_stock_sections(policy)
    token = _clock.set((noise.device, clock))
    try:
        total, _ = timed_ms(lambda: policy.predict_action_chunk(batch, noise=noise), noise.device)
    finally:
        _clock.reset(token)
    times = {stage: clock[stage] for stage in STAGES}
    return {**times, "other": total - sum(times.values()), "total": total}


def apart(module: Any, **children: Any) -> Any:
    """A shallow copy of a module with other children: weights are shared, namespaces are not."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin


def _with_stock_sections(policy: Any) -> Any:
    """A twin whose ``sample_actions`` is stock's; what that calls is the policy's own, timed."""
    own, own_pair = policy.model, policy.model.vlm_with_expert
    pair = apart(own_pair)
    model = apart(own, vlm_with_expert=pair)
    for each in (model, pair):
        each.__class__ = getattr(type(each), "stock_class", type(each))

    def denoise_step(*args: Any, **kwargs: Any) -> Any:
        with section("denoise"):
            return own.denoise_step(*args, **kwargs)

    def prefill(*args: Any, **kwargs: Any) -> Any:
        with section("prefix"):
            return own_pair.forward(*args, **kwargs)

    def embed_image(*args: Any, **kwargs: Any) -> Any:
        with section("vision"):
            return own_pair.embed_image(*args, **kwargs)

    model.__dict__["denoise_step"] = denoise_step
    pair.__dict__.update(forward=prefill, embed_image=embed_image)
    return apart(policy, model=model)
