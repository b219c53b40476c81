"""A user's own sampler as one CUDA graph: ``captured(policy, function)``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..engine.cuda_graphs import CaptureFailed, GraphCache, Graphed, driver_for, math_flags
from .call_rules import ambient
from .change_detector import ChangeDetector, detector_of
from .layer_runtime import LAYER_RUNTIMES
from .runtime import runtime_of
from .settings import SETTINGS, disabled, inside_capture


class Captured:
    """Calls a function, on an NVIDIA GPU by replaying it; see ``smolvla_fast.captured``.

    last_fallback  why the last call ran the function itself, or None
    """

    def __init__(self, model: Any, function: Callable[..., Tensor]) -> None:
        self._model, self._function = model, function
        driver = driver_for(next(model.parameters()).device)
        self._graphs = None if driver is None else GraphCache(driver)
        self._detector: ChangeDetector | None = None
        self._lock = threading.RLock()
        self.last_fallback: str | None = None
        if self._graphs is not None:
            runtime_of(model).captured.add(self._graphs)

    def __call__(self, *given: Any) -> Tensor:
        """As the function itself; a fresh tensor."""
        reason = self._reason(given)
        if reason is None:
            try:
                found = self._run(given)
            except CaptureFailed as failure:
                reason = str(failure)
        self.last_fallback = reason
        return found if reason is None else self._function(*given)

    def _reason(self, given: Any) -> str | None:
        """Why the function itself runs now, or None."""
        device = next(self._model.parameters()).device
        if self._graphs is None:
            return f"nothing is captured on {device}"
        if disabled() or SETTINGS not in self._model.__dict__:
            return "the policy is not patched"
        if torch.is_grad_enabled() and any(
            each.requires_grad for each in (*self._model.parameters(), *_tensors(given))
        ):
            return "gradients are on: call it under torch.no_grad()"
        outside = next((each.device for each in _tensors(given) if each.device != device), None)
        return (
            ambient(device.type)
            if outside is None
            else f"an argument is on {outside}, the policy on {device}"
        )

    def _run(self, given: Any) -> Tensor:
        graphs, model = self._graphs, self._model
        assert graphs is not None
        call = Graphed.of(given, math_flags())

        def compute(statics: list[Tensor]) -> tuple[Tensor, None]:
            with inside_capture():
                found = self._function(*call.rebuild(statics))
            if not isinstance(found, Tensor):
                raise TypeError(f"the function returned a {type(found).__qualname__}; accepted is one tensor")
            return found, None

        on = (
            torch.cuda.device(call.tensors[0].device)
            if call.tensors and call.tensors[0].is_cuda
            else nullcontext()
        )
        with self._lock, on:
            if self._detector is None or not self._detector.same_memory():
                self._look()
            noted = self._noted()
            replay = graphs.replays(call.key, call.tensors)
            found, _ = graphs.run(call.key, call.tensors, compute)
            # While the GPU works: a module, a setting or a quantised weight may have changed, which a replay does not see.
            assert self._detector is not None
            if replay and not (self._detector.same(model) and self._noted() == noted):
                self._look()
                found, _ = graphs.run(call.key, call.tensors, compute)
            return found

    def _look(self) -> None:
        """Forget what was captured of the model as it was."""
        assert self._graphs is not None
        self._graphs.clear()
        self._detector = detector_of(self._model)
        if self._detector is None:
            raise CaptureFailed("the structure is not SmolVLA's: what may change in it is not known")

    def _noted(self) -> int:
        """How often quantised weights were made anew."""
        engine = LAYER_RUNTIMES.of(self._model.vlm_with_expert).engine
        copies = None if engine is None else engine.products.quantized_weights
        return 0 if copies is None else copies.checked()


def _tensors(given: Any) -> list[Tensor]:
    return [each for each in tree_flatten(given)[0] if isinstance(each, Tensor)]
