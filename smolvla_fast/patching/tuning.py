"""A tuning of a patched policy: what it computes with, handed to the tuner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..engine.plan_key import key_of
from ..model.precision import Tier
from ..tune import tuner
from ..tune.result import Tuning
from .inputs import chunk_inputs, made_inputs, made_noise
from .runtime import runtime_of
from .settings import stock_layers

TUNE = ("cached", "now", "off")
NOTHING = "precision 'exact' runs stock's own calls and has nothing to tune"


def check_tune(tune: str, tier: Tier) -> None:
    """Raises ValueError for an unknown word, RuntimeError for "now" in the tier ``exact``."""
    if not isinstance(tune, str) or tune not in TUNE:
        accepted = ", ".join(map(repr, TUNE))
        raise ValueError(f"tune={tune!r} is no way to choose; accepted are {accepted}")
    if tune == "now" and tier.stock_order:
        raise RuntimeError(f"tune='now': {NOTHING}; accepted are 'cached' and 'off'")


def tune_policy(
    policy: Any,
    batch: dict[str, Any] | None = None,
    noise: Tensor | None = None,
    *,
    seconds: float = tuner.SECONDS,
    progress: Callable[[str, float], None] | None = None,
) -> Tuning:
    """A plan for a patched SmolVLAPolicy on this machine; nothing is written, and its engine stays.

    batch    as ``predict_action_chunk`` takes it, not changed; drawn where not given      noise  [B, S, A] fp32
             its cameras and its batch size are what is measured
    seconds, progress  see ``tuner.tune``
    raises   RuntimeError where stock runs, or in the tier ``exact``
    """
    model = policy.model
    engine, reason = runtime_of(model).look_to_tune(model)
    if engine is None:
        raise RuntimeError(f"nothing to tune, stock runs: {reason}")
    if engine.tier.stock_order:
        raise RuntimeError(NOTHING)
    inputs = made_inputs(model) if batch is None else chunk_inputs(policy, batch)
    noise = made_noise(model, len(inputs[-1])) if noise is None else noise
    products, was_training = engine.products, policy.training
    key = key_of(model, products.tier.name, products.backend, products.device)
    known = None if products.plan is None else products.plan.choices

    def stock() -> Tensor:
        with stock_layers():
            return model.stock_class.sample_actions(model, *inputs, noise=noise.clone())

    if was_training:
        policy.eval()
    try:
        return tuner.tune(
            model,
            products,
            inputs=inputs,
            noise=noise,
            seconds=seconds,
            progress=progress,
            key=key,
            known=known,
            stock=stock,
        )
    finally:
        if was_training:
            policy.train()


def tune_now(policy: Any, batch: dict[str, Any] | None) -> str:
    """Tunes a patched policy, keeps the plan and has it used; what that gave, for the log. Where stock runs, nothing."""
    model = policy.model
    runtime = runtime_of(model)
    if runtime.look_to_tune(model)[0] is None:
        return "; nothing was tuned"
    tuning = tune_policy(policy, batch)
    tuning.save()
    runtime.look_for_plan(model)
    return f"; tuned in {tuning.seconds:.0f} s: {tuning.verdict()}"
