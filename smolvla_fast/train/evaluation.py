"""Measures a policy on held-out episodes, in noise of its own: the random state of training does not move."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..smolvla.features import ACTION, OBS_IMAGES
from .data import to_floats
from .random_state import seeded

SEED = 7
"""Of the noise and times of every evaluation."""


@torch.no_grad()
def action_error(
    policy: Any, preprocess: Any, batches: Iterable[Any], *, wrong_images: bool = False
) -> tuple[float, float]:
    """Mean squared errors of the predicted chunks, and of the best constant action, both in normalised units.

    The constant is the mean of the compared actions, so no other constant does better on them. Actions beyond the end of
    an episode do not count.

    wrong_images  give every frame another frame's images: the error of the policy without sight
    """
    inputs = [preprocess(to_floats(raw, policy.config.device)) for raw in batches]
    if wrong_images:
        inputs = _with_other_images(inputs)
    with seeded(SEED):
        predicted = torch.cat([policy.predict_action_chunk(batch).float().cpu() for batch in inputs])
    target = torch.cat([batch[ACTION].float().cpu() for batch in inputs])
    valid = ~torch.cat([batch["action_is_pad"].cpu() for batch in inputs])
    constant = target[valid].mean(dim=0)
    errors = (predicted - target)[valid], target[valid] - constant
    return errors[0].square().mean().item(), errors[1].square().mean().item()


def _with_other_images(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rolls the images by half of all samples: where episodes are about equally long, they come from another episode."""
    sizes = [len(batch[ACTION]) for batch in inputs]
    moved: list[dict[str, Any]] = [dict(batch) for batch in inputs]
    for key in (key for key in inputs[0] if key.startswith(f"{OBS_IMAGES}.") and not key.endswith("_is_pad")):
        images = torch.cat([batch[key] for batch in inputs]).roll(sum(sizes) // 2, dims=0)
        for batch, part in zip(moved, images.split(sizes), strict=True):
            batch[key] = part
    return moved
