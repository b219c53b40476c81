"""The candidates of one op at one shape class: which there are, whether each is right, how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..ops.memory import is_out_of_memory
from .check import Contract
from .recorder import Recorded
from .result import Choice, Timed
from .stopwatch import Runs, Stopwatch, Times, is_faster, p50, rounds_of, scatter

FEWEST, MOST = 3, 11
"""Rounds of a candidate."""
HOPELESS = 1.5
"""A candidate this many times slower than the best so far gets no further round."""


def measure(recorded: Recorded, choice: Choice, watch: Stopwatch, seconds: float) -> None:
    """Checks and times the candidates of one shape class, and fills in its choice.

    seconds  after which no candidate is begun but the default
    """
    deadline = time.perf_counter() + seconds
    runs: Runs = {}
    calls = len(recorded.calls)
    with torch.cuda.device(watch.device) if watch.device.type == "cuda" else nullcontext():
        try:
            names = candidates(recorded)
            contract = Contract(recorded) if len(names) > 1 else None
        except Exception as error:  # no truth here, as where fp64 does not fit: this op keeps its default
            choice.timed.append(Timed(choice.default, refused=said(error)))
            return
        if contract is None:
            choice.reached = True  # nobody competes
            return
        for name in names:
            if name != choice.default and time.perf_counter() > deadline:
                break
            timed = Timed(name)
            choice.timed.append(timed)
            try:
                function = recorded.choice.function(name)
                timed.error, timed.allowed, timed.refused = contract.judge(choice.op, function)
                if timed.refused is None:
                    runs[name] = watch.prepared(sweep_of(recorded, function))
            except Exception as error:  # a foreign kernel may raise anything: it is no candidate here then
                timed.refused = said(error)
        if choice.default not in runs:
            return  # nothing to compare with

        def more(count: int, times: Times) -> bool:
            if count >= FEWEST:
                drop_hopeless(runs, times, choice.default)
            return count < FEWEST or (count < MOST and time.perf_counter() < deadline)

        times = rounds_of(runs, more)
    for timed in choice.timed:
        if rounds := times.get(timed.candidate):
            timed.p50_ms, timed.scatter_ms = p50(rounds) / calls, scatter(rounds) / calls
    choice.reached = len(times) > 1 or len(choice.timed) == len(names)
    ahead = [name for name in runs if is_faster(times[name], times[choice.default])]
    choice.chosen = min(ahead, key=lambda name: p50(times[name]), default=choice.default)


def said(error: Exception) -> str:
    short = "memory is short" if is_out_of_memory(error) else " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {short}"


def sweep_of(recorded: Recorded, function: Callable[..., Any]) -> Callable[[], Tensor]:
    """One call after the other with operands of their own, as the layers of a chunk make them, prepared rows included."""
    calls = [each.fresh() for each in recorded.calls]

    def sweep() -> Tensor:
        result = None
        for call in calls:
            result = call.as_in_a_chunk(function)
        first = result[0] if isinstance(result, tuple) else result
        return first if isinstance(first, Tensor) else calls[-1].args[0]

    return sweep


def candidates(recorded: Recorded) -> list[str]:
    """The default first; of Triton each tile that its cost model ranks."""
    choice, shape = recorded.choice, recorded.shape
    default = choice.default(shape)
    names = [default, *(name for name in choice.names(shape) if name != default)]
    if "triton" not in names:
        return names
    from ..kernels.tiles import recording, tile_name

    call = recorded.calls[0].fresh()
    with recording() as asked:
        call.as_in_a_chunk(choice.function("triton"))
    tiles = [f"triton {tile_name(tile)}" for tile in asked[0].tiles[1:]] if asked else []
    return [*names, *tiles]


def drop_hopeless(runs: Runs, times: Times, default: str) -> None:
    measured = {name: p50(rounds) for name, rounds in times.items() if rounds}
    for name in [n for n in runs if n != default and n in measured]:
        if measured[name] > HOPELESS * min(measured.values()):
            del runs[name]
