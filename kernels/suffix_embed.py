"""Noisy actions to suffix tokens: both products and the silu between them in one launch.

A program owns a tile of tokens, of output columns, and a part of the hidden width, in one turn. Its part of the second
weight is in registers before it waits for the actions; it makes its hidden values from these anew, which are only 32 wide,
and feeds them to the second product; the step's bias, which holds the time embedding, is added in between. Parts meet as in
``linear_residual``. Latency bounds it: what is repeated costs less than a launch between the products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check, silu, split_workspace, sum_of_splits
from .dependent_launch import await_inputs, dependent_launch, load_weight, prefetch_weight
from .next_norm import allocate_for_next_norm, store_for_next_norm
from .tuning import fp32_precision, suffix_embed_tile


@triton.jit
def _halves(x):
    """fp32 as a sum of two values of tf32, to 22 bits. Tensor cores leave out the low bits."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(x, w, PRECISION: tl.constexpr):
    """x·w in fp32. "tf32x3": as Triton's own, but for three sums of which none waits for another's products, and for
    rounding in two instructions, which keeps finite values alone."""
    if PRECISION == "tf32x3" and w.dtype == tl.float32:
        x_high, x_low = _halves(x)
        w_high, w_low = _halves(w)
        y = tl.dot(x_low, w_high, input_precision="tf32") + tl.dot(x_high, w_low, input_precision="tf32")
        y += tl.dot(x_high, w_high, input_precision="tf32")
    else:
        y = tl.dot(x, w, input_precision="ieee")
    return y


