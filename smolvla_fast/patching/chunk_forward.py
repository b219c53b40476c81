"""Where callers of a chunk and the engine meet: ``sample_actions`` of a patched model.

It is the one call whose meaning is the same from lerobot 0.3.3 to main. The model gets a subclass of its own class, made on
demand and rebuilt by name when it is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..engine.cuda_graphs import CaptureFailed, not_capturing
from ..inference import Engine, EngineReplaced, Ineligible
from .call_rules import Call
from .eligibility import INFERENCE
from .layer_forward import model_methods
from .rtc import guidance_of
from .runtime import runtime_of
from .settings import stock_layers
from .training_forward import TrainingMixin
from .trial import Kind, about_engine, judged, kind_of, unknown_keyword
from .untried import Untried


def _listed(given: Any) -> Any:
    """An iterator can be gone through once, and stock may have to; what is none is for stock to refuse."""
    return list(given) if isinstance(given, Iterator) else given


class Accelerated:
    """Put before a model's own class by ``patch``; overrides ``sample_actions``; see ``model_methods`` too."""

    stock_class: type

    def train(self: Any, mode: bool = True) -> Any:
        """As the stock method. LeRobot calls ``eval()`` before every action, which writes to every module, to some three
        times; where all evaluate already, they are only asked."""
        if not mode and not any(module.training for module in self.modules()):
            return self
        return super().train(mode)  # type: ignore[misc]

    # Not torch.compiler.disable: that imports dynamo, and with it Triton, as soon as it decorates.
    @_disable_dynamo
    def sample_actions(
        self: Any,
        images: Any,
        img_masks: Any,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the stock method, computed by the engine where it may."""
        # Read once: another thread may unpatch meanwhile, or have done so by now.
        cls: Any = type(self)
        if not issubclass(cls, Accelerated):
            return cls.sample_actions(
                self, images, img_masks, lang_tokens, lang_masks, state, noise=noise, **kwargs
            )
        runtime, stock = runtime_of(self), cls.stock_class
        given = (_listed(images), _listed(img_masks), lang_tokens, lang_masks, state)
        call = Call(*given, noise, kwargs=kwargs)

        def stock_chunk(call: Call) -> Tensor:
            with stock_layers():
                return stock.sample_actions(self, *call[:5], noise=call.noise, **(call.kwargs or {}))

        def drawn() -> Tensor:
            with not_capturing():
                shape = (state.shape[0], self.config.chunk_size, self.config.max_action_dim)
                return self.sample_noise(shape, state.device)

        engine, reason, validators = runtime.gate(self)
        untried = reason if isinstance(reason, Untried) and engine is not None else None
        reason = (None if untried else reason) or INFERENCE.call_reason(self, call)
        if untried is not None:
            reason = reason or unknown_keyword(call)
        if untried is not None and state.is_cuda and torch.cuda.is_current_stream_capturing():
            reason = reason or f"{untried}; a trial waits for the device, which nobody may inside a capture"
        if untried is not None and engine is not None and reason is None:
            kind = kind_of(self, call, (*untried.about, *about_engine(self, engine)))
            is_trial, reason = runtime.begin_trial(kind, untried)
            if is_trial:
                noise = drawn() if noise is None else noise
                return _tried(self, engine, kind, call._replace(noise=noise), stock_chunk)
        if reason is None and engine is not None:
            noise = drawn() if noise is None else noise
            try:
                guidance = guidance_of(self, kwargs, noise)
                inputs = (*given, noise.contiguous(), guidance)
                try:
                    chunk = engine.act(self, *inputs, validators=validators)
                except EngineReplaced:
                    engine, reason = runtime.look(self)
                    if engine is None or reason is not None:
                        raise Ineligible(str(reason)) from None
                    chunk = engine.act(self, *inputs)
            except (CaptureFailed, Ineligible) as refusal:
                reason = str(refusal)
            else:
                runtime.served()
                return chunk
        runtime.fell_back(str(reason))
        return stock_chunk(call._replace(noise=noise))

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        cls = type(self)  # read once, as above
        if not issubclass(cls, Accelerated):
            return object.__reduce_ex__(self, protocol)
        return restore, (cls.stock_class, issubclass(cls, TrainingMixin)), self.__dict__


def _tried(
    model: Any, engine: Engine, kind: Kind, call: Call, stock_chunk: Callable[[Call], Tensor]
) -> Tensor:
    """Stock's chunk; the engine's is judged beside it."""

    def act(call: Call) -> Tensor:
        assert call.noise is not None
        guidance = guidance_of(model, call.kwargs or {}, call.noise)
        return engine.act(model, *call[:5], call.noise.contiguous(), guidance)

    verdict, runtime = None, runtime_of(model)
    try:
        chunk, verdict = judged(model, engine, call, act=act, stock=stock_chunk)
        return chunk
    finally:
        runtime.end_trial(kind, verdict)


@cache
def accelerated(stock: type, training: bool) -> type:
    bases = (TrainingMixin, Accelerated, stock) if training else (Accelerated, stock)
    methods = model_methods(stock, Accelerated)
    attributes = {"stock_class": stock, "overrides": methods, "__module__": stock.__module__, **methods}
    return type(stock.__name__, bases, attributes)


def restore(stock: type, training: bool = False) -> Any:
    cls: Any = accelerated(stock, training)
    return cls.__new__(cls)
