"""What ``sample_actions`` is given: from a batch as ``predict_action_chunk`` takes it, or drawn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..measure.rounds import fresh
from .call_rules import Call

Inputs = tuple[Any, Any, Tensor, Tensor, Tensor]
"""images, image masks, tokens, token masks, state"""
STATE, TOKENS = "observation.state", ("observation.language.tokens", "observation.language.attention_mask")


def chunk_inputs(policy: Any, batch: dict[str, Any]) -> Inputs:
    """By the policy's own methods; the batch is not changed.

    raises  ValueError for a batch that no preprocessor of the policy's has made
    """
    accepted = "accepted is what the policy's preprocessor returns"
    missing = [name for name in (STATE, *TOKENS) if name not in batch]
    if missing:
        raise ValueError(f"batch has no {missing[0]!r}; {accepted}")
    shape, rows = tuple(batch[STATE].shape), len(batch[TOKENS[0]])
    if len(shape) not in (2, 3) or shape[0] != rows:
        raise ValueError(
            f"{STATE!r} has the shape {shape}, and {TOKENS[0]!r} is for {rows}; {accepted}: a state [{rows}, n]"
        )
    batch = policy._prepare_batch(fresh(batch))
    images, image_masks = policy.prepare_images(batch)
    tokens, token_masks = (batch[name] for name in TOKENS)
    return images, image_masks, tokens, token_masks, policy.prepare_state(batch)


def made_inputs(model: Any) -> Inputs:
    """One observation of the sizes that a ``VLAFlowMatching`` is configured for; no random state moves.

    Of numbers that differ: zeros would hide a fault, and make nothing of attention. Empty cameras are masked, language is
    padded where the policy's processor pads it.
    """
    config, device, generator = model.config, model.state_proj.weight.device, torch.Generator().manual_seed(0)
    vlm = model.vlm_with_expert.get_vlm_model()
    side, rows = vlm.vision_model.embeddings.image_size, vlm.text_model.get_input_embeddings().weight.shape[0]
    images, masks = [], []
    for name in config.image_features:
        is_empty = "empty_camera" in name
        frame = torch.randn(1, 3, side, side, generator=generator).tanh()
        images.append((torch.full_like(frame, -1.0) if is_empty else frame).to(device))
        masks.append(torch.full((1,), not is_empty, dtype=torch.bool, device=device))
    length = config.tokenizer_max_length
    tokens = torch.randint(rows, (1, length), generator=generator).to(device)
    token_masks = torch.ones_like(tokens, dtype=torch.bool)
    if getattr(config, "pad_language_to", None) == "max_length":
        token_masks[:, length // 2 :] = False
    return (
        images,
        masks,
        tokens,
        token_masks,
        torch.randn(1, config.max_state_dim, generator=generator).to(device),
    )


def made_noise(model: Any, batch: int = 1) -> Tensor:
    """[B, S, A] fp32; no random state moves."""
    shape = (batch, model.config.chunk_size, model.config.max_action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(model.state_proj.weight.device)


def drawn_like(model: Any, call: Call) -> Call:
    """A call of the same shapes, dtypes and masks with other numbers; no random state moves."""
    generator = torch.Generator().manual_seed(2)
    rows = model.vlm_with_expert.get_vlm_model().text_model.get_input_embeddings().weight.shape[0]

    def numbers(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)

    def frame(like: Tensor) -> Tensor:
        if like.dtype is torch.uint8:
            drawn = torch.randint(256, like.shape, generator=generator)
        else:
            drawn = torch.randn(like.shape, generator=generator).tanh()
        return drawn.to(like.device, like.dtype)

    kwargs = dict(call.kwargs or {})
    if isinstance(kwargs.get("prev_chunk_left_over"), Tensor):
        kwargs["prev_chunk_left_over"] = numbers(kwargs["prev_chunk_left_over"])
    tokens = torch.randint(rows, call.tokens.shape, generator=generator).to(call.tokens)
    state, noise = numbers(call.state), numbers(call.noise)
    assert state is not None
    return call._replace(
        images=[frame(each) for each in call.images], tokens=tokens, state=state, noise=noise, kwargs=kwargs
    )
