"""``patch(policy)``: where LeRobot's policy and the engine meet.

The override point is ``policy.model.sample_actions``, the one call whose meaning is the same from lerobot 0.3.3 to main.
What lies above it (queues, padding, Aloha) stays stock; what lies below is computed by the engine. The policy object is
not touched: its ``model`` is given a subclass of its own class, made on demand and rebuilt by name when it is unpickled, and
one small attribute with the settings. Engines and counters live outside, so copies, pickles and threads are safe.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from .engine import plan_files
from .inference import Engine
from .model.precision import resolve_tier
from .model.weights import representative_weight
from .ops.select import select
from .patching.captured import Captured
from .patching.chunk_forward import Accelerated, accelerated
from .patching.layer_forward import patch_layers, unpatch_layers
from .patching.layer_runtime import LAYER_RUNTIMES
from .patching.runtime import Status, drop_runtime, runtime_of
from .patching.settings import DISABLE, SETTINGS, Settings, disabled
from .patching.training_forward import training_reason
from .patching.tuning import check_tune, tune_now
from .patching.untried import Untried
from .patching.warmup import took, warm_up

logger = logging.getLogger("smolvla_fast")

P = TypeVar("P")


def find_policy(policy: Any) -> Any:
    """The SmolVLA policy inside a policy, a PeftModel or a wrapper with ``.module``. Raises TypeError naming what it got."""
    seen = policy
    for _ in range(4):
        if hasattr(getattr(seen, "model", None), "vlm_with_expert") and hasattr(seen.model, "sample_actions"):
            return seen
        inner = seen.get_base_model() if hasattr(seen, "get_base_model") else getattr(seen, "module", None)
        if inner is None:
            break
        seen = inner
    raise TypeError(
        f"smolvla_fast takes a SmolVLAPolicy (lerobot's or smolvla_fast's) or a PeftModel around one; "
        f"got {type(policy).__module__}.{type(policy).__qualname__}"
    )


def patch(
    policy: P,
    *,
    precision: str = "auto",
    backend: str = "auto",
    warmup: Any = None,
    training: bool = False,
    image_cache: int = 0,
    tune: str = "cached",
    trial: bool = True,
) -> P:
    """Accelerate this one policy, in place, and return it.

    policy     a SmolVLAPolicy of lerobot or of smolvla_fast, or a PeftModel around one
    precision  "auto" (fp32 weights -> "fp32", bf16 weights -> "bf16"), "exact" (bit-identical to stock), "fp32", "bf16",
               "fp8" (8-bit floats, NVIDIA GPUs from compute capability 8.9 on; what it costs: ``verify``), "int8" (8-bit
               integers, processors with VNNI; what it costs: ``verify``), "int16" (16-bit integers on CPUs with AVX2,
               nearer to fp32 than bf16 is)
    backend    "auto" (the best that serves this device), "torch", "cpu", "triton" (on a Hopper GPU with CUDA C++ for
               products of few rows in bf16), "cuda" (CUDA C++ for attention and the denoise loop, Triton for the rest;
               measured once, docs/gpu.md, and not against what "auto" takes now)
    warmup     an example batch as ``predict_action_chunk`` takes it, or True: run a chunk now, so that the first real one
               is not slow; how long that took is said. No random state moves.
    training   speed up ``policy.forward``, the training loss, as well: what is frozen runs once and without a graph
    tune       who computes an op: "cached" (by the plan that `smolvla-fast tune` has measured on this machine for such a
               policy, where there is one), "now" (measure it, about 90 s, on the ``warmup`` batch or on a made observation,
               and keep the plan), "off" (by the defaults)
    trial      what is unread or was never tried (another LeRobot release, another kind of device) is tried: the first call
               of each kind computes stock's chunk and ours, and returns stock's. False: stock runs
    image_cache  bytes for tokens of frozen image frames, which a later step with the same frame looks up; 0: none. For data
               sets that fit into it, 245 KB a frame, and are trained on without random image transforms
    raises     TypeError for another kind of object, ValueError for an unknown name or another batch, RuntimeError for an
               explicit wish that cannot be met, each naming what is accepted
    Patching again only changes the settings. ``unpatch`` undoes all of it.
    """
    found = find_policy(policy)
    model = found.model
    weight = representative_weight(model)
    tier = resolve_tier(precision, weight.dtype)
    if not (warmup is None or isinstance(warmup, bool | dict)):
        raise TypeError(
            f"warmup={warmup!r}; accepted are True, False, None and a batch as predict_action_chunk takes it"
        )
    if type(image_cache) is not int or image_cache < 0 or (image_cache and not training):
        raise ValueError(
            f"image_cache={image_cache!r}; accepted are bytes, 0 or more, together with training=True"
        )
    if not isinstance(trial, bool):
        raise TypeError(f"trial={trial!r}; accepted are True and False")
    check_tune(tune, tier)
    if disabled():  # before anything is asked of this machine, for it may be why the variable was set
        logger.warning("smolvla_fast: off: %s is set; unset it and load or patch the policy again", DISABLE)
        return policy
    select(backend, weight.device, tier.stock_order, tier.quantized)
    if tune == "now":
        plan_files.check_writable()
    before = model.__dict__.get(SETTINGS)
    plans = "off" if tune == "off" else "cached"
    settings = Settings(precision, backend, training, image_cache, plans, trial)
    if before is None and runtime_of(model).settings is None:
        drop_runtime(model)  # what a call left that was under way when the policy was unpatched
    if before != settings:  # the same object else: graphs hold as long as nothing of the model is replaced
        model.__dict__[SETTINGS] = settings
    cls: Any = type(model)  # read once, as in a chunk
    stock = cls.stock_class if issubclass(cls, Accelerated) else cls
    model.__class__ = accelerated(stock, training)
    patch_layers(model, settings)
    runtime = runtime_of(model)
    runtime.look_for_plan(model)
    timed = tuned = by_stock = ""
    if tune == "now":
        with _in_eval_or_undone(found, before, settings):
            tuned = tune_now(found, warmup if isinstance(warmup, dict) else None)
    started = time.perf_counter()
    engine, reason = runtime.look(model)
    checked = time.perf_counter()
    if reason is not None:
        runtime.note(reason)
    if warmup is not None and warmup is not False:
        with _in_eval_or_undone(found, before, settings):
            fallback = warm_up(found, warmup)
        by_stock = f"; but calls like the warm-up's run stock: {fallback}" if fallback else ""
        timed = took(model.state_proj.weight.device, started, checked)
    trained = runtime.training.announce(training_reason(model)) if training else ""
    now = status(policy)
    if now.active:
        instead = "".join(f"; not {name}: {why}" for name, why in now.fallback_reasons.items())
        planned = f"; {now.plan}" if now.plan else ""
        logger.log(
            logging.WARNING if by_stock or (training and runtime.training.last_fallback) else logging.INFO,
            "smolvla_fast: on: %s on %s, backend %s for %s%s%s%s%s%s%s",
            now.precision, weight.device, now.backend, _shared(now), by_stock, trained, instead, planned, tuned, timed,
        )  # fmt: skip
    elif engine is not None and isinstance(reason, Untried) and not runtime.verdicts(model, engine, reason):
        logger.info(
            "smolvla_fast: stock runs until a trial: %s%s%s%s", now.last_fallback, trained, tuned, timed
        )
    else:
        logger.warning("smolvla_fast: stock runs: %s%s%s%s", now.last_fallback, trained, tuned, timed)
    return policy


@contextmanager
def _in_eval_or_undone(policy: Any, before: Settings | None, settings: Settings) -> Iterator[None]:
    """Inside, a policy that was just patched is in eval mode; an error undoes the patch."""
    model, was_training = policy.model, policy.training
    try:
        if was_training:
            policy.eval()
        yield
    except Exception:
        if model.__dict__.get(SETTINGS) is not settings:
            pass  # as it was, or as another thread has patched it meanwhile
        elif before is None:
            unpatch(policy)
        else:
            model.__dict__[SETTINGS] = before
            model.__class__ = accelerated(type(model).stock_class, before.training)
            patch_layers(model, before)
        raise
    finally:
        if was_training:
            policy.train()


def _shared(now: Status) -> str:
    """What of a chunk the backend serves, where another serves the rest."""
    if set(now.stages.values()) == {now.backend}:
        return "all stages"
    return "its ops (" + "; ".join(f"{stage}: {served}" for stage, served in now.stages.items()) + ")"


def unpatch(policy: P) -> P:
    """Undo ``patch``: the model's class and attributes are what they were. A policy that is not patched stays as it is."""
    model = find_policy(policy).model
    cls = type(model)
    if issubclass(cls, Accelerated):
        model.__class__ = cls.stock_class
        model.__dict__.pop(SETTINGS, None)
    unpatch_layers(model)
    drop_runtime(model)
    return policy


