"""Noisy actions to suffix tokens: both products and the silu between them in one launch.

A program owns a tile of tokens and of output columns. Block by block of the hidden width it makes the hidden values
anew from the actions, which are only 32 wide, and feeds them to the second product straight from registers; the step's
bias, which holds the time embedding, is added in between. What a program computes twice over its neighbours costs less
than a launch and a trip to memory; what it reads, mostly the second weight, bounds the time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check, silu
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .tuning import fp32_precision, suffix_embed_tile


@triton.jit
def _suffix_embed_fwd(
    x_ptr,
    in_weight_ptr,
    bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    y_ptr,
    rows,
    tokens,
    actions,
    width,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    BLOCK_ACTIONS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    action = tl.arange(0, BLOCK_ACTIONS)
    in_rows, in_cols, in_actions = row < rows, col < width, action < actions
    out_rows = out_weight_ptr + tl.minimum(col, width - 1)[None, :] * width
    prefetch_weight(out_rows, 0, width, tl.program_id(0) == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    x = tl.load(
        x_ptr + row[:, None] * actions + action[None, :],
        mask=in_rows[:, None] & in_actions[None, :],
        other=0.0,
    ).to(tl.float32)
    bias_row = bias_ptr + (row // tokens * width)[:, None]

    y = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for start in range(0, width, BLOCK_HIDDEN):
        unit = start + tl.arange(0, BLOCK_HIDDEN)
        in_units = unit < width
        in_weight = tl.load(
            in_weight_ptr + unit[:, None] * actions + action[None, :],
            mask=in_units[:, None] & in_actions[None, :],
            other=0.0,
        ).to(tl.float32)
        bias = tl.load(bias_row + unit[None, :], mask=in_rows[:, None] & in_units[None, :], other=0.0)
        hidden = silu(
            tl.dot(x, tl.trans(in_weight), bias.to(tl.float32), input_precision=PRECISION), ROUNDED=False
        )
        out_weight = tl.load(
            out_weight_ptr + col[:, None] * width + unit[None, :],
            mask=in_cols[:, None] & in_units[None, :],
            other=0.0,
        )
        y = tl.dot(hidden.to(out_weight.dtype), tl.trans(out_weight), y, input_precision=PRECISION)

    y += tl.load(out_bias_ptr + col, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + row[:, None] * width + col[None, :], y, mask=in_rows[:, None] & in_cols[None, :])


def suffix_embed(
    x: Tensor, step: int, folded: Any, time_out: tuple[Tensor, Tensor], *, memory: Any = None
) -> Tensor:
    """``y = silu(x·Wfᵀ + bias[step])·Woᵀ + bo``, with ``Wf = Wa·Wi`` and the time inside the bias.

    x        [B, S, A]  fp32 | bf16 | fp16; contiguous, or it is copied first
    step     0 .. N-1
    folded   .weight [E, A] and .bias [N, B, 1, E], both fp32: what does not depend on the actions
    time_out (weight [E, E], bias [E]), contiguous      memory  not used
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
    _suffix_embed_fwd[(triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.cols))](
        x,
        folded.weight,
        folded.bias[step],
        out_weight,
        out_bias,
        y,
        rows,
        tokens,
        actions,
        width,
        PRECISION=fp32_precision(cc),
        **dependent_launch(cc),
        BLOCK_ROWS=tile.rows,
        BLOCK_COLS=tile.cols,
        BLOCK_HIDDEN=tile.inner,
        BLOCK_ACTIONS=max(16, triton.next_power_of_2(actions)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y
