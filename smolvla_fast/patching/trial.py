"""A trial: on what is unread or was never tried, stock and the engine compute the same chunk, and the engine has to prove
itself before it serves.

The first call of each kind returns stock's chunk. Ours is compared with it by the bound of the tier, and so is that of a
second call of the kind with drawn numbers, on which both are timed. Right and not slower: calls of that kind are served
from then on. Else stock serves them, with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference import Engine, chunk_settings
from ..ops.memory import is_out_of_memory
from .call_rules import Call
from .inputs import drawn_like
from .judge import Judgement, Stock
from .rtc import guided

MARGIN = 1.1
"""How much longer than stock's the engine's median may take: single chunks scatter by as much on a busy machine."""
CLEAR = 0.8
"""The share of stock's time below which the first round decides."""
ROUNDS = 5
"""Rounds after which the medians decide, where the first does not."""


class Kind(NamedTuple):
    """What decides which code a call runs through. Faults may show in one kind and not in another.

    about     of what is untried: sources, device; and the tier and the backend that are tried
    settings  steps, periods and prefix length of the model, dtypes of images, plain values of its configuration
    present   whether a camera is there, not masked: of each camera one a sample
    language  for which sample it is padded; whether all lengths are alike, and padding is behind
    guidance  of a guided call: what its code branches on, and plain values of its configuration; else None
    """

    about: tuple[Hashable, ...]
    settings: tuple[Hashable, ...]
    batch: int
    cameras: int
    present: tuple[tuple[bool, ...], ...]
    language: tuple[bool, ...]
    guidance: tuple[Hashable, ...] | None

    def __str__(self) -> str:
        missing = [str(i) for i, each in enumerate(self.present, 1) if not all(each)]
        steps = self.settings[0]
        parts = [
            f"{self.about[-2]}",
            f"{steps} step{'s' * (steps != 1)}",
            f"batch {self.batch}",
            f"{self.cameras} camera{'s' * (self.cameras != 1)}"
            + (f" (number {', '.join(missing)} masked)" if missing else ""),
            _language(*self.language),
            "unguided"
            if self.guidance is None
            else "guided " + " ".join(each for each in self.guidance if isinstance(each, str)),
        ]
        return ", ".join(parts)


def _language(*found: bool) -> str:
    *filled, alike, behind = found
    said = "language of full length" if all(filled) else "language padded"
    return said + ("" if alike else " to other lengths") + ("" if behind else " in front")


class Verdict(NamedTuple):
    """passed  whether the engine serves this kind      text  with figures, for ``status`` and the log"""

    passed: bool
    text: str


KEYWORDS = {"inference_delay", "prev_chunk_left_over", "execution_horizon"}


def unknown_keyword(call: Call) -> str | None:
    """The keyword to which an unread release may give a meaning: the engine knows none."""
    for name in call.kwargs or ():
        if name not in KEYWORDS:
            return f"keyword {name!r} is unknown to this version; accepted are {', '.join(sorted(KEYWORDS))}"
    return None


def _plain(config: Any) -> frozenset[tuple[str, Any]]:
    """What of a configuration compares by value: an unread release may read any of it."""
    found = getattr(config, "__dict__", {}).items()
    return frozenset(
        (name, each) for name, each in found if isinstance(each, bool | int | float | str | None)
    )


def kind_of(model: Any, call: Call, about: tuple[Hashable, ...]) -> Kind:
    """The kind of a call that the rules let pass."""
    kwargs = call.kwargs or {}
    # One copy each: reading a mask waits for the device.
    present = tuple(map(tuple, torch.stack(list(call.image_masks)).cpu().tolist()))
    language = call.token_masks.cpu().long()
    lengths = language.sum(dim=1)
    filled = (lengths == language.shape[1]).tolist()
    alike, behind = bool((lengths == lengths[0]).all()), bool((language.diff(dim=1) <= 0).all())
    dtypes = tuple(sorted({str(each.dtype) for each in call.images}))
    return Kind(
        about, (*chunk_settings(model), dtypes, _plain(model.config)), len(call.state), len(call.images), present,
        (*filled, alike, behind), _guidance(model, kwargs) if guided(model, kwargs) else None,
    )  # fmt: skip


