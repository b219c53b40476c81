"""Image tokens, language and state to the prefix: one sequence of the text layers' width, with its masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Cost, randn

# V is small: a look-up costs the same in any table.
CASES = (
    dict(C=2, B=1, T=64, L=48, M=960, R=32, V=512, ends=0),
    dict(C=3, B=2, T=5, L=7, M=33, R=5, V=11, ends=2),
    dict(C=1, B=1, T=1, L=1, M=1, R=1, V=1, ends=0),
)

Prefix = tuple[Tensor, Tensor, Tensor]
"""embeddings [B, P, M], pad_masks [B, P] bool, att_masks [B, P] bool (1 starts a new block: the state, which images and
language do not see)"""


def join_prefix(
    image_tokens: Sequence[Tensor] | Tensor,
    image_masks: Sequence[Tensor] | Tensor,
    tokens: Tensor,
    token_masks: Tensor,
    embed: Callable[[Tensor], Tensor],
    state_token: Tensor | None,
    image_ends: tuple[Tensor, Tensor] | None,
    length: int,
    dtype: torch.dtype | None,
) -> Prefix:
    """``prefix_embed`` over any look-up and a state token that somebody has made, differentiable.

    embed        token ids -> rows of the embedding table
    state_token  [B, M] or [B, n, M]; None leaves the state out
    """
    batch, device = tokens.shape[0], tokens.device
    parts: list[Tensor] = []
    masks: list[Tensor] = []

    def widen(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    def special(ids: Tensor) -> None:
        parts.append(widen(embed(ids))[None].expand(batch, -1, -1))
        masks.append(torch.ones(batch, len(ids), dtype=torch.bool, device=device))

    for image, mask in zip(image_tokens, image_masks, strict=True):
        if image_ends is not None:
            special(image_ends[0])
        image = widen(image)
        parts.append(image * torch.full((), image.shape[-1] ** 0.5, dtype=image.dtype, device=device))
        masks.append(mask[:, None].expand(batch, image.shape[1]))
        if image_ends is not None:
            special(image_ends[1])
    language = widen(embed(tokens))
    parts.append(language * math.sqrt(language.shape[-1]))
    masks.append(token_masks)
    unseen = sum(part.shape[1] for part in parts)
    if state_token is not None:
        parts.append(state_token[:, None, :] if state_token.ndim == 2 else state_token)
        masks.append(torch.ones(parts[-1].shape[:2], dtype=torch.bool, device=device))

    embeddings, pad_masks = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
    att_masks = torch.zeros_like(pad_masks)
    att_masks[:, unseen:].fill_(True)
    missing = length - embeddings.shape[1]
    if missing > 0:
        embeddings = F.pad(embeddings, (0, 0, 0, missing))
        pad_masks, att_masks = F.pad(pad_masks, (0, missing)), F.pad(att_masks, (0, missing))
    return embeddings, pad_masks, att_masks


def prefix_embed(
    image_tokens: Sequence[Tensor] | Tensor,
    image_masks: Sequence[Tensor] | Tensor,
    tokens: Tensor,
    token_masks: Tensor,
    state: Tensor,
    table: Tensor,
    projection: tuple[Tensor, Tensor],
    image_ends: tuple[Tensor, Tensor] | None = None,
    length: int = 0,
    dtype: torch.dtype | None = torch.float32,
) -> Prefix:
    """``[√M·image tokens of each camera | √M·table[tokens] | state·Wᵀ + b]``, zeros behind it up to ``length``.

    image_tokens [C, B, T, M], or C of [B, T, M]      image_masks  [C, B] bool, or C of [B]
    tokens       [B, L]  token ids      token_masks  [B, L] bool      state  [B, R]
    table        [V, M]      projection  (weight [M, R], bias [M])
    image_ends   token ids [n] before and [m] after each camera, not scaled, where the checkpoint asks for them
    length       the least P
    dtype        of the residual stream; None lets stock's own promotions decide
    returns      ``Prefix``
    replaces     ``embed_prefix`` of LeRobot's ``VLAFlowMatching``
    """
    state_token = F.linear(state, *projection)
    embed = partial(F.embedding, weight=table)
    return join_prefix(
        image_tokens, image_masks, tokens, token_masks, embed, state_token, image_ends, length, dtype
    )


def make_inputs(case: dict[str, int], dtype: torch.dtype, generator: torch.Generator) -> dict[str, object]:
    """Every second camera is absent from every second sample; the last prompts are shorter."""
    c, b, t, n, m, r, v = (case[name] for name in "CBTLMRV")
    wide = torch.promote_types(dtype, torch.float32)

    def ids(*shape: int) -> Tensor:
        return torch.randint(v, shape, generator=generator)

    odd = (torch.arange(c)[:, None] + torch.arange(b)[None]) % 2
    return {
        "image_tokens": randn(c, b, t, m, dtype=dtype, generator=generator),
        "image_masks": odd == 0,
        "tokens": ids(b, n),
        "token_masks": torch.arange(n)[None] < n - torch.arange(b)[:, None],
        "state": randn(b, r, dtype=wide, generator=generator),
        "table": randn(v, m, dtype=dtype, generator=generator, scale=0.3),
        "projection": (
            randn(m, r, dtype=wide, generator=generator, scale=r**-0.5),
            randn(m, dtype=wide, generator=generator, scale=0.3),
        ),
        "image_ends": (ids(case["ends"]), ids(1)) if case["ends"] else None,
        "dtype": torch.float32,
    }


def cost(case: dict[str, int], itemsize: int) -> Cost:
    c, b, t, n, m, r, _ = (case[name] for name in "CBTLMRV")
    looked_up = b * (c * t + n) * m
    return Cost(2.0 * b * m * r + looked_up, float(itemsize + 4) * looked_up + 4.0 * m * (r + b))
