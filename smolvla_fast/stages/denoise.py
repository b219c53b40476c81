"""Stage 4: noise -> action chunk, N Euler steps of the expert over the prefix KV."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from ..model.dims import Dims
from ..model.kv_cache import PrefixKV
from ..model.weights import DecoderLayer, Heads
from ..ops.memory import Workspace
from ..ops.reference.euler_step import Guidances
from ..ops.reference.suffix_tokens import Tokens
from ..ops.table import Ops
from .layers import embed_suffix, expert_layers


class LoopReport(NamedTuple):
    """What ran the denoise loop of one chunk.

    launches          kernel launches of one step: two at its ends, four or five a layer; 0 where the whole loop is one
                      launch, None where ops are not one launch each, or layers differ
    persistent        whether the whole loop was one launch
    fallback_reasons  why it was not, where the backend has a kernel for that
    """

    launches: int | None
    persistent: bool
    fallback_reasons: dict[str, str]


class Suffix(NamedTuple):
    """What every step reads besides the actions.

    own, cross  tokens in self-attention and in cross-attention layers, masks as ``ops.prepare_mask`` gives them
    folded      of ``ops.suffix_fold``
    """

    own: Tokens
    cross: Tokens
    folded: Any


class FirstStep(NamedTuple):
    """What has been computed of the loop ahead of it.

    h  [B, S, E]  of the first step behind the last layer
    """

    suffix: Suffix
    h: Tensor


def suffix_of(ops: Ops, heads: Heads, own: Tokens, cross: Tokens, times: Tensor) -> Suffix:
    """own, cross  of ``ops.rope_masks``      times  as in ``denoise``"""
    own, cross = (tokens._replace(mask=ops.prepare_mask(tokens.mask)) for tokens in (own, cross))
    return Suffix(own, cross, ops.suffix_fold(times, heads.action_in, heads.time_in))


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
    first: FirstStep | None = None,
) -> tuple[Tensor, LoopReport]:
    """Integrate the velocity field from t = 1 (noise) to t = 0 (actions).

    noise        [B, S, A]  fp32, not written to
    times        [N, B, E]  time embedding of every step
    guidance     where real-time chunking is on
    observe      called with (x, v) after every step; for ``verify``
    workspace    memory for the steps, which ops of backend ``cpu`` write into; unused where somebody observes
    first        where the first step ran beside the prefix, and so not in one launch with the rest
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

    steps = times.shape[0]
    suffix = suffix_of(ops, heads, kv.own, kv.cross, times) if first is None else first.suffix
    dt = -1.0 / steps
    x = noise
    # Whoever observes keeps what he sees, so every result is fresh then.
    with nullcontext() if workspace is None or observe is not None else workspace.lent() as memory:
        for step in range(steps):
            if first is not None and step == 0:
                h = first.h
            else:
                h, normed = embed_suffix(ops, expert[0], x, step, suffix.folded, heads.time_out, memory)
                h = expert_layers(ops, expert, kv.layers, h, suffix.own, suffix.cross, memory, normed)
            guide = None if guidance is None else guidance.at(step)
            x, v = ops.euler_step(h, heads.expert_norm, heads.action_out, x, dt, guide, memory=memory)
            if observe is not None:
                observe(x, v)
        # Copied while the memory is still lent: the moment it is given back, another thread may write to it.
        chunk = x if memory is None else x.clone()
    layer = ops.layer_launches(x.shape[0] * dims.chunk)
    launches = None if layer is None else 2 + layer * len(expert)
    return chunk, LoopReport(launches, False, fallback_reasons)
