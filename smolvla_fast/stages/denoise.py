"""Stage 4: noise -> action chunk, N Euler steps of the expert over the prefix KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.dims import Dims
from ..model.kv_cache import PrefixKV
from ..model.weights import DecoderLayer, Heads
from ..ops.cpu.workspace import Workspace
from ..ops.reference.euler_step import Guidances
from ..ops.reference.masks import block_mask
from ..ops.reference.rope import rope_tables
from ..ops.table import Ops


class LoopReport(NamedTuple):
    """What ran the denoise loop of one chunk.

    launches          kernel launches of one step: two at its ends, five a layer; 0 where the whole loop is one launch, None
                      where ops are not one launch each
    persistent        whether the whole loop was one launch
    fallback_reasons  why it was not, where the backend has a kernel for that
    """

    launches: int | None
    persistent: bool
    fallback_reasons: dict[str, str]


def denoise(
    ops: Ops,
    dims: Dims,
    expert: list[DecoderLayer],
    heads: Heads,
    kv: PrefixKV,
    noise: Tensor,
    times: Tensor,
    guidance: Guidances | None = None,
    observe: Callable[[Tensor, Tensor], None] | None = None,
    workspace: Workspace | None = None,
) -> tuple[Tensor, LoopReport]:
    """Integrate the velocity field from t = 1 (noise) to t = 0 (actions).

    noise        [B, S, A]  fp32, not written to
    times        [N, B, E]  time embedding of every step
    guidance     where real-time chunking is on
    observe      called with (x, v) after every step; for ``verify``
    workspace    memory for the steps where the backend's ops write into it; unused where somebody observes
    returns      [B, S, A]  fp32, a fresh tensor, and what ran the loop
    replaces     ``euler_integrate`` over ``denoise_step`` of LeRobot

    One launch where the backend has a kernel for the loop and nobody observes the steps, else op by op.
    Self-attention layers look at [prefix KV | suffix so far], positions counted on from the prefix's valid tokens.
    Cross-attention layers look at the cross KV alone, positions from 0.
    """
    fallback_reasons = {}
    if ops.denoise_persistent is not None and observe is None:
        call = (dims, expert, heads, kv, noise, times, guidance)
        reason = None if ops.why_not_persistent is None else ops.why_not_persistent(*call)
        if reason is None:
            return ops.denoise_persistent(*call), LoopReport(0, True, {})
        fallback_reasons["denoise_persistent"] = reason

    batch, prefix = kv.pad_masks.shape
    steps, suffix = times.shape[0], dims.chunk
    device = noise.device

    ones = torch.ones(batch, suffix, dtype=torch.bool, device=device)
    seen = kv.pad_masks[:, None, :].expand(batch, suffix, prefix)
    cross_mask = ops.prepare_mask(seen)
    self_mask = ops.prepare_mask(torch.cat([seen, block_mask(ones, ones)], dim=2))
    place = torch.cumsum(ones, dim=1) - 1
    cross_rope = rope_tables(place, dims.head_dim)
    self_rope = rope_tables(torch.sum(kv.pad_masks, dim=-1)[:, None] + place, dims.head_dim)

    folded = ops.suffix_fold(times, *heads.action_in, *heads.time_in)
    dt = -1.0 / steps
    x = noise
    lent = workspace if observe is None else None
    with nullcontext() if lent is None else lent.lent():
        for step in range(steps):
            h = ops.suffix_embed(x, step, folded, *heads.time_out)
            for layer, cache in zip(expert, kv.layers, strict=True):
                if layer.cross:
                    q = ops.norm_qkv_rope(
                        h, *layer.norm1, layer.q, None, None, cross_rope, None, None, dims.head_dim
                    )
                    a = ops.masked_attention(q, cache.k, cache.v, cross_mask)
                else:
                    slots = cache.suffix(prefix)
                    q = ops.norm_qkv_rope(
                        h, *layer.norm1, layer.q, layer.k, layer.v, self_rope, *slots, dims.head_dim
                    )
                    a = ops.masked_attention(q, cache.k, cache.v, self_mask)
                h = ops.linear_residual(a, layer.o, h)
                a = ops.norm_swiglu(h, *layer.norm2, layer.gate, layer.up)
                h = ops.linear_residual(a, layer.down, h)
            guide = None if guidance is None else guidance.at(step)
            x, v = ops.euler_step(h, *heads.expert_norm, *heads.action_out, x, dt, guide)
            if observe is not None:
                observe(x, v)
        # Copied while the memory is still lent: the moment it is given back, another thread may write to it.
        chunk = x if lent is None else x.clone()
    single = ops.single_launch and not ops.leaves_to_torch(expert[0].gate.dtype, batch * suffix)
    return chunk, LoopReport(2 + 5 * len(expert) if single else None, False, fallback_reasons)
