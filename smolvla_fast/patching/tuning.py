"""A tuning of a patched policy: what it computes with, handed to the tuner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..inference import Engine
from ..model.precision import Tier
from ..tune import tuner
from ..tune.result import Tuning
from .runtime import runtime_of

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
    seconds, progress  see ``tuner.tune``
    raises   RuntimeError where stock runs, or in the tier ``exact``
    """
    model = policy.model
    engine, reason = runtime_of(model).look(model)
    if engine is None:
        raise RuntimeError(f"nothing to tune, stock runs: {reason}")
    if engine.tier.stock_order:
        raise RuntimeError(NOTHING)
    if engine.products.plan is not None:
        engine = Engine(engine.tier, engine.products.backend, engine.products.device)
    inputs = None
    if batch is not None:
        batch = policy._prepare_batch(
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.items()}
        )
        images, masks = policy.prepare_images(batch)
        tokens = (batch[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
        inputs = (images, masks, *tokens, policy.prepare_state(batch))
    return tuner.tune(model, engine, inputs=inputs, noise=noise, seconds=seconds, progress=progress)


def tune_now(policy: Any, batch: dict[str, Any] | None) -> str:
    """Tunes a patched policy, keeps the plan and has it used; what that gave, for the log. Where stock runs, nothing."""
    model = policy.model
    runtime = runtime_of(model)
    reason = runtime.look(model)[1]
    if reason is not None:
        return "; nothing was tuned"
    tuning = tune_policy(policy, batch)
    tuning.save()
    runtime.look_for_plan(model)
    return f"; tuned in {tuning.seconds:.0f} s: {tuning.verdict()}"
