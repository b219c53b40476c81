"""Stage 4: noise -> action chunk, N Euler steps of the expert over the prefix KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor

from ..model.dims import Dims
from ..model.kv_cache import PrefixKV
from ..model.weights import DecoderLayer, Heads
from ..ops.memory import Workspace
from ..ops.reference.euler_step import Guidances
from ..ops.reference.suffix_tokens import suffix_tokens
from ..ops.table import Ops


def denoise(
    ops: Ops,
    dims: Dims,
    expert: list[DecoderLayer],
    heads: Heads,
    kv: PrefixKV,
    noise: Tensor,
    times: Tensor,
    guidance: Guidances | None = None,
    watch: Callable[[Tensor, Tensor], None] | None = None,
    passed_over: dict[str, str] | None = None,
    workspace: Workspace | None = None,
) -> Tensor:
    """Integrate the velocity field from t = 1 (noise) to t = 0 (actions).

    noise        [B, S, A]  fp32, not written to
    times        [N, B, E]  time embedding of every step
    guidance     where real-time chunking is on
    watch        called with (x, v) after every step; for ``verify``
    passed_over  gets the reason where the backend has one kernel for the whole loop and it cannot serve this call
    workspace    memory for the steps, which ops of backend ``cpu`` write into; unused where somebody watches
    returns      [B, S, A]  fp32, a fresh tensor
    replaces     ``euler_integrate`` over ``denoise_step`` of LeRobot

    One launch where the backend has a kernel for the loop and nobody watches the steps, else op by op.
    Self-attention layers look at [prefix KV | suffix so far], positions counted on from the prefix's valid tokens.
    Cross-attention layers look at the cross KV alone, positions from 0.
    """
    if ops.denoise_persistent is not None and watch is None:
        call = (dims, expert, heads, kv, noise, times, guidance)
        reason = None if ops.why_not_persistent is None else ops.why_not_persistent(*call)
        if reason is None:
            return ops.denoise_persistent(*call)
        if passed_over is not None:
            passed_over["denoise_persistent"] = reason

    steps, prefix = times.shape[0], kv.pad_masks.shape[1]
    own, cross = suffix_tokens(kv.pad_masks, dims.chunk, dims.head_dim)
    own, cross = (tokens._replace(mask=ops.prepare_mask(tokens.mask)) for tokens in (own, cross))
    folded = ops.suffix_fold(times, heads.action_in, heads.time_in)
    dt = -1.0 / steps
    x = noise
    # Whoever watches keeps what he sees, so every result is fresh then.
    with nullcontext() if workspace is None or watch is not None else workspace.lent() as memory:
        for step in range(steps):
            h = ops.suffix_embed(x, step, folded, heads.time_out, memory=memory)
            for layer, cache in zip(expert, kv.layers, strict=True):
                tokens = cross if layer.cross else own
                weights = (layer.q, None, None) if layer.cross else (layer.q, layer.k, layer.v)
                slots = None if layer.cross else cache.suffix(prefix)
                q = ops.norm_qkv_rope(h, layer.norm1, weights, tokens.rope, slots, memory=memory)
                a = ops.masked_attention(q, cache.k, cache.v, tokens.mask, memory=memory)
                h = ops.linear_residual(a, layer.o, h, out=h)
                a = ops.norm_swiglu(h, layer.norm2, layer.gate, layer.up, memory=memory)
                h = ops.linear_residual(a, layer.down, h, out=h)
            guide = None if guidance is None else guidance.at(step)
            x, v = ops.euler_step(h, heads.expert_norm, heads.action_out, x, dt, guide, memory=memory)
            if watch is not None:
                watch(x, v)
        # Copied while the memory is still lent: the moment it is given back, another thread may write to it.
        return x if memory is None else x.clone()
