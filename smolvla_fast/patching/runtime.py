"""What is kept beside a patched model: what serves its chunks and its losses, and what ``status`` says of both."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakSet, ref

from ..engine import plan_files
from ..engine.cuda_graphs import GraphCache
from ..engine.timing import STAGES
from ..inference import Engine, EngineReplaced, Ineligible, Validator
from ..model.precision import resolve_tier
from ..model.weights import representative_weight
from ..ops.plan import CHUNK
from .change_detector import ChangeDetector
from .eligibility import INFERENCE
from .layer_runtime import LAYER_RUNTIMES
from .served import Registry, Served, counts, logger
from .settings import SETTINGS, Settings
from .training_runtime import TrainingRuntime
from .trial import Kind, Verdict, about_engine
from .untried import Untried


@dataclass
class Status:
    """What a patched policy is doing.

    active            True: the engine serves chunks. False: stock runs; last_fallback says why
    precision         the tier: "exact", "fp32", "bf16", "fp8", "int8" or "int16"
    backend           who computes: "torch", "cpu", "triton" or "cuda"; "reference" in the tier "exact"
    plan              the measured plan by which it is decided who computes an op, its age and where it lies, or None
    stages            stage -> backend; two where one has no kernel for some ops, or kernels of CUDA C++ have served among
                      Triton's: "cuda, triton"; the denoise loop's is of the last chunk
    fallback_reasons  what the engine does without, each with the reason:
                      a backend               "auto" prefers it, and it cannot serve here
                      "bf16 products"         they run in fp32, which is faster on this processor
                      "int16 products"        the same
                      "int8 in one term"      some weights have two 8-bit terms
                      "graph"                 chunks are not captured on this GPU
                      "denoise_persistent"    the last chunk's loop was not one launch, for which the backend has a kernel
    calls_fast        chunks served by the engine
    calls_stock       chunks served by stock
    last_fallback     why stock ran the last time it did, or None
    trials            of what is unread or untried: kind of call -> what its trial found; ``active`` once one has passed
    graphs            captured CUDA graphs
    graph_bytes       bytes that they hold
    graph_nodes       nodes of the one used last, or None
    step_launches     kernel launches of one denoise step; 0: the whole loop is one launch; None: ops are not one launch each
    extra_bytes       bytes held between chunks beyond the policy's own: position ids, time embeddings, the denoise loop's
                      buffers on a CPU, graphs, and in fp8, int8 and int16 quantized weights
    layers_fast       calls below ``sample_actions`` that the engine served, by method: single layers, all of them, images,
                      denoise steps
    layers_stock      such calls that stock served
    layers_fallback   method and reason of the last of these, or None
    training_fast     losses by the fast path of ``patch(training=True)``
    training_stock    losses by stock while that was asked for
    training_fallback why stock computed the last one it did, or None
    training_fallback_reasons  as fallback_reasons, of training: "bf16 products" as above;
                      "frozen prefix"         the policy's own modules compute what is frozen
                      "image cache"           image tokens are made at every step
    training_cache    of image_cache: frames and bytes held, hits, misses; empty without one, or before the first fast loss
    """

    active: bool = False
    precision: str = "stock"
    backend: str = "stock"
    plan: str | None = None
    stages: dict[str, str] = field(default_factory=lambda: dict.fromkeys(STAGES, "stock"))
    fallback_reasons: dict[str, str] = field(default_factory=dict)
    calls_fast: int = 0
    calls_stock: int = 0
    last_fallback: str | None = None
    trials: dict[str, str] = field(default_factory=dict)
    graphs: int = 0
    graph_bytes: int = 0
    graph_nodes: int | None = None
    step_launches: int | None = None
    extra_bytes: int = 0
    layers_fast: dict[str, int] = field(default_factory=dict)
    layers_stock: dict[str, int] = field(default_factory=dict)
    layers_fallback: str | None = None
    training_fast: int = 0
    training_stock: int = 0
    training_fallback: str | None = None
    training_fallback_reasons: dict[str, str] = field(default_factory=dict)
    training_cache: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """What there is to say, in a few lines; the representation has every field."""
        why = f", the last for: {self.last_fallback}" if self.last_fallback else ""
        lines = [
            f"on: {self.precision} by {self.backend}" if self.active else f"stock runs: {self.last_fallback}",
            f"chunks: {self.calls_fast} by the engine, {self.calls_stock} by stock{why if self.calls_stock else ''}",
        ]
        if self.plan:
            lines.append(self.plan)
        if self.training_fast or self.training_stock:
            why = f", the last for: {self.training_fallback}" if self.training_stock else ""
            lines.append(
                f"losses: {self.training_fast} by the fast path, {self.training_stock} by stock{why}"
            )
        if self.extra_bytes:
            lines.append(
                f"memory beside the policy: {self.extra_bytes / 2**20:,.1f} MiB, graphs: {self.graphs}"
            )
        lines += [f"without {name}: {reason}" for name, reason in self.fallback_reasons.items()]
        return "\n".join(lines + [f"trial of {kind}: {found}" for kind, found in self.trials.items()])


class SlowerThanStock(str):
    """A reason that is no fault: what was measured on this machine."""


def _slower(engine: Engine, settings: Settings) -> str | None:
    """Why stock serves although the engine can; who names a tier or a backend gets it."""
    plan = engine.products.plan
    if (
        plan is None
        or plan.choices.get(CHUNK) != "stock"
        or (settings.precision, settings.backend) != ("auto", "auto")
    ):
        return None
    where = plan_files.describe(plan)
    return SlowerThanStock(
        f"stock's chunk measured faster on this machine ({where}); tune again, or name a precision"
    )


class Runtime(Served[Engine]):
    """What serves chunks, and beside it what serves losses."""

    eligibility, work, tries = INFERENCE, "chunk", True

    def __init__(self) -> None:
        super().__init__()
        self._verdicts: dict[Kind, Verdict | None] = {}  # None: a trial is under way, in whichever thread
        self.training = TrainingRuntime()
        self.captured: WeakSet[GraphCache] = WeakSet()
        self.pair: ref[Any] | None = None  # whose layers were patched with this model
        self._built_for: tuple[Any, ...] = ()

    def prepare(self, model: Any, settings: Settings) -> str | None:
        weight = representative_weight(model)
        # All dtypes and devices: a model that is looked at while another thread moves it is another one afterwards.
        key = (settings, weight.dtype, weight.device, *((x.dtype, x.device) for x in model.parameters()))
        layers = LAYER_RUNTIMES.of(model.vlm_with_expert)
        if self.engine is not None and self.engine.graphs is not None:
            self.engine.graphs.clear()  # they hold addresses and settings of before
        if self.engine is not None and self.engine.quantized_weights is not None:
            self.engine.quantized_weights.replaced()
        if self.engine is None or self._built_for != key:
            tier = resolve_tier(settings.precision, weight.dtype)
            products = layers.products(model.vlm_with_expert, tier, settings, weight.device)
            self.engine = Engine(tier, settings.backend, weight.device, products=products)
            if self._built_for and self._built_for[0] == settings:  # not patched anew, which says it itself
                name = self.engine.ops.backend
                logger.info("smolvla_fast: now: %s on %s, backend %s", tier.name, weight.device, name)
            self._built_for = key
        return layers.probe_reason(model.vlm_with_expert, self.engine.tier) or _slower(self.engine, settings)

    def begin_trial(self, kind: Kind, untried: str) -> tuple[bool, str | None]:
        """Whether this call is to be the trial of its kind, and if not, why stock is to serve it, or None."""
        with self.lock:
            if kind not in self._verdicts:
                self._verdicts[kind] = None
                return True, None
            verdict = self._verdicts[kind]
        if verdict is None:
            return False, "the trial of this kind of call is under way in another thread"
        return False, None if verdict.passed else f"{untried}; its trial: {verdict.text}"

    def end_trial(self, kind: Kind, verdict: Verdict | None) -> None:
        """None: stock raised, so that nothing is known."""
        with self.lock:
            if verdict is None:
                self._verdicts.pop(kind, None)
                return
            self.stock += counts()
            if kind not in self._verdicts:
                return  # forgotten meanwhile
            self._verdicts[kind] = verdict
            self.last_fallback = f"trial of {kind}: {verdict.text}"
        level = logging.INFO if verdict.passed else logging.WARNING
        what = "the engine serves" if verdict.passed else "stock serves"
        logger.log(level, "smolvla_fast: trial of %s: %s from now on: %s", kind, what, verdict.text)

    @property
    def trials(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for kind, verdict in self._verdicts.items():
            if verdict is not None:
                alike = sum(
                    name.startswith(str(kind)) for name in found
                )  # of another source under the same policy
                name = f"{kind} ({alike + 1})" if alike else str(kind)
                found[name] = ("passed: " if verdict.passed else "stock: ") + verdict.text
        return found

    def look_for_plan(self, model: Any) -> None:
        """Drops what was made with a plan that is no longer the one that is found."""
        with self.lock:
            pair, settings = model.vlm_with_expert, model.__dict__.get(SETTINGS)
            if settings is None:
                return
            # Layers may be served where stock runs the chunks.
            products = LAYER_RUNTIMES.of(pair).look_for_plan(pair, settings)
            if self.engine is not None and self.engine.products is not products:
                # As if patched anew: who asked says what serves now.
                self._built_for, self.detector = (), None

    def look_to_tune(self, model: Any) -> tuple[Engine | None, str | None]:
        """As ``look``; that stock was faster once is no reason not to measure again."""
        with self.lock:
            engine, reason = self.look(model)
            return self.engine if isinstance(reason, SlowerThanStock) else engine, reason

    def gate(self, model: Any) -> tuple[Engine | None, str | None, tuple[Validator, ...]]:
        """May it: an engine or why not, and what is still to be checked of the model when the chunk is queued.

        Where chunks are captured and no parameter has moved since the last look, the model is looked through while the GPU
        works. Else now.
        """
        with self.lock:
            engine, noted = self.engine, self.detector
            captured = engine is not None and engine.graphs is not None and not self._open
            if captured and noted is not None and noted.same_memory():
                return engine, None, (Validator(noted, lambda: self._checked(model, engine)),)
            return (*self.look(model), ())

    def _checked(self, model: Any, engine: Engine | None) -> ChangeDetector | None:
        with self.lock:
            now, reason = self.look(model)
            if reason is not None:
                raise Ineligible(reason)
            if now is not engine:
                raise EngineReplaced
            return self.detector

    def forget(self) -> None:
        """Drops the engines with their graphs."""
        with self.lock:
            for each in self._graphs:
                each.clear()
            super().forget()
            self._verdicts.clear()
        self.training.forget()

    @property
    def _graphs(self) -> list[GraphCache]:
        """Of chunks, and of the functions that ``captured`` holds."""
        own = None if self.engine is None else self.engine.graphs
        return [*([] if own is None else [own]), *self.captured]

    def after_fork(self) -> None:
        super().after_fork()
        # A trial that was under way is in another process now.
        self._verdicts = {kind: verdict for kind, verdict in self._verdicts.items() if verdict is not None}
        self.training.after_fork()

    def verdicts(self, model: Any, engine: Engine, untried: Untried) -> list[Verdict | None]:
        """What trials have found of the model and the engine as they are now; None: one is under way."""
        about = (*untried.about, *about_engine(model, engine))
        with self.lock:
            return [each for kind, each in self._verdicts.items() if kind.about == about]

    def status(self, model: Any, engine: Engine | None, reason: str | None) -> Status:
        """engine, reason  as ``look`` gave them"""
        layers = LAYER_RUNTIMES.of(model.vlm_with_expert)
        last = reason or self.last_fallback
        if isinstance(reason, Untried) and engine is not None:
            found = self.verdicts(model, engine, reason)
            pending = f"{reason}; the first call of each kind is a trial"
            last = (self.last_fallback or reason) if found else pending
            if any(each is not None and each.passed for each in found):
                reason = None
        counters: dict[str, Any] = dict(
            trials=self.trials,
            layers_fast=layers.calls(fast=True),
            layers_stock=layers.calls(fast=False),
            layers_fallback=layers.last_fallback,
            calls_fast=self.fast,
            calls_stock=self.stock,
            last_fallback=last,
            training_fast=self.training.fast,
            training_stock=self.training.stock,
            training_fallback=self.training.last_fallback,
            training_fallback_reasons=self.training.fallback_reasons,
            training_cache=self.training.cache,
        )
        if reason is not None or engine is None:
            return Status(**counters)
        graphs = engine.graphs
        held = sum(each.bytes for each in self._graphs)
        return Status(
            active=True,
            precision=engine.tier.name,
            backend=engine.ops.backend,
            plan=None if engine.products.plan is None else plan_files.describe(engine.products.plan),
            graphs=sum(each.count for each in self._graphs),
            graph_bytes=held,
            graph_nodes=None if graphs is None else graphs.nodes,
            extra_bytes=engine.bytes + held + (0 if layers.engine is None else layers.engine.bytes),
            **engine.report(),
            **counters,
        )


RUNTIMES: Registry[Runtime] = Registry(Runtime)
runtime_of, drop_runtime = RUNTIMES.of, RUNTIMES.drop
