"""Finds the plan of one policy, tier and machine.

A chunk is recorded, each candidate of each of its calls is checked against the op contract and timed, and the whole chunk is
timed before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.products import Products
from ..inference import Engine
from ..measure.rounding import FP32_BOUND
from ..measure.rounds import timed_ms
from ..model.precision import TIERS
from ..ops.choice import others
from ..ops.memory import is_out_of_memory
from ..ops.plan import LOOP, PRODUCTS, Plan
from .check import Contract
from .recorder import Recorded, Recorder
from .result import Choice, ChunkTime, Timed, Tuning
from .stopwatch import Runs, Stopwatch, Times, is_faster, p50, rounds_of, scatter

Progress = Callable[[float, str], None]
"""share done, what is being done"""

FEWEST, MOST = 3, 11
"""Rounds of a candidate."""
CHUNKS = 5
"""Rounds of the whole chunk."""
HOPELESS = 1.5
"""A candidate this many times slower than the best so far gets no further round."""


def tune(
    model: Any,
    products: Products,
    inputs: tuple[Any, ...],
    *,
    seconds: float = 90.0,
    known: Mapping[str, str] | None = None,
    key: dict[str, Any] | None = None,
    progress: Progress = lambda share, doing: None,
) -> Tuning:
    """Measure who serves the chunks of this model fastest, here and now.

    products   of the tier and backend that are to be tuned; its own plan is not asked
    inputs     what ``Engine.act`` takes behind the model: one observation and its noise
    seconds    the time it may take; what is not reached keeps its default
    known      choices of an earlier plan for other shapes, which the new one keeps
    """
    with torch.no_grad():
        return _Tuner(model, products, inputs, seconds, progress).run(dict(known or {}), key or {})


class _Tuner:
    def __init__(
        self, model: Any, products: Products, inputs: tuple[Any, ...], seconds: float, progress: Progress
    ) -> None:
        self._model, self._products, self._inputs = model, products, inputs
        self._began, self._seconds, self._progress = time.perf_counter(), seconds, progress
        self._watch = Stopwatch(products.device)

    @property
    def _left(self) -> float:
        return self._seconds - (time.perf_counter() - self._began)

    def _say(self, doing: str) -> None:
        self._progress(min(1.0, 1 - self._left / self._seconds), doing)

    def run(self, known: dict[str, str], key: dict[str, Any]) -> Tuning:
        self._say("a chunk by the defaults")
        default = self._engine(Plan())
        truth = Engine(TIERS["exact"], "auto", self._products.device, capture=False)
        stock = truth.act(self._model, *self._inputs)
        default.act(self._model, *self._inputs)  # what is built or captured is so by now
        chunk = self._chunk_ms(default) / 1e3
        reserve = min(2 * CHUNKS * chunk, self._seconds / 2)

        segments = self._segments(stock, chunk)
        decided = {each.op: each.chosen for each in segments if each.reached}
        recorded = self._record(Plan(decided))
        choices = self._choices(recorded, reserve)
        decided |= {f"{each.op} {each.shape}": each.chosen for each in choices if each.reached}
        plan = Plan({**known, **decided}, "tuned now", datetime.now(timezone.utc).strftime("%Y-%m-%d"))

        self._say("the whole chunk, before and after")
        changed = [each for each in (*segments, *choices) if each.chosen != each.default]
        before, after = self._before_and_after(default, plan if changed else None, stock)
        kept, note = _verdict(changed, before, after)
        if not kept:  # what was measured stays in the result, the plan says nothing of it
            plan = replace(plan, choices=known)
        self._say("done")
        took = time.perf_counter() - self._began
        return Tuning(key, plan, [*segments, *choices], before, after, kept, note, took)

    def _engine(self, plan: Plan | None) -> Engine:
        products = self._products.by(plan)
        return Engine(products.tier, products.backend, products.device, products=products)

    def _chunk_ms(self, engine: Engine) -> float:
        return timed_ms(lambda: engine.act(self._model, *self._inputs), self._products.device)[0]

    # What competes as a whole

    def _segments(self, stock: Tensor, chunk: float) -> list[Choice]:
        found = []
        for key, default, other in self._competitors():
            choice = Choice(key, "the whole chunk", 1, default, default)
            found.append(choice)
            if self._left < 3 * FEWEST * 2 * chunk:
                continue
            self._say(f"{key}: {default} or {other}")
            engines = {name: self._engine(Plan({key: name})) for name in (default, other)}
            for name, engine in engines.items():
                chunk_made = engine.act(self._model, *self._inputs)
                choice.timed.append(Timed(name, error=_rel_l2(chunk_made, stock)))
            runs: Runs = {name: partial(self._chunk_ms, engine) for name, engine in engines.items()}
            allowed = max(FP32_BOUND, 2 * (choice.timed[0].error or 0.0))
            times = rounds_of(runs, lambda count, _: count < FEWEST)
            for timed in choice.timed:
                timed.allowed = allowed
                timed.p50_ms, timed.scatter_ms = p50(times[timed.candidate]), scatter(times[timed.candidate])
                if not (timed.error or 0.0) <= allowed:
                    timed.refused = f"the chunk is off by {timed.error:.2g}, allowed is {allowed:.2g}"
            choice.reached = True
            if choice.timed[1].refused is None and is_faster(times[other], times[default]):
                choice.chosen = other
        return found

    def _competitors(self) -> list[tuple[str, str, str]]:
        """Key, default and the other of what the whole chunk decides."""
        products, found = self._products, []
        if products.may_widen:
            wide = "bf16 products" in products.by(Plan()).fallback_reasons
            found.append((PRODUCTS, *(("float32", "bfloat16") if wide else ("bfloat16", "float32"))))
        ops = products.by(Plan()).ops
        if ops.denoise_persistent is not None:
            found.append((LOOP, "cuda", "ops"))
        elif ops.backend == "triton" and "cuda" in others(products.device, products.backend):
            found.append((LOOP, "ops", "cuda"))
        return found

    # Op by op

    def _record(self, plan: Plan) -> list[Recorded]:
        self._say("recording a chunk")
        products = self._products.by(plan)
        recorder = Recorder(products.device)
        products.ops = recorder.table(products.ops)
        Engine(
            products.tier, products.backend, products.device, capture=False, products=products
        ).act(self._model, *self._inputs)  # fmt: skip
        # What takes longest first: time may run out.
        return sorted(recorder.found.values(), key=lambda each: -each.seconds)

    def _choices(self, recorded: list[Recorded], reserve: float) -> list[Choice]:
        found, weight = [], sum(each.seconds for each in recorded) or 1.0
        for each in recorded:
            shape, op = each.shape, each.choice
            names = _candidates(each)
            default = op.default(shape)
            choice = Choice(op.op, str(shape), each.count, default, default)
            found.append(choice)
            free = self._left - reserve
            if len(names) > 1 and free > 0:
                self._say(f"{op.op} {shape}")
                # Twice its share: many need less than theirs.
                self._measure(each, choice, names, min(free, max(2 * free * each.seconds / weight, 0.2)))
            weight -= each.seconds
        return found

    def _measure(self, recorded: Recorded, choice: Choice, names: list[str], seconds: float) -> None:
        deadline = time.perf_counter() + seconds
        runs: Runs = {}
        calls = len(recorded.calls)
        context = (
            torch.cuda.device(self._products.device)
            if self._products.device.type == "cuda"
            else nullcontext()
        )
        with context:
            contract = Contract(recorded)
            for name in names:
                timed = Timed(name)
                choice.timed.append(timed)
                try:
                    function = recorded.choice.function(name)
                    timed.error, timed.allowed, timed.refused = contract.judge(choice.op, function)
                    if timed.refused is None:
                        runs[name] = self._watch.prepared(_sweep(recorded, function))
                except (
                    Exception
                ) as error:  # a foreign kernel may raise anything: it is no candidate here then
                    short = (
                        "memory is short" if is_out_of_memory(error) else " ".join(str(error).split())[:200]
                    )
                    timed.refused = f"{type(error).__name__}: {short}"
            if choice.default not in runs:
                return  # nothing to compare with

            def more(count: int, times: Times) -> bool:
                if count >= FEWEST:
                    best = min(p50(each) for each in times.values())
                    for name in [n for n in runs if n != choice.default and p50(times[n]) > HOPELESS * best]:
                        del runs[name]
                return count < FEWEST or (count < MOST and time.perf_counter() < deadline)

            times = rounds_of(runs, more)
        for timed in choice.timed:
            if rounds := times.get(timed.candidate):
                timed.p50_ms, timed.scatter_ms = p50(rounds) / calls, scatter(rounds) / calls
        choice.reached = True
        ahead = [name for name in runs if is_faster(times[name], times[choice.default])]
        choice.chosen = min(ahead, key=lambda name: p50(times[name]), default=choice.default)

    # The whole chunk

    def _before_and_after(
        self, default: Engine, plan: Plan | None, stock: Tensor
    ) -> tuple[ChunkTime | None, ChunkTime | None]:
        engines = {"before": default} if plan is None else {"before": default, "after": self._engine(plan)}
        errors = {n: _rel_l2(each.act(self._model, *self._inputs), stock) for n, each in engines.items()}
        runs: Runs = {name: partial(self._chunk_ms, each) for name, each in engines.items()}
        began = time.perf_counter()

        def more(count: int, _: Times) -> bool:
            spent = time.perf_counter() - began
            # Chunks of milliseconds scatter more than a plan gains: as many as a second holds.
            wanted = count < CHUNKS or spent < 1.0
            return count == 0 or (wanted and self._left > spent / count)

        times = rounds_of(runs, more)
        found = {n: ChunkTime(p50(each), scatter(each), errors[n]) for n, each in times.items()}
        return found["before"], found.get("after")


def _sweep(recorded: Recorded, function: Callable[..., Any]) -> Callable[[], Tensor]:
    """One call after the other with operands of their own, as the layers of a chunk make them."""
    calls = [each.fresh() for each in recorded.calls]

    def sweep() -> Tensor:
        result = None
        for call in calls:
            result = function(*call.args, **call.kwargs)
        first = result[0] if isinstance(result, tuple) else result
        return first if isinstance(first, Tensor) else calls[-1].args[0]

    return sweep


def _candidates(recorded: Recorded) -> list[str]:
    """The default first; of Triton each tile that its cost model ranks."""
    choice, shape = recorded.choice, recorded.shape
    default = choice.default(shape)
    names = [default, *(name for name in choice.names(shape) if name != default)]
    if "triton" not in names:
        return names
    from ..kernels.tuning import recording, tile_to_json

    call = recorded.calls[0].fresh()
    with recording() as asked:
        choice.function("triton")(*call.args, **call.kwargs)
    tiles = [f"triton {tile_to_json(tile)}" for tile in asked[0].tiles[1:]] if asked else []
    return [*names, *tiles]


def _rel_l2(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference.double()).norm() / reference.double().norm())


def _verdict(changed: list[Choice], before: ChunkTime | None, after: ChunkTime | None) -> tuple[bool, str]:
    """Whether the plan is kept, and why."""
    if not changed:
        return True, "the defaults stay: nothing was faster by more than the scatter"
    assert before is not None and after is not None
    times = f"{before.p50_ms:.4g} -> {after.p50_ms:.4g} ms"
    allowed = max(FP32_BOUND, 2 * before.error)
    if not after.error <= allowed:
        return False, f"not kept: the chunk is off by {after.error:.2g}, allowed is {allowed:.2g}"
    if after.p50_ms - before.p50_ms > max(before.scatter_ms, after.scatter_ms):
        return False, f"not kept: the chunk as a whole is slower, {times}"
    return True, f"{len(changed)} choices changed hands, chunk {times}"
