"""Where callers below ``sample_actions`` and the fused layers meet: methods of ``policy.model.vlm_with_expert``, and
``denoise_step`` of its model.

The *pair* is the ``SmolVLMWithExpertModel``: VLM and action expert. It gets a subclass of its own class, as the model does:
nothing is renamed, copies and pickles work, undo is exact. Each method keeps stock's signature, in whatever release, and
runs stock's own method where the engine may not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, wraps
from inspect import Signature, signature
from typing import Any
from weakref import ref

from torch._compile import _disable_dynamo

from ..layers.engine import LayerEngine
from .call_rules import Call
from .eligibility import LAYERS, PREFIX, STEPS, Eligibility
from .layer_rules import LayerRequest, StepRequest, needs_grad, requested
from .layer_runtime import LAYER_RUNTIMES
from .runtime import runtime_of
from .settings import SETTINGS, Settings, stock_layers, stock_wanted
from .source_digests import unknown_of


class AcceleratedLayers:
    """Put before a pair's own class by ``patch``."""

    stock_class: type

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        cls = type(self)  # read once: another thread may unpatch meanwhile
        if not issubclass(cls, AcceleratedLayers):
            return object.__reduce_ex__(self, protocol)
        return restore_layers, (cls.stock_class,), self.__dict__


def _forward(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.forward(pair, request.call, stock, needs_grad(pair, request))


def _self_attention(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.attention_layer(pair, request.call, False, needs_grad(pair, request))


def _cross_attention(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.attention_layer(pair, request.call, True, needs_grad(pair, request))


def _embed_image(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.embed_image(pair, request.given["image"])


METHODS = {
    "forward": _forward,
    "forward_attn_layer": _self_attention,
    "forward_cross_attn_layer": _cross_attention,
    "embed_image": _embed_image,
}
"""What is overridden. ``embed_language_tokens`` is one look-up in stock as well and stays stock's."""


def _override(stock: type, name: str) -> Callable[..., Any]:
    own, found, serve = getattr(stock, name), signature(getattr(stock, name)), METHODS[name]

    @wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if stock_wanted() or not issubclass(type(self), AcceleratedLayers):
            return own(self, *args, **kwargs)
        request, reason, engine = _asked(self, name, found, args, kwargs)
        LAYER_RUNTIMES.of(self).count(name, reason)
        if engine is not None and request is not None and reason is None:
            return serve(engine, self, request, own)
        with stock_layers():
            return own(self, *args, **kwargs)

    # Not torch.compiler.disable: that imports dynamo, and with it Triton, as soon as it decorates.
    return _disable_dynamo(method)


def _asked(
    pair: Any, name: str, found: Signature, args: Any, kwargs: Any
) -> tuple[LayerRequest | None, str | None, LayerEngine | None]:
    try:
        request = requested(name, found, pair, args, kwargs)
    except TypeError as error:
        return None, f"the arguments are not stock's: {error}", None
    engine, reason = LAYER_RUNTIMES.of(pair).look(pair)
    return request, reason or LAYERS.call_reason(pair, request), engine


@cache
def _accelerated_layers(stock: type) -> type:
    methods = {name: _override(stock, name) for name in METHODS}
    attributes = {"stock_class": stock, "overrides": methods, "__module__": stock.__module__, **methods}
    return type(stock.__name__, (AcceleratedLayers, stock), attributes)


def restore_layers(stock: type) -> Any:
    cls: Any = _accelerated_layers(stock)
    return cls.__new__(cls)


def patch_layers(model: Any, settings: Settings) -> None:
    """Accelerate the layers of this model's pair.

    Leaves out a model that LeRobot compiles (``compile_model``), whose chunk has a receipt, and a pair of a foreign class,
    with a reason in ``layers_fallback``.
    """
    pair = model.vlm_with_expert
    cls: Any = type(pair)
    stock = cls.stock_class if issubclass(cls, AcceleratedLayers) else cls
    missing = [name for name in METHODS if not callable(getattr(stock, name, None))]
    compiled = any(
        hasattr(model.__dict__.get(name), "_torchdynamo_orig_callable")
        for name in ("sample_actions", "forward")
    )
    if missing or compiled:
        unpatch_layers(model)
        if missing:
            LAYER_RUNTIMES.of(pair).note(f"vlm_with_expert is a {cls.__qualname__} without {missing[0]}")
        return
    runtime = LAYER_RUNTIMES.of(pair)
    before = runtime_of(model).pair
    if before is not None and before() is not pair:
        unpatch_layers(model)
    runtime_of(model).pair = ref(pair)
    runtime.patched_by[model] = settings
    # The same object stays where it is equal: graphs hold as long as nothing is replaced.
    if pair.__dict__.get(SETTINGS) != settings:
        pair.__dict__[SETTINGS] = settings
    pair.__class__ = _accelerated_layers(stock)


def unpatch_layers(model: Any) -> None:
    """Undo ``patch_layers`` of this model, on the pair it was done to; another patched model that shares it keeps it."""
    patched = runtime_of(model).pair
    for pair in {id(x): x for x in (model.vlm_with_expert, patched and patched()) if x is not None}.values():
        runtime = LAYER_RUNTIMES.of(pair)
        runtime.patched_by.pop(model, None)
        left = next(iter(runtime.patched_by.values()), None)
        if left is not None:
            pair.__dict__[SETTINGS] = left
            continue
        cls: Any = type(pair)
        if issubclass(cls, AcceleratedLayers):
            pair.__class__ = cls.stock_class
            pair.__dict__.pop(SETTINGS, None)
        LAYER_RUNTIMES.drop(pair)


def model_methods(stock: type, accelerated: type) -> dict[str, Callable[..., Any]]:
    """``denoise_step`` and ``embed_prefix`` for a patched model of this class: what other samplers call."""
    requests: dict[str, tuple[Eligibility, Any]] = {
        "denoise_step": (STEPS, StepRequest), "embed_prefix": (PREFIX, Call),
    }  # fmt: skip
    return {
        name: _of_model(stock, accelerated, name, *request)
        for name, request in requests.items()
        if callable(getattr(stock, name, None))
    }


def _of_model(
    stock: type, accelerated: type, name: str, rules: Eligibility, request: Any
) -> Callable[..., Any]:
    """By the engine of the model's pair, where that may. request  makes a record of the arguments in stock's order"""
    own: Any = getattr(stock, name)
    found = signature(own)
    length = 5 if request is Call else len(request._fields)  # of a ``Call`` the first five fields

    @wraps(own)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        pair: Any = self.vlm_with_expert
        if stock_wanted() or not issubclass(type(self), accelerated):
            return own(self, *args, **kwargs)
        runtime = LAYER_RUNTIMES.of(pair)
        engine, reason = None, rules.model_reason(self)
        # A method of the user's own calls layers that may be ours; stock's is stock's throughout.
        users = reason is not None and unknown_of([("VLAFlowMatching", self, (name,))]) is not None
        if not isinstance(pair, AcceleratedLayers):
            reason = "vlm_with_expert is not the one that was patched; patch the policy again"
        if reason is None:
            try:
                given = list(found.bind(self, *args, **kwargs).arguments.values())[1:]
            except TypeError as error:
                reason = f"the arguments are not stock's: {error}"
            else:
                given += [None] * (length - len(given))
                look = runtime.look_for_step if request is StepRequest else runtime.look
                engine, reason = look(pair)
                reason = reason or rules.call_reason(self, request(*given))
        runtime.count(name, reason)
        if engine is None or reason is not None:
            with nullcontext() if users else stock_layers():
                return own(self, *args, **kwargs)
        return getattr(engine, name)(self, *given)

    return _disable_dynamo(method)