def _guidance(model: Any, kwargs: dict[str, Any]) -> tuple[Hashable, ...]:
    """What LeRobot's guidance branches on. Delay and leftovers move with every call; whether they are there does not."""
    config, left = model.rtc_processor.rtc_config, kwargs["prev_chunk_left_over"]
    schedule = config.prefix_attention_schedule
    horizon = kwargs.get("execution_horizon")
    horizon = config.execution_horizon if horizon is None else horizon
    delay, rows = int(kwargs["inference_delay"]), left.shape[-2]
    return (
        getattr(schedule, "name", str(schedule)),
        f"limit {float(config.max_guidance_weight):g}",
        f"horizon {int(horizon)}",
        "delayed" if delay else "no delay",
        "delay within horizon" if delay < min(horizon, rows) else "delay beyond horizon",
        "whole chunk left" if rows == model.config.chunk_size else "part of a chunk left",
        f"{left.ndim} dimensions",
        _plain(config),
        "full width" if left.shape[-1] == model.config.max_action_dim else "padded width",
    )


def about_engine(model: Any, engine: Engine) -> tuple[Hashable, ...]:
    """What else a verdict is about: where and in what dtypes weights lie, the plan, tier and backend."""
    weights = frozenset((str(each.device), each.dtype) for each in model.parameters())
    plan = engine.products.plan
    chosen = None if plan is None else frozenset(plan.choices.items())
    return weights, chosen, engine.tier.name, engine.ops.backend


def judged(
    model: Any,
    engine: Engine,
    call: Call,
    *,
    act: Callable[[Call], Tensor],
    stock: Callable[[Call], Tensor],
) -> tuple[Tensor, Verdict]:
    """Stock's chunk of the call, and whether the engine may compute the next of this kind.

    A second call of the kind is drawn: a fault can hide behind what is zero or alike in the first. It is what is timed,
    for by then both sides have built, compiled and captured what they need.

    act, stock  compute a chunk, the engine's and stock's way      raises  what stock raises
    """
    chunk = stock(call)
    try:
        return chunk, _verdict(model, engine, call, chunk, act, stock)
    except Exception as error:  # untried code may raise anything, and stock has an answer
        short = "memory is short" if is_out_of_memory(error) else " ".join(str(error).split())[:300]
        return chunk, Verdict(False, f"the engine cannot compute it: {type(error).__name__}: {short}")


def _verdict(
    model: Any,
    engine: Engine,
    call: Call,
    chunk: Tensor,
    act: Callable[[Call], Tensor],
    stock: Callable[[Call], Tensor],
) -> Verdict:
    found = _judge(model, engine, call, chunk, act(call))
    if not found.passed:
        return _refused(found)
    call, device = drawn_like(model, call), chunk.device
    chunk, seconds = _timed(partial(stock, call), device)
    fast, ours = _timed(partial(act, call), device)
    second = _judge(model, engine, call, chunk, fast)
    if not second.passed:
        return _refused(second)
    stocks, own = [seconds], [ours]
    while statistics.median(own) > CLEAR * statistics.median(stocks) and len(own) < ROUNDS:
        own.append(_timed(partial(act, call), device)[1])
        stocks.append(_timed(partial(stock, call), device)[1])
    ours, seconds = statistics.median(own), statistics.median(stocks)
    times = f"{1e3 * ours:.4g} ms, stock {1e3 * seconds:.4g} ms"
    if ours > MARGIN * seconds:
        return Verdict(False, f"the engine is slower: {times}")
    error = max(found.error, second.error)
    return Verdict(True, f"off by {error:.2g}, accepted is {found.bound:.2g}; {times}")


def _judge(model: Any, engine: Engine, call: Call, chunk: Tensor, fast: Tensor) -> Judgement:
    assert call.noise is not None
    found = Stock(model, engine.tier, call[:5], call.noise, call.kwargs, chunk)
    return found.judge(fast, always_move=False)


def _refused(found: Judgement) -> Verdict:
    return Verdict(False, f"the engine's chunk is not stock's: {found}")


def _timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = function()
    if device.type != "cpu":
        result.cpu()  # waits, on any device
    return result, time.perf_counter() - started
