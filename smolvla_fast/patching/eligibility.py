"""May the engine serve this model, this call? Each question answers None for yes, or the reason why stock runs instead.

A rule is a function that gives a reason or None. Rules are asked in order, and the first reason is the answer. A model is
asked when something in it has changed (``change_detector``), a call every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..model.dense import memory_reason
from . import call_rules, layer_rules
from . import model_rules as rules
from .rtc import guidance_reason
from .untried import Untried

ModelRule = Callable[[Any], str | None]
CallRule = Callable[[Any, Any], str | None]


@dataclass(frozen=True)
class Eligibility:
    """What must hold for one kind of work.

    model  rules of a model: its structure and source alone, no values
    live   those of them that are asked at every call, for the change detector does not see what they read
    call   rules of one call, given a model that passes
    """

    model: tuple[ModelRule, ...]
    live: tuple[ModelRule, ...]
    call: tuple[CallRule, ...]

    def model_reason(self, model: Any) -> str | None:
        return _first("the structure is not SmolVLA's", self.model, model)

    def live_reason(self, model: Any) -> str | None:
        return _first("the structure is not SmolVLA's", self.live, model)

    def call_reason(self, model: Any, call: Any) -> str | None:
        return _first("the arguments are not stock's usual ones", self.call, model, call)


def _first(foreign: str, rules: tuple[Callable[..., str | None], ...], *given: Any) -> str | None:
    """The first refusal, else all that is untried. Whatever a foreign object raises under a rule is a refusal too, for stock
    may well run it."""
    untried: Untried | None = None
    try:
        for rule in rules:
            reason = rule(*given)
            if isinstance(reason, Untried):
                untried = reason.beside(untried)
            elif reason is not None:
                return reason
    except Exception as error:
        return f"{foreign}: {error!r}"
    return untried


INFERENCE = Eligibility(
    model=(
        rules.chunk_source, rules.device, rules.forward_hooks, memory_reason, rules.layers_match, rules.parts,
        rules.dtypes,
    ),
    live=(rules.chunk_source, rules.device),
    call=(
        call_rules.circumstances, call_rules.dense, call_rules.no_gradients, call_rules.images, call_rules.tokens,
        call_rules.floats,
        lambda model, call: guidance_reason(model, call.kwargs or {}, len(call.state), call.state.device),
    ),
)  # fmt: skip
"""An action chunk. The engine reads every parameter in place of calling modules."""

TRAINING = Eligibility(
    model=(
        memory_reason, rules.loss_source, rules.layers_match, rules.dtypes, rules.modules_are_fixed, rules.forward_hooks,
        rules.backward_hooks,
    ),
    live=(rules.loss_source, rules.backward_hooks),
    call=(
        call_rules.autocast_in_bf16, call_rules.dense, call_rules.constants, call_rules.images, call_rules.tokens,
        call_rules.floats,
    ),
)  # fmt: skip
"""A training loss. It asks for less: what is differentiated runs through the live modules, so adapters and biases are
theirs. Whether the engine's ops may compute what is frozen is asked apart (``probe.frozen_reason``)."""

LAYERS = Eligibility(
    model=(
        rules.layer_source, rules.device, rules.forward_hooks, memory_reason, rules.heads_match, rules.pair_parts,
        rules.dtypes,
    ),
    live=(rules.layer_source,),
    call=(layer_rules.mode_reason, layer_rules.arguments, layer_rules.gradients),
)  # fmt: skip
"""Single layers of a ``SmolVLMWithExpertModel``, whatever model it is a part of."""

STEPS = Eligibility(
    model=(rules.step_source, rules.layers_match, rules.heads_are_plain),
    live=(),
    call=(layer_rules.step_arguments,),
)
"""A denoise step of a model whose pair passes LAYERS; asked at every step, for it is quick to ask."""

PREFIX = Eligibility(
    model=(rules.prefix_source, rules.heads_are_plain), live=(), call=(layer_rules.prefix_arguments,)
)
"""``embed_prefix`` of such a model."""
