"""Finds the plan of one policy, tier and machine.

A chunk is recorded, each candidate of each of its calls is checked against the op contract and timed, and the whole chunk is
timed before and after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.plan_files import today
from ..engine.products import Products
from ..inference import Engine
from ..measure.rounding import FP32_BOUND
from ..measure.rounds import rel_l2, timed_ms
from ..model.precision import TIERS
from ..ops.choice import others
from ..ops.plan import CHUNK, FIRST_STEP, LAUNCHES, LOOP, PRODUCTS, Plan
from .candidates import drop_hopeless, measure, said
from .recorder import Recorded, Recorder
from .result import Choice, ChunkTime, Timed, Tuning
from .stopwatch import Runs, Stopwatch, Times, is_faster, p50, rounds_of, scatter

Progress = Callable[[str, float], None]
"""what begins, the share that is done"""
SECONDS = 90.0
"""How long a tuning may take where nobody says."""

CHUNKS, MOST_CHUNKS = 5, 11
"""Rounds of the whole chunk: time is kept free for the first number, and where more is left, more are taken."""


def tune(
    model: Any,
    products: Products,
    *,
    inputs: tuple[Any, ...],
    noise: Tensor,
    seconds: float = SECONDS,
    known: Mapping[str, str] | None = None,
    key: dict[str, Any] | None = None,
    progress: Progress | None = None,
    stock: Callable[[], Tensor] | None = None,
) -> Tuning:
    """Measure who serves the chunks of this model fastest, here and now.

    products   of the tier and backend that are to be tuned; its own plan is not asked
    inputs     images, image_masks, tokens, token_masks, state, as ``sample_actions`` takes them      noise  [B, S, A] fp32
    seconds    the time it may take; what is not reached keeps its default
    known      choices of an earlier plan for other shapes, which the new one keeps
    stock      computes stock's chunk, to be timed beside the engine's
    """
    with torch.no_grad():
        silent: Progress = lambda label, share: None  # noqa: E731
        return _Tuner(model, products, (*inputs, noise), seconds, progress or silent, stock).run(
            dict(known or {}), key or {}
        )


BEFORE, AFTER, STOCK = "by the defaults", "by what was chosen", "stock"


@dataclass
class _Final:
    """An engine whose whole chunk is checked and timed.

    choices  of whole segments, which it differs in from what was chosen op by op
    refused  why it may not serve, or None
    """

    engine: Engine
    choices: dict[str, str]
    error: float = 0.0
    allowed: float = 0.0
    refused: str | None = None
    rounds: list[float] = field(default_factory=list)
    time: ChunkTime | None = None


class _Tuner:
    def __init__(
        self,
        model: Any,
        products: Products,
        inputs: tuple[Any, ...],
        seconds: float,
        progress: Progress,
        stock: Callable[[], Tensor] | None,
    ) -> None:
        self._stock, self._stock_rounds = stock, list[float]()
        self._model, self._products, self._inputs = model, products, inputs
        self._began, self._seconds, self._progress = time.perf_counter(), seconds, progress
        self._watch = Stopwatch(products.device)

    @property
    def _left(self) -> float:
        return self._seconds - (time.perf_counter() - self._began)

    def _say(self, doing: str) -> None:
        self._progress(doing, min(1.0, 1 - self._left / self._seconds))

    def run(self, known: dict[str, str], key: dict[str, Any]) -> Tuning:
        self._say("a chunk by the defaults")
        default = self._engine(Plan())
        stock = self._act(Engine(TIERS["exact"], "auto", self._products.device, capture=False))
        self._act(default)  # what is built or captured is so by now
        chunk = self._chunk_ms(default) / 1e3
        competitors = self._competitors()
        reserve = min((2 * CHUNKS + 2 * len(competitors) + 2) * chunk, self._seconds / 2)

        choices = self._choices(self._record(), reserve)
        decided = {f"{each.op} {each.shape}": each.chosen for each in choices if each.reached}
        changed = [each for each in choices if each.chosen != each.default]

        self._say("the whole chunk, before and after")
        finals = {BEFORE: _Final(default, {})}
        if changed:
            finals[AFTER] = _Final(self._engine(Plan(decided)), {})
        for segment, _, other in competitors:
            finals[f"{segment} {other}"] = _Final(
                self._engine(Plan({**decided, segment: other})), {segment: other}
            )
        self._compare(finals, stock)
        segments = [_segment(*each, finals) for each in competitors]
        best, note = _verdict(finals)
        measured = {*decided, *(each.op for each in segments if each.reached)}
        known = {name: each for name, each in known.items() if name not in measured}
        chosen = {} if best is None else {**decided, **finals[best].choices}
        serves, stock_ms = finals[best or BEFORE].rounds, None
        if self._stock_rounds:
            known.pop(CHUNK, None)
            stock_ms = p50(self._stock_rounds)
            if is_faster(self._stock_rounds, serves):
                chosen[CHUNK] = STOCK
                note = f"stock's own chunk is faster, {stock_ms:.4g} ms"
        plan = Plan({**known, **chosen}, "tuned now", today().isoformat())
        self._say("done")
        took = time.perf_counter() - self._began
        beside = AFTER if best is None else best  # what was refused is shown too
        before, after = finals[BEFORE].time, None if beside == BEFORE else finals[beside].time
        return Tuning(key, plan, [*segments, *choices], before, after, best is not None, note, took, stock_ms)

    def _engine(self, plan: Plan | None) -> Engine:
        products = self._products.by(plan)
        return Engine(products.tier, products.backend, products.device, products=products)

    def _act(self, engine: Engine) -> Tensor:
        return engine.act(self._model, *self._inputs)

    def _chunk_ms(self, engine: Engine) -> float:
        return timed_ms(lambda: self._act(engine), self._products.device)[0]

    # The whole chunk

    def _competitors(self) -> list[tuple[str, str, str]]:
        """Key, default and the other of what is decided for the whole chunk at once."""
        products, found = self._products.by(Plan()), []
        if products.may_widen:
            wide = "bf16 products" in products.fallback_reasons
            found.append((PRODUCTS, *(("float32", "bfloat16") if wide else ("bfloat16", "float32"))))
        if products.ops.denoise_persistent is not None:
            found.append((LOOP, "cuda", "ops"))
        elif products.ops.backend == "triton" and "cuda" in others(products.device, products.backend):
            found.append((LOOP, "ops", "cuda"))
        if products.ops.backend == "triton" and products.device.type == "cuda":
            found.append((FIRST_STEP, "beside_prefix", "behind_prefix"))
            if torch.cuda.get_device_capability(products.device)[0] >= 9:
                found.append((LAUNCHES, "early", "in_order"))
        return found

    def _compare(self, finals: dict[str, _Final], stock: Tensor) -> None:
        """Checks each engine's chunk, and times those that are right in rounds of one chunk each."""
        for name, final in finals.items():
            try:
                final.error = rel_l2(self._act(final.engine), stock)
            except Exception as error:  # as of a single candidate
                if name == BEFORE:
                    raise
                final.error, final.refused = float("nan"), said(error)
        allowed = max(FP32_BOUND, 2 * finals[BEFORE].error)
        for final in finals.values():
            narrow = final.choices.get(PRODUCTS) == "bfloat16"
            final.allowed = max(allowed, 2 * self._eager_error(stock)) if narrow else allowed
            if final.refused is None and not final.error <= final.allowed:  # so written that NaN is refused
                final.refused = f"the chunk is off by {final.error:.2g}, allowed is {final.allowed:.2g}"
        runs: Runs = {
            name: partial(self._chunk_ms, final.engine)
            for name, final in finals.items()
            if name == BEFORE or final.refused is None
        }
        if self._stock is not None:
            stock_chunk = self._stock
            runs[STOCK] = lambda: timed_ms(stock_chunk, self._products.device)[0]
            stock_chunk()  # so that none of its rounds is its first
        began = time.perf_counter()

        def more(count: int, times: Times) -> bool:
            drop_hopeless(runs, times, BEFORE)
            spent = time.perf_counter() - began
            # Chunks of milliseconds scatter more than a plan gains: as many as a second holds.
            wanted = count < MOST_CHUNKS or spent < 1.0
            return count == 0 or (wanted and len(runs) > 1 and self._left > spent / count)

        times = rounds_of(runs, more)
        self._stock_rounds = times.pop(STOCK, [])
        for name, rounds in times.items():
            final = finals[name]
            final.rounds, final.time = rounds, ChunkTime(p50(rounds), scatter(rounds), final.error)

    def _eager_error(self, stock: Tensor) -> float:
        """What the chunk of backend ``torch`` loses with its products in bf16."""
        products = Products(self._products.tier, "torch", self._products.device, Plan({PRODUCTS: "bfloat16"}))
        return rel_l2(self._act(Engine(products.tier, "torch", products.device, products=products)), stock)

    # Op by op

    def _record(self) -> list[Recorded]:
        self._say("recording a chunk")
        products = self._products.by(Plan())
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
            default = op.default(shape)
            choice = Choice(op.op, str(shape), each.count, default, default)
            found.append(choice)
            free = self._left - reserve
            if free > 0:
                self._say(f"{op.op} {shape}")
                # Twice its share: many need less than theirs.
                measure(each, choice, self._watch, min(free, max(2 * free * each.seconds / weight, 0.2)))
            weight -= each.seconds
        return found


