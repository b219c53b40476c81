"""Where callers below ``sample_actions`` and the fused layers meet: methods of ``policy.model.vlm_with_expert``, and
``denoise_step`` of its model.

The pair is given a subclass of its own class, as the model is: nothing is renamed, copies and pickles work, undo is exact.
Each method keeps stock's signature, in whatever release, and runs stock's own method where the engine may not serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from inspect import Signature, signature
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo

from ..layers.engine import LayerEngine
from .call_rules import Call
from .eligibility import LAYERS, PREFIX, STEPS, Eligibility
from .layer_rules import LayerRequest, StepRequest, needs_grad, requested
from .layer_runtime import LAYER_RUNTIMES
from .settings import SETTINGS, Settings, stock_layers, stock_wanted


class AcceleratedLayers:
    """Put before a pair's own class by ``patch``."""

    stock_class: type

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        cls = type(self)  # read once: another thread may unpatch meanwhile
        if not issubclass(cls, AcceleratedLayers):
            return object.__reduce_ex__(self, protocol)
        return restore_layers, (cls.stock_class,), self.__dict__


def _forward(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.forward(pair, request.layers, stock, needs_grad(pair, request))


def _self_attention(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.layer(pair, request.layers, False, needs_grad(pair, request))


def _cross_attention(engine: LayerEngine, pair: Any, request: LayerRequest, stock: Callable[..., Any]) -> Any:
    return engine.layer(pair, request.layers, True, needs_grad(pair, request))


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
        if engine is not None and request is not None and reason is None:
            result = serve(engine, self, request, own)
            LAYER_RUNTIMES.of(self).count(name, None)
            return result
        LAYER_RUNTIMES.of(self).count(name, str(reason))
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
    attributes = {"stock_class": stock, "__module__": stock.__module__, **methods}
    return type(stock.__name__, (AcceleratedLayers, stock), attributes)


def restore_layers(stock: type) -> Any:
    cls: Any = _accelerated_layers(stock)
    return cls.__new__(cls)


def patch_layers(model: Any, settings: Settings) -> None:
    """Not of a model that LeRobot compiles (``compile_model``): what is compiled is stock's, layers and all."""
    pair = model.vlm_with_expert
    if any(name in model.__dict__ for name in ("sample_actions", "forward")):
        return unpatch_layers(pair)
    cls: Any = type(pair)
    stock = cls.stock_class if issubclass(cls, AcceleratedLayers) else cls
    if (
        pair.__dict__.get(SETTINGS) != settings
    ):  # the same object else: graphs hold as long as nothing is replaced
        pair.__dict__[SETTINGS] = settings
    pair.__class__ = _accelerated_layers(stock)


def unpatch_layers(pair: Any) -> None:
    cls: Any = type(pair)
    if issubclass(cls, AcceleratedLayers):
        pair.__class__ = cls.stock_class
        pair.__dict__.pop(SETTINGS, None)
    LAYER_RUNTIMES.drop(pair)


def _of_model(
    model: Any,
    name: str,
    rules: Eligibility,
    request: Any,
    serve: Callable[[LayerEngine], Any],
    stock: Callable[[], Any],
) -> Any:
    """A method of a patched model by its pair's engine, where that may."""
    pair = model.vlm_with_expert
    if stock_wanted() or not isinstance(pair, AcceleratedLayers):
        return stock()
    runtime = LAYER_RUNTIMES.of(pair)
    engine, reason = runtime.look(pair)
    reason = reason or rules.model_reason(model) or rules.call_reason(model, request)
    if engine is None or reason is not None:
        runtime.count(name, str(reason))
        return stock()  # its layers may still be ours
    found = serve(engine)
    runtime.count(name, None)
    return found


def denoise_step(model: Any, stock: Callable[..., Tensor], *given: Any) -> Tensor:
    """stock  the method itself      given  prefix_pad_masks, past_key_values, x_t, timestep"""
    step = lambda engine: engine.denoise_step(model, *given)  # noqa: E731
    return _of_model(model, "denoise_step", STEPS, StepRequest(*given), step, lambda: stock(model, *given))


def embed_prefix(model: Any, stock: Callable[..., Any], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """stock  the method itself      given  images, img_masks, lang_tokens, lang_masks, state"""
    embed = lambda engine: engine.embed_prefix(model, *given)  # noqa: E731
    return _of_model(model, "embed_prefix", PREFIX, Call(*given), embed, lambda: stock(model, *given))
