"""What lives beside a patched model: its engine, its counters, what was said about it; never copied, never pickled."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from ..engine.timing import STAGES
from ..inference import Engine
from ..model.precision import resolve_tier
from ..model.weights import telling_weight
from .change_detector import Watch
from .eligibility import model_reason, probe, probed_code, source_reason
from .training_runtime import Learning

logger = logging.getLogger("smolvla_fast")

DISABLE = "SMOLVLA_FAST_DISABLE"
SETTINGS = "_smolvla_fast"
"""The attribute of a patched model that holds its ``Settings``."""


@dataclass(frozen=True)
class Settings:
    """What ``patch`` was asked for; travels with copies and pickles of the model."""

    precision: str
    backend: str
    training: bool = False
    image_cache: int = 0


@dataclass
class Status:
    """What a patched policy is doing.

    active         chunks are served by the engine (False: stock runs, see last_fallback)
    precision      the tier: "exact", "fp32", "bf16", "fp8" or "int8"    backend  who computes
    stages         stage -> backend, or backends where one serves what the other has no kernel for: "cuda, triton"; of the
                   denoise loop, who ran the last one
    passed_over    backends that "auto" would rather have taken, each with the reason why it could not; "denoise_persistent":
                   why the last chunk's loop was not one launch, where the backend has a kernel for that; "int8 in one term":
                   how many weights have two; "graph": why no chunk is captured on a GPU
    calls_fast     chunks served by the engine                calls_stock  chunks served by stock
    last_fallback  why stock ran the last time it did, or None
    graphs         captured CUDA graphs      graph_bytes  what they hold      graph_nodes  nodes of the one used last
    step_launches  kernel launches of one denoise step, where the backend's ops are one launch each, else None; 0 where all
                   steps are one launch
    training_fast  losses by the fast path of ``patch(training=True)``
    training_stock losses by stock while that was asked for
    training_fallback  why stock computed the last one it did, or None      training_passed_over  as passed_over, of training
    training_cache  of image_cache: frames and bytes held, hits, misses; empty without one, or before the first fast loss
    extra_bytes    bytes held between chunks beyond the policy's own: the patches' position ids, time embeddings, on a
                   CPU the denoise loop's buffers, the graphs' memory and, in fp8 and int8 alone, copies of weights
    """

    active: bool = False
    precision: str = "stock"
    backend: str = "stock"
    stages: dict[str, str] = field(default_factory=lambda: dict.fromkeys(STAGES, "stock"))
    passed_over: dict[str, str] = field(default_factory=dict)
    calls_fast: int = 0
    calls_stock: int = 0
    last_fallback: str | None = None
    graphs: int = 0
    graph_bytes: int = 0
    graph_nodes: int | None = None
    step_launches: int | None = None
    extra_bytes: int = 0
    training_fast: int = 0
    training_stock: int = 0
    training_fallback: str | None = None
    training_passed_over: dict[str, str] = field(default_factory=dict)
    training_cache: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def disabled() -> bool:
    return os.environ.get(DISABLE, "").lower() not in ("", "0", "false", "no", "off")


class Runtime:
    """Engine, counters and messages of one patched model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        # Of the last chunk: another thread may unpatch while one is computed.
        self.settings: Settings | None = None
        self.engine: Engine | None = None
        self.built_for: tuple[Any, ...] = ()
        self.probed: str | None = None
        self.watch: Watch | None = None
        self.calls_fast = 0
        self.calls_stock = 0
        self.last_fallback: str | None = None
        self.learning = Learning()
        self.told: set[str] = set()

    def renew_locks(self) -> None:
        self.lock = threading.RLock()
        self.learning.renew_locks()
        if self.engine is not None and self.engine.copies is not None:
            self.engine.copies.renew_lock()

    def prepare(self, model: Any) -> Engine:
        """The engine for the dtypes and device the model has now."""
        with self.lock:
            settings = model.__dict__.get(SETTINGS) or self.settings
            assert settings is not None, "a runtime is of a patched model"
            self.settings = settings
            weight = telling_weight(model)
            # All dtypes and devices: a model that is looked at while another thread moves it is another one afterwards.
            parts = tuple((each.dtype, each.device) for each in model.parameters())
            key = (settings, weight.dtype, weight.device, parts, probed_code(model))
            if self.engine is None or self.built_for != key:
                if self.engine is not None and self.engine.graphs is not None:
                    self.engine.graphs.clear()
                tier = resolve_tier(settings.precision, weight.dtype)
                self.engine = Engine(tier, settings.backend, weight.device)
                if self.built_for and self.built_for[0] == settings:  # not patched anew, which says it itself
                    name = self.engine.ops.backend
                    logger.info("smolvla_fast: now: %s on %s, backend %s", tier.name, weight.device, name)
                # A load in another thread may change a weight between two sides of a comparison: asked twice.
                exact = tier.stock_order
                self.probed = probe(model, exact=exact) and probe(model, exact=exact)
                self.built_for = key
            return self.engine

    def unmoved(self) -> Watch | None:
        """What was noted at the last full check, if every parameter still lies where it lay: graphs may be replayed."""
        with self.lock:
            watch = self.watch
            return watch if watch is not None and watch.same_memory() else None

    def reason(self, model: Any) -> str | None:
        """Why this model runs stock whatever the call, or None. Cheap while nothing in it has changed."""
        if disabled():
            return f"{DISABLE} is set"
        with self.lock:
            if not (model.__dict__.get(SETTINGS) or self.settings):
                return "the policy was unpatched meanwhile"
            watch = self.watch
            if watch is not None and watch.same(model):
                return source_reason(model)
            self.watch = None
            reason = model_reason(model)
            if reason is not None:
                return reason  # cheap, for a model that stock runs is asked at every call
            watch = Watch(model)  # before a look, so that what changes during it is looked at again
            reason = model_reason(model)
            if reason is None:
                try:
                    self.prepare(model)
                    reason = self.probed
                except RuntimeError as error:  # the policy has moved to where an explicit wish cannot be met
                    reason = str(error)
            if reason is None:
                if self.engine is not None and self.engine.graphs is not None:
                    self.engine.graphs.clear()  # they hold addresses and settings of before
                self.watch = watch
            return reason

    def served(self) -> None:
        with self.lock:
            self.calls_fast += _counts.get()

    def fell_back(self, reason: str) -> None:
        with self.lock:
            self.calls_stock += _counts.get()
            self.last_fallback = reason
            told = reason in self.told
            self.told.add(reason)
        if not told:
            logger.warning("smolvla_fast: this chunk runs stock: %s", reason)

    def forget(self) -> None:
        """Drop the engine with its graphs; the next call builds another."""
        with self.lock:
            if self.engine is not None and self.engine.graphs is not None:
                self.engine.graphs.clear()
            self.engine, self.watch = None, None
            self.learning.forget()

    def status(self, reason: str | None) -> Status:
        counters: dict[str, Any] = dict(
            calls_fast=self.calls_fast,
            calls_stock=self.calls_stock,
            last_fallback=reason or self.last_fallback,
            training_fast=self.learning.fast,
            training_stock=self.learning.stock,
            training_fallback=self.learning.fallback,
            training_passed_over=self.learning.passed_over,
            training_cache=self.learning.cache,
        )
        engine = self.engine
        if reason is not None or engine is None:
            return Status(**counters)
        name, graphs = engine.ops.backend, engine.graphs
        held = 0 if graphs is None else graphs.bytes
        return Status(
            active=True,
            precision=engine.tier.name,
            backend=name,
            stages=engine.stages,
            passed_over=engine.passed_over,
            graphs=0 if graphs is None else graphs.count,
            graph_bytes=held,
            graph_nodes=None if graphs is None else graphs.nodes,
            step_launches=engine.step_launches,
            extra_bytes=engine.bytes + held,
            **counters,
        )


_counts: ContextVar[bool] = ContextVar("smolvla_fast_counts", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Chunks of this thread inside are a warm-up's, not the robot's."""
    token = _counts.set(False)
    try:
        yield
    finally:
        _counts.reset(token)


_runtimes: WeakKeyDictionary[Any, Runtime] = WeakKeyDictionary()
# Re-entrant, as a collection of garbage under it may end in somebody's unpatch.
_runtimes_lock = threading.RLock()


def _after_fork() -> None:
    """In a forked child: locks of the parent may be held by threads that are not in the child."""
    global _runtimes_lock
    _runtimes_lock = threading.RLock()
    for runtime in list(_runtimes.values()):
        runtime.renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def runtime_of(model: Any) -> Runtime:
    with _runtimes_lock:
        if model not in _runtimes:
            _runtimes[model] = Runtime()
        return _runtimes[model]


def drop_runtime(model: Any) -> None:
    """Forget a model: counters, engine, graphs and their memory."""
    with _runtimes_lock:
        runtime = _runtimes.pop(model, None)
    if runtime is not None:
        runtime.forget()