def _segment(key: str, default: str, other: str, finals: dict[str, _Final]) -> Choice:
    """What was measured of a segment, as a choice."""
    final, beside = finals[f"{key} {other}"], finals.get(AFTER, finals[BEFORE])
    choice = Choice(key, "the whole chunk", 1, default, default)
    for name, each in ((default, beside), (other, final)):
        timed = Timed(name, error=each.error, allowed=each.allowed, refused=each.refused)
        if each.time is not None:
            timed.p50_ms, timed.scatter_ms = each.time.p50_ms, each.time.scatter_ms
        choice.timed.append(timed)
    choice.reached = all(each.p50_ms is not None or each.refused for each in choice.timed)
    if final.time is not None and is_faster(final.rounds, beside.rounds):
        choice.chosen = other
    return choice


def _verdict(finals: dict[str, _Final]) -> tuple[str | None, str]:
    """Which of the engines serves from now on, None where what was chosen is not ahead of the defaults, and why."""
    before = finals[BEFORE]
    assert before.time is not None
    best = BEFORE
    for name, final in finals.items():
        if name != BEFORE and final.time is not None and is_faster(final.rounds, finals[best].rounds):
            best = name
    after = finals.get(AFTER)
    level = after is not None and after.time is not None and after.time.p50_ms <= before.time.p50_ms
    if best == BEFORE and level:
        best = AFTER  # each of its ops is ahead by itself, and the whole is not behind
    if best != BEFORE:
        return best, ""
    if after is None:
        return BEFORE, "nothing was faster by more than the scatter"
    if after.refused is not None:
        return None, after.refused
    times = f"{before.time.p50_ms:.4g} -> {after.time.p50_ms:.4g} ms" if after.time else "by far"
    return None, f"the chunk as a whole is no faster, {times}"