@triton.jit
def _suffix_embed_fwd(
    x_ptr,
    in_weight_ptr,
    bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    y_ptr,
    next_weight_ptr,
    next_rows_ptr,
    next_squares_ptr,
    partials_ptr,
    arrivals_ptr,
    rows,
    tokens,
    actions,
    width,
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_NEXT: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ACTIONS: tl.constexpr,
):
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = tile % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col_tile = tile // row_tiles
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    unit = split * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    action = tl.arange(0, BLOCK_ACTIONS)
    in_rows, in_cols, in_units, in_actions = row < rows, col < width, unit < width, action < actions
    own_unit = tl.minimum(unit, width - 1)[None, :]
    out_weight = load_weight(
        out_weight_ptr + col[None, :] * width + unit[:, None], in_units[:, None] & in_cols[None, :]
    )
    # Both may be outputs of a launch not far ahead, so that they are loaded behind the wait alone.
    prefetch_weight(in_weight_ptr + own_unit * actions, 0, actions, tile == 0, DEPENDENT)
    prefetch_weight(bias_ptr + own_unit, 0, 1, tile == 0, DEPENDENT)
    prefetch_weight(out_bias_ptr + tl.minimum(col, width - 1)[None, :], 0, 1, split == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    x = tl.load(
        x_ptr + row[:, None] * actions + action[None, :],
        mask=in_rows[:, None] & in_actions[None, :],
        other=0.0,
    ).to(tl.float32)
    in_weight = tl.load(
        in_weight_ptr + unit[None, :] * actions + action[:, None],
        mask=in_units[None, :] & in_actions[:, None],
        other=0.0,
    ).to(tl.float32)
    bias = tl.load(
        bias_ptr + (row // tokens * width)[:, None] + unit[None, :],
        mask=in_rows[:, None] & in_units[None, :],
        other=0.0,
    ).to(tl.float32)
    hidden = silu(_product(x, in_weight, PRECISION) + bias, ROUNDED=False)
    y = _product(hidden.to(out_weight.dtype), out_weight, PRECISION)
    y, last = sum_of_splits(y, partials_ptr, arrivals_ptr, tile, split, SPLIT_K, BLOCK_ROWS, BLOCK_COLS)
    if last:
        y += tl.load(out_bias_ptr + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
        mask = in_rows[:, None] & in_cols[None, :]
        tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=mask)
        if HAS_NEXT:
            store_for_next_norm(
                y,
                row.to(tl.int64),
                col,
                mask,
                col_tile,
                rows,
                width,
                next_weight_ptr,
                next_rows_ptr,
                next_squares_ptr,
            )


def suffix_embed(
    x: Tensor,
    step: int,
    folded: Any,
    time_out: tuple[Tensor, Tensor],
    *,
    memory: Any = None,
    next_norm: Any = None,
) -> Tensor:
    """``y = silu(x·Wfᵀ + bias[step])·Woᵀ + bo``, with ``Wf = Wa·Wi`` and the time inside the bias.

    x        [B, S, A]  fp32 | bf16 | fp16; contiguous, or it is copied first
    step     0 .. N-1
    folded   .weight [E, A] and .bias [N, B, 1, E], both fp32: what does not depend on the actions
    time_out (weight [E, E], bias [E]), contiguous      memory  not used
    next_norm  as in ``linear_residual``
    returns  [B, S, E]  fp32
    numerics first product, silu and sums in fp32; the hidden values rounded to the dtype of that weight; products
             of fp32 operands as ``tuning.fp32_precision`` says
    errors   ValueError for other shapes, strides or dtypes
    replaces ``embed_suffix`` of LeRobot's ``VLAFlowMatching``
    """
    if x.ndim != 3:
        raise ValueError(f"suffix_embed: x has shape {list(x.shape)}; accepted is [B, S, A]")
    out_weight, out_bias = time_out
    x = x.contiguous()  # itself, but for a caller's first noise
    batch, tokens, actions = x.shape
    steps, width = folded.bias.shape[0], out_bias.shape[0]
    if not 0 <= step < steps:
        raise ValueError(
            f"suffix_embed: step is {step}; accepted are 0 to {steps - 1}, the steps that were folded"
        )
    shapes = {
        "x": (x, (batch, tokens, actions)),
        "folded.weight": (folded.weight, (width, actions)),
        "folded.bias": (folded.bias, (steps, batch, 1, width)),
        "time_out.weight": (out_weight, (width, width)),
        "time_out.bias": (out_bias, (width,)),
    }
    for name, (tensor, shape) in shapes.items():
        check("suffix_embed", name, tensor, shape, like=x)
        if not tensor.is_contiguous():
            raise ValueError(f"suffix_embed: {name} must be contiguous; call .contiguous() on it")
    y = torch.empty(batch, tokens, width, dtype=torch.float32, device=x.device)
    if not y.numel():
        return y
    cc = capability(x.device)
    rows = batch * tokens
    tile = suffix_embed_tile(rows, width, actions, cc)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.cols)
    split, block_actions = triton.cdiv(width, tile.inner), max(16, triton.next_power_of_2(actions))
    partials = arrivals = y
    if split > 1:
        partials, arrivals = split_workspace(tiles, split, tile.rows * tile.cols, x.device)
    flags, next_pointers = allocate_for_next_norm(next_norm, y, tile.cols)
    _suffix_embed_fwd[(tiles, split)](
        x,
        folded.weight,
        folded.bias[step],
        out_weight,
        out_bias,
        y,
        *next_pointers,
        partials,
        arrivals,
        rows,
        tokens,
        actions,
        width,
        PRECISION=fp32_precision(cc),
        SPLIT_K=split,
        **{**flags, "enable_fp_fusion": False},  # the same bits whether there is a hint or not
        **dependent_launch(cc),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLS=tile.cols,
        BLOCK_HIDDEN=tile.inner,
        BLOCK_ACTIONS=block_actions,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        # Enough beside 24 weights a thread. Without it the compiler takes a few more, and a multiprocessor holds three
        # programs of 8 warps, not four.
        maxnreg=64 if tile.inner * (tile.cols + block_actions) <= 24 * 32 * tile.num_warps else None,
    )
    return y