def captured(policy: Any, function: Callable[..., Tensor]) -> Captured:
    """A sampler of your own over a patched policy, as a function that replays it on an NVIDIA GPU as one CUDA graph.

    function  called with tensors, and whatever else compares by value, such as a number of steps; a cache that is none of
              its own is compared by identity and read where it lies. Returns one tensor.
              Device work alone: no ``.item()``, no ``torch.tensor(...)``, no random numbers. What changes from call to call
              is an argument; what else it reads, weights apart, is read where it lay when it was captured
    returns   a callable of the same arguments. Under ``torch.no_grad()`` a first call of new shapes captures, later ones
              replay; anywhere else, and where the policy has been unpatched, it calls ``function`` (``.last_fallback`` says
              why)
    raises    TypeError as ``patch`` does
    As for chunks, weights may change where they lie; a replaced parameter or module is noticed and captured anew, and
    ``unpatch`` and ``refresh`` give the memory back.
    """
    return Captured(find_policy(policy).model, function)


def engine_of(model: Any) -> Engine:
    """The engine that serves a patched model; raises RuntimeError where stock does."""
    engine, reason = runtime_of(model).look(model)
    if engine is None:
        raise RuntimeError(str(reason))
    return engine


def refresh(policy: Any) -> None:
    """Read the weights again and forget what was captured. ``fp8``, ``int8`` and ``int16`` make their copies anew; the other
    tiers read weights at every chunk and have nothing to refresh. A graph whose capture failed, for want of memory say, is
    tried again."""
    model = find_policy(policy).model
    if isinstance(model, Accelerated):
        runtime_of(model).forget()
        LAYER_RUNTIMES.of(find_policy(policy).model.vlm_with_expert).forget()


def status(policy: Any) -> Status:
    """What is on, what is not and why; see ``Status``."""
    model = find_policy(policy).model
    if not isinstance(model, Accelerated):
        return Status(last_fallback=f"{DISABLE} is set" if disabled() else "the policy is not patched")
    runtime = runtime_of(model)
    return runtime.status(model, *runtime.look(model))
