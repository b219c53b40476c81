"""What is kept beside a model that was patched for training: its ``LossEngine``, counters and receipts."""

from __future__ import annotations

from typing import Any

from ..loss.engine import LossEngine
from ..loss.image_cache import ImageCache
from ..model.precision import resolve_tier
from ..model.weights import representative_weight
from .eligibility import TRAINING
from .model_rules import tier_reason
from .probe import frozen_reason
from .served import Served
from .settings import Settings


class TrainingRuntime(Served[LossEngine]):
    eligibility, work = TRAINING, "training step"

    def __init__(self) -> None:
        super().__init__()
        self._built_for: tuple[Any, ...] = ()

    def prepare(self, model: Any, settings: Settings) -> str | None:
        weight = representative_weight(model)
        tier = resolve_tier(settings.precision, weight.dtype)
        reason = tier_reason(model, tier)
        if reason is not None:
            return reason
        key = (tier, settings.backend, weight.device, settings.image_cache)
        if self.engine is None or self._built_for != key:
            cache = ImageCache(settings.image_cache) if settings.image_cache else None
            self.engine = LossEngine(tier, settings.backend, weight.device, cache)
            self._built_for = key
        # A load in another thread may change a weight between two sides of a comparison: asked twice.
        pair = model.vlm_with_expert
        self.engine.look(model, frozen_reason(pair) and frozen_reason(pair))
        return None

    def announce(self, reason: str | None) -> str:
        """For the line of ``patch``: whether training is on. What is said here is not said again at the first step."""
        if reason is None:
            self.last_fallback = None
            return "; training on"
        self.note(reason)
        return f"; training runs stock: {reason}"

    # Below, the engine is read once: another thread may forget it meanwhile.
    @property
    def fallback_reasons(self) -> dict[str, str]:
        engine = self.engine
        return {} if engine is None else dict(engine.fallback_reasons)

    @property
    def cache(self) -> dict[str, int]:
        engine = self.engine
        return {} if engine is None or engine.cache is None else engine.cache.to_dict()
