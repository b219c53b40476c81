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

from .call_rules import Call
from .eligibility import TRAINING
from .model_rules import size_reason
from .runtime import runtime_of
from .settings import stock_layers


class TrainingMixin:
    """Put before ``Accelerated`` by ``patch(training=True)``; overrides ``forward`` and nothing else."""

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
        """As the stock method, computed by ``LossEngine`` where ``Eligibility`` allows it.

        images  may be tokens that the engine made, see ``Call``; ValueError where it may not compute the loss
        """
        given = (list(images), list(img_masks), lang_tokens, lang_masks, state)
        cls: Any = type(self)  # read once: another thread may unpatch meanwhile, or have done so by now
        if not issubclass(cls, TrainingMixin):
            return cls.forward(self, *given, actions, noise, time)
        runtime = runtime_of(self).training
        engine, reason = runtime.look(self)
        call = Call(*given, noise, actions, time)
        reason = reason or TRAINING.call_reason(self, call)
        if reason is not None or engine is None:
            if call.has_image_tokens:
                raise ValueError(f"image tokens are given, which stock does not take: {reason}; give images")
            runtime.fell_back(str(reason))
            with stock_layers():
                return cls.stock_class.forward(self, *given, actions, noise, time)
        # In stock's order, so that a seeded run draws what stock draws.
        if noise is None:
            noise = self.sample_noise(actions.shape, actions.device)
        if time is None:
            time = self.sample_time(actions.shape[0], actions.device)
        losses = engine.losses(self, *given, actions, noise, time)
        runtime.served()
        return losses


def training_reason(model: Any) -> str | None:
    """Why the losses of a model patched for training are stock's whatever the batch holds, or None."""
    return runtime_of(model).training.look(model)[1] or size_reason(model)
