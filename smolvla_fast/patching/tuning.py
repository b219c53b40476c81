"""Tunes the chunks of a patched policy, and keeps the plan beside it and in the user's cache folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..engine import plan_files
from ..tune.result import Tuning
from ..tune.tuner import Progress, tune
from .inputs import chunk_inputs
from .runtime import runtime_of

SECONDS = 90.0
"""How long a tuning may take where nothing else is said."""


def tune_policy(
    policy: Any,
    batch: dict[str, Any],
    seconds: float = SECONDS,
    progress: Progress = lambda share, doing: None,
) -> Tuning:
    """Measure who computes each op of this patched policy's chunks fastest, and use it from its next chunk on.

    policy  a SmolVLA policy      batch  as ``predict_action_chunk`` takes it: its cameras and batch size are measured
    raises  RuntimeError where stock runs or the tier has nothing to tune, with the reason
    """
    model = policy.model
    runtime = runtime_of(model)
    engine, reason = runtime.look(model)
    if engine is None:
        raise RuntimeError(f"stock runs, so there is nothing to tune: {reason}")
    products = engine.products
    if products.tier.stock_order:
        raise RuntimeError(
            "precision='exact' runs stock's own calls, whatever is faster: it has nothing to tune"
        )
    inputs = chunk_inputs(policy, batch)
    shape = (len(inputs[-1]), model.config.chunk_size, model.config.max_action_dim)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(inputs[-1].device)
    key = plan_files.key_of(model, products.tier.name, products.backend, products.device)
    known: Mapping[str, str] = {} if products.plan is None else products.plan.choices
    was_training = policy.training
    policy.eval()
    try:
        found = tune(
            model, products, (*inputs, noise), seconds=seconds, known=known, key=key, progress=progress
        )
    finally:
        policy.train(was_training)
    runtime.use(model, key, found.plan)
    return found


def keep(policy: Any, tuning: Tuning) -> Path:
    """Write the plan where the next process looks for it. Raises OSError naming the folder and what to do."""
    path = plan_files.save(tuning.key, tuning.plan, tuning.to_dict())
    runtime_of(policy.model).use(policy.model, tuning.key, replace(tuning.plan, origin=str(path)))
    return path
