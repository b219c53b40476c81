"""Losses, gradients and weights that are not finite: where they come from, and that none of them is saved.

``run`` is the ``Run`` of ``training``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..smolvla.features import ACTION
from .errors import TrainingError

CALMER = "try a lower --policy.optimizer_lr, more --policy.scheduler_warmup_steps"


def not_finite(run: Any, loss: float, grad_norm: float, batches: list[dict[str, Any]]) -> str:
    """The message for a loss or gradient that is not finite: which frames hold such values, or what to try."""
    causes = []
    for raw in batches:
        # Preprocessed again, since statistics can make NaN out of finite data.
        batch = run.prepared(raw)
        floats = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
        if bad := [key for key, value in floats.items() if not value.isfinite().all()]:
            frames = batch["index"].tolist() if isinstance(batch.get("index"), Tensor) else len(batch[ACTION])
            causes.append(f"{bad} of the frames {frames} hold such values")
    finite = f"the data of the step, {run.samples} samples, are finite: {CALMER}"
    cause = f"{'; '.join(causes)}: repair the data or its statistics" if causes else finite
    return f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}; {cause}. The step was not taken"


def refuse_nonfinite_weights(run: Any, last: Path | None) -> None:
    """TrainingError for trained weights that are not finite: a checkpoint of them would be useless."""
    trained = [(name, p) for name, p in run.policy.named_parameters() if p.requires_grad]
    bad = [name for name, parameter in trained if not parameter.isfinite().all()]
    if bad:
        kept = f"the last checkpoint, {last}, is as it was" if last else "there is no checkpoint before it"
        raise TrainingError(
            f"step {run.step}: {len(bad)} of {len(trained)} trained weights are not finite, the first is {bad[0]}. Nothing "
            f"was saved, {kept}. {CALMER.capitalize()}, or a larger --policy.optimizer_eps"
        )
