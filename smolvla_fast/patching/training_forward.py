"""Where the training loss of LeRobot's policy and the fast path meet: ``policy.model.forward``.

Not ``forward_attn_layer`` and ``forward_cross_attn_layer`` one by one. Under those, stock hands over prefix and suffix
together, in one graph: there is no place from which to run the prefix once and without one, and that is most of what a
step can save. ``forward`` has had one signature from lerobot 0.4.4 on, and what lies above it (padding of actions,
reduction, the loss dictionary) stays stock.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo

from ..loss.engine import LossEngine
from ..model.precision import resolve_tier
from ..model.weights import telling_weight
from .runtime import DISABLE, SETTINGS, disabled, runtime_of
from .training_eligibility import call_reason, size_reason
from .training_runtime import Learning


class Learns:
    """Put before ``_Accelerated`` by ``patch(training=True)``; overrides ``forward`` and nothing else."""

    stock_class: type

    @_disable_dynamo
    def forward(
        self: Any,
        images: Any,
        img_masks: Any,
        lang_tokens: Tensor,
        lang_masks: Tensor,
        state: Tensor,
        actions: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """As the stock method, computed by ``LossEngine`` where ``guard`` allows it."""
        images, img_masks = list(images), list(img_masks)
        given = (images, img_masks, lang_tokens, lang_masks, state, actions)
        cls: Any = type(self)  # read once: another thread may unpatch meanwhile, or have done so by now
        if not issubclass(cls, Learns):
            return cls.forward(self, *given, noise, time)
        stock: Any = cls.stock_class
        learning, engine, reason = _ready(self)
        reason = reason or call_reason(self, *given, noise, time)
        if reason is not None or engine is None:
            learning.fell_back(str(reason))
            return stock.forward(self, *given, noise, time)
        # In stock's order, so that a seeded run draws what stock draws.
        if noise is None:
            noise = self.sample_noise(actions.shape, actions.device)
        if time is None:
            time = self.sample_time(actions.shape[0], actions.device)
        losses = engine.losses(self, *given, noise, time)
        learning.served()
        return losses


def _ready(model: Any) -> tuple[Learning, LossEngine | None, str | None]:
    """What lives beside a model, its engine, and why that cannot be used whatever the batch."""
    runtime = runtime_of(model)
    learning, settings = runtime.learning, model.__dict__.get(SETTINGS) or runtime.settings
    if disabled():
        return learning, None, f"{DISABLE} is set"
    if settings is None:
        return learning, None, "the policy was unpatched meanwhile"
    weight = telling_weight(model)
    tier = resolve_tier(settings.precision, weight.dtype)
    return learning, *learning.ready(model, tier, settings.backend, weight.device, settings.image_cache)


def training_reason(model: Any) -> str | None:
    """Why the losses of a model patched for training are stock's whatever the batch holds, or None."""
    return _ready(model)[2] or size_reason(model)
