"""From a batch as ``predict_action_chunk`` takes it to what ``sample_actions`` is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

TOKENS = ("observation.language.tokens", "observation.language.attention_mask")


def chunk_inputs(policy: Any, batch: dict[str, Any]) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """images, image masks, tokens, token masks and state, by the policy's own methods; the batch is not changed.

    raises  ValueError for a batch that no preprocessor of the policy's has made
    """
    missing = [name for name in TOKENS if name not in batch]
    if missing:
        raise ValueError(f"batch has no {missing[0]!r}; accepted is what the policy's preprocessor returns")
    batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
    batch = policy._prepare_batch(batch)
    images, image_masks = policy.prepare_images(batch)
    tokens, token_masks = (batch[name] for name in TOKENS)
    return images, image_masks, tokens, token_masks, policy.prepare_state(batch)
