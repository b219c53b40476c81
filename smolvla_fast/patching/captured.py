"""A user's own sampler as one CUDA graph: ``captured(policy, function)``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..engine.cuda_graphs import CaptureFailed, GraphCache, Graphed, driver_for, inside_capture, math_flags
from ..inference import chunk_settings
from .call_rules import ambient
from .change_detector import ChangeDetector, detector_of
from .layer_runtime import LAYER_RUNTIMES
from .runtime import runtime_of
from .settings import DISABLE, SETTINGS, disabled


class Captured:
    """Calls a function, on an NVIDIA GPU by replaying it; see ``smolvla_fast.captured``.

    last_fallback  why the last call ran the function itself, or None
    """

    def __init__(self, model: Any, function: Callable[..., Tensor]) -> None:
        self._model, self._function = model, function
        self._caches: dict[torch.device, GraphCache | None] = {}
        self._detector: ChangeDetector | None = None
        self.last_fallback: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the function itself; a fresh tensor."""
        reason = self._reason((args, kwargs))
        if reason is None:
            try:
                found = self._run((args, kwargs))
            except CaptureFailed as failure:
                reason = str(failure)
        self.last_fallback = reason
        return found if reason is None else self._function(*args, **kwargs)

    def _graphs(self) -> GraphCache | None:
        """The graphs on the device where the policy is now; None where nothing is captured."""
        device = next(self._model.parameters()).device
        if device not in self._caches:
            driver = driver_for(device)
            self._caches[device] = None if driver is None else GraphCache(driver)
        graphs = self._caches[device]
        if graphs is not None:
            runtime_of(self._model).captured.add(graphs)
        return graphs

    def _reason(self, given: Any) -> str | None:
        """Why the function itself runs now, or None."""
        device = next(self._model.parameters()).device
        if disabled():
            return f"{DISABLE} is set"
        if SETTINGS not in self._model.__dict__:
            return "the policy is not patched"
        if self._graphs() is None:
            return f"nothing is captured on {device}"
        tensors = [each for each in tree_flatten(given)[0] if isinstance(each, Tensor)]
        # Whether gradients are on is asked first: a model has many parameters.
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self._model.parameters())):
            return "gradients are on: call it under torch.no_grad()"
        for each in tensors:
            if each.device != device:
                return f"an argument is on {each.device}, the policy on {device}"
        return ambient(device.type)

    def _run(self, given: Any) -> Tensor:
        graphs, model = self._graphs(), self._model
        assert graphs is not None
        call = Graphed.of(given, (*chunk_settings(model), *math_flags()))
        try:
            hash(call.key)
        except TypeError as error:
            raise CaptureFailed(f"an argument is no tensor and does not compare by value: {error}") from error

        def compute(statics: list[Tensor]) -> tuple[Tensor, None]:
            args, kwargs = call.rebuild(statics)
            with inside_capture():
                found = self._function(*args, **kwargs)
            if not isinstance(found, Tensor):
                raise TypeError(f"the function returned a {type(found).__qualname__}; accepted is one tensor")
            return found, None

        device = next(model.parameters()).device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self._detector is None or not self._detector.same_memory():
                self._reset(graphs)
            noted, copies = self._detector, self._generation()
            replay = graphs.replays(call.key, call.tensors)
            found, _ = graphs.run(call.key, call.tensors, compute)
            # While the GPU works: a module, a setting or a quantised weight may have changed, which a replay does not see.
            if replay and (noted is None or not noted.same(model) or self._generation() != copies):
                self._reset(graphs)
                found, _ = graphs.run(call.key, call.tensors, compute)
            return found

    def _reset(self, graphs: GraphCache) -> None:
        """Forget what was captured of the model as it was."""
        graphs.clear()
        self._detector = detector_of(self._model)
        if self._detector is None:
            raise CaptureFailed("the structure is not SmolVLA's: what may change in it is not known")

    def _generation(self) -> int:
        """How often quantised weights were made anew."""
        engine = LAYER_RUNTIMES.of(self._model.vlm_with_expert).engine
        copies = None if engine is None else engine.products.quantized_weights
        return 0 if copies is None else copies.checked()
