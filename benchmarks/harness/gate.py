"""No speed without green: a check stands before every timing, and a red one leaves no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from smolvla_fast.measure.rounds import error, side_by_side, summary, timed_ms

# The compiler may reorder every sum. fp32: 1e-4 is far above what that can do, far below a wrong mask;
# mixed: bf16 rounds at 4e-3, and 26 layers and 10 steps of other roundings stay below 5e-2.
COMPILED_BOUND = {"fp32": 1e-4, "mixed": 5e-2}


class Red(AssertionError):
    """The thing to be timed computes something wrong."""


def timed(
    benchmark: Any,
    check: Callable[[], dict[str, Any]],
    run: Callable[[], Any],
    rounds: int,
    beside: Callable[[], Any] | None = None,
) -> None:
    """Runs the check, then the timing, and puts the check's findings and the percentiles into ``extra_info``.

    check   returns facts for ``extra_info``; raises AssertionError where the result is wrong
    run     one round, until the device is done; called once more beforehand, to warm up
    beside  stock's round, run before each: ``ratio`` is then the median over rounds of its time by the one after it, which
            a machine that grows slower meanwhile does not move
    Fails the test before anything is timed where the check is red.
    """
    try:
        facts = check()
    except AssertionError as reason:
        pytest.fail(f"red, so it is not timed: {reason}", pytrace=False)
    benchmark.extra_info.update(facts)
    stock_ms: list[float] = []

    def stock() -> None:
        assert beside is not None
        stock_ms.append(timed_ms(beside, "cpu")[0])  # it waits for its device itself, as run does

    setup = {} if beside is None else {"setup": stock}
    benchmark.pedantic(run, rounds=rounds, warmup_rounds=1, iterations=1, **setup)
    own_ms = [1e3 * seconds for seconds in benchmark.stats.stats.data]
    benchmark.extra_info.update(summary(own_ms))
    if beside is not None:
        stock_ms = stock_ms[1 : 1 + len(own_ms)]  # without the warm-up's
        benchmark.extra_info.update(beside_ms=stock_ms, ratio=side_by_side(stock_ms, own_ms))


def check_chunk(chunk: Tensor, stock: Tensor, bound: float) -> dict[str, Any]:
    """A chunk's errors against stock's; raises Red where relative L2 exceeds the bound or is not finite.

    bound   0 asks for equal bits
    """
    if not torch.isfinite(chunk).all():
        raise Red("the chunk holds values that are not finite")
    found = error(chunk, stock)
    if bound == 0 and not torch.equal(chunk, stock):
        raise Red(f"bits differ from stock's: max abs {found['max_abs']:.3g}")
    if found["rel_l2"] > bound:
        raise Red(f"relative L2 to stock is {found['rel_l2']:.3g}, allowed {bound:.3g}")
    return {**found, "bound": bound}


def check_report(report: dict[str, Any]) -> dict[str, Any]:
    """The errors of a ``verify`` report; raises Red where it did not pass."""
    kept = {key: report[key] for key in ("rel_l2", "max_abs", "bound", "stock_rel_l2", "stock_max_abs")}
    if not report["passed"]:
        raise Red(f"verify: relative L2 to fp32 is {report['rel_l2']:.3g}, allowed {report['bound']:.3g}")
    return kept
