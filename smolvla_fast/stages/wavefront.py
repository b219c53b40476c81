"""Stages 3 and 4 overlapping: the first denoise step runs beside the prefix.

Layer i of the expert needs of the prefix what text layer i leaves behind, and nothing more. So a side stream computes layer
i of the first step while the main stream computes text layer i + 1. The ops and what they are given are those of the plain
order, one stage behind the other; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine.side_stream import Side, side_stream
from ..engine.timing import is_timed, section
from ..kernels.launch_order import next_launch_in_order
from ..model.dims import Dims
from ..model.kv_cache import LayerKV, PrefixKV
from ..model.weights import Cast, DecoderLayer, Heads
from ..ops.table import Ops
from .denoise import FirstStep, suffix_of
from .layers import embed_suffix, expert_layers
from .prefix import free_slots, layer_kv, text_kv

BESIDE_ROWS = 64
"""Of a denoise step. A larger one fills the GPU by itself, as the prefix beside it does. Not measured."""
BESIDE = "denoise beside prefix"
"""The section of what runs on the side."""


def side_of_first_step(ops: Ops, rows: int) -> Side | None:
    """Where the first step runs beside the prefix; None where the stages run one behind the other: outside of a capture,
    timed by stage, where one launch is the whole loop, and with too many rows."""
    if is_timed():
        return None
    return side_stream() if ops.denoise_persistent is None and rows <= BESIDE_ROWS else None


def fill_prefix_with_first_step(
    side: Side,
    ops: Ops,
    vlm: Any,
    cast: Cast,
    dims: Dims,
    embeddings: Tensor,
    pad_masks: Tensor,
    att_masks: Tensor,
    expert: list[DecoderLayer],
    heads: Heads,
    noise: Tensor,
    times: Tensor,
    cross_dtype: torch.dtype | None = None,
) -> tuple[PrefixKV, FirstStep]:
    """``fill_prefix``, and of ``denoise`` the first step as far as ``euler_step``. Arguments as theirs.

    Made on the main stream and read on the side: masks and tables, which live as long as the prefix KV, and keys and values
    of the text layers, which the side holds. Behind the join the main stream reads what the side has made.
    """
    tokens, own, cross = ops.rope_masks(pad_masks, att_masks, dims.chunk, dims.head_dim)
    with _beside(side, pad_masks, noise, times):
        suffix = suffix_of(ops, heads, own, cross, times)
        h, normed = embed_suffix(ops, expert[0], noise, 0, suffix.folded, heads.time_out)
    found = text_kv(ops, vlm, cast, dims, embeddings, tokens, free_slots(dims, expert))
    layers: list[LayerKV] = []
    # Where an op fails, close() leaves the generator's with, so that the caller's stream is the current one again.
    with closing(_on_the_side(side, ops, expert, found, layers, cross_dtype)) as kvs:
        h = expert_layers(ops, expert, kvs, h, suffix.own, suffix.cross, normed=normed)
    return PrefixKV(layers, pad_masks, own, cross), FirstStep(suffix, h)


def _on_the_side(
    side: Side,
    ops: Ops,
    expert: Sequence[DecoderLayer],
    found: Iterator[tuple[Tensor, Tensor]],
    layers: list[LayerKV],
    cross_dtype: torch.dtype | None,
) -> Generator[LayerKV, None, None]:
    """What each expert layer attends to, noted in ``layers`` too. Whoever asks for the next one has a text layer run on the
    main stream, and is then on the side with what it has left behind. The last layer has nothing to run beside: it runs on
    the main stream, behind the join."""
    for (k, v), partner in zip(found, expert, strict=True):
        last = len(layers) == len(expert) - 1
        if last:
            kv = layer_kv(ops, partner, k, v, cross_dtype)
            side.join()
            next_launch_in_order()
            layers.append(kv)
            with section("denoise"):
                yield kv
        else:
            # Open across the yield: the caller queues its layer on the side.
            with _beside(side, k, v):
                kv = layer_kv(ops, partner, k, v, cross_dtype)
                layers.append(kv)
                yield kv


@contextmanager
def _beside(side: Side, *read: Tensor) -> Iterator[None]:
    with side.beside(*read), section(BESIDE):
        next_launch_in_order()
        yield
