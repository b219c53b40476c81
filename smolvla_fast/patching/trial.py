"""A trial: on what is unread or was never tried, stock and the engine compute the same chunk, and the engine has to prove
itself before it serves.

The first call of each kind returns stock's chunk. Ours is compared with it by the bound of the tier, and timed beside it.
Right and not slower: calls of that kind are served from then on. Else stock serves them, with the reason.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inference import Engine, chunk_settings
from ..ops.memory import is_out_of_memory
from .call_rules import Call
from .judge import Stock
from .rtc import guided

MARGIN = 1.1
"""How much longer than stock's the engine's median may take: single chunks scatter by as much on a busy machine."""
CLEAR = 0.7
"""The share of stock's time below which one round decides; its first call may have been slow for being the first."""
ROUNDS = 5
"""Rounds after which the medians decide, where the first does not."""


class Kind(NamedTuple):
    """What decides which code a call runs through. Faults may show in one kind and not in another.

    about     of what is untried: sources, device; and the tier and the backend that are tried
    settings  steps, periods and prefix length of the model, dtypes of images
    present   whether a camera is there, not masked: of each camera one a sample
    language  for which sample it is padded; whether all lengths are alike, and padding is behind
    guidance  of a guided call: what its code branches on, else None
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
            "unguided" if self.guidance is None else "guided " + " ".join(map(str, self.guidance)),
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
        about, (*chunk_settings(model), dtypes), len(call.state), len(call.images), present,
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
        "full width" if left.shape[-1] == model.config.max_action_dim else "padded width",
    )


def judged(
    model: Any,
    engine: Engine,
    inputs: tuple[Any, ...],
    noise: Tensor,
    kwargs: dict[str, Any],
    *,
    act: Callable[[], Tensor],
    stock: Callable[[], Tensor],
) -> tuple[Tensor, Verdict]:
    """Stock's chunk, and whether the engine may compute the next of this kind.

    act, stock  compute the chunk, the engine's and stock's way      raises  what stock raises
    """
    chunk, seconds = _timed(stock, noise.device)
    try:
        act()  # builds, compiles and captures: no chunk to time
        fast, ours = _timed(act, noise.device)
        found = Stock(model, engine.tier, inputs, noise, kwargs, chunk).judge(fast, always_move=False)
    except Exception as error:  # untried code may raise anything, and stock has an answer
        short = "memory is short" if is_out_of_memory(error) else " ".join(str(error).split())[:300]
        return chunk, Verdict(False, f"the engine cannot compute it: {type(error).__name__}: {short}")
    if not found.passed:
        bound = "equal bits" if engine.tier.stock_order else f"{found.bound:.2g}"
        return chunk, Verdict(
            False, f"the engine's chunk is not stock's: off by {found.error:.2g}, accepted is {bound}"
        )
    stocks, own = [seconds], [ours]
    while statistics.median(own) > CLEAR * statistics.median(stocks) and len(own) < ROUNDS:
        stocks.append(_timed(stock, noise.device)[1])
        own.append(_timed(act, noise.device)[1])
    ours, seconds = statistics.median(own), statistics.median(stocks)
    times = f"{1e3 * ours:.4g} ms, stock {1e3 * seconds:.4g} ms"
    if ours > MARGIN * seconds:
        return chunk, Verdict(False, f"the engine is slower: {times}")
    return chunk, Verdict(True, f"off by {found.error:.2g}, accepted is {found.bound:.2g}; {times}")


def _timed(function: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    started = time.perf_counter()
    result = function()
    if device.type != "cpu":
        result.cpu()  # waits, on any device
    return result, time.perf_counter() - started
