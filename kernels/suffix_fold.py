"""What of the suffix embedding depends on weights and steps alone, once a chunk in one launch.

Between the action projection and the first MLP layer there is no nonlinearity, so their products fold: of that layer's
weight [E, 2E] the left half meets the action projection and its bias, the right half the time. A program owns some
outputs and either some actions or some times, so all read disjoint columns of what they multiply with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .tuning import fp32_precision, suffix_fold_tile


@triton.jit
def _suffix_fold_fwd(
    times_ptr,
    in_weight_ptr,
    in_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_weight_ptr,
    out_bias_ptr,
    times,
    actions,
    width,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < width
    action_tiles = tl.cdiv(actions, BLOCK_COLS)
    of_times = tl.program_id(1) >= action_tiles
    col = (tl.program_id(1) - tl.where(of_times, action_tiles, 0)) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    weight_rows = weight_ptr + row[:, None] * (2 * width)
    whole_rows = weight_ptr + tl.minimum(row, width - 1)[None, :] * (2 * width)
    prefetch_weight(whole_rows, 0, 2 * width, tl.program_id(1) == 0, DEPENDENT)
    await_inputs(DEPENDENT)
    y = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    if of_times:
        in_cols = col < times
        products = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
        for start in range(0, width, BLOCK_WIDTH):
            k = start + tl.arange(0, BLOCK_WIDTH)
            inside = in_rows[:, None] & (k < width)[None, :]
            left = tl.load(weight_rows + k[None, :], mask=inside, other=0.0).to(tl.float32)
            right = tl.load(weight_rows + width + k[None, :], mask=inside, other=0.0).to(tl.float32)
            in_bias = tl.load(in_bias_ptr + k, mask=k < width, other=0.0).to(tl.float32)
            time = tl.load(
                times_ptr + col[:, None] * width + k[None, :],
                mask=in_cols[:, None] & (k < width)[None, :],
                other=0.0,
            ).to(tl.float32)
            products += left * in_bias[None, :]
            y = tl.dot(right, tl.trans(time), y, input_precision=PRECISION)
        constant = tl.sum(products, axis=1) + tl.load(bias_ptr + row, mask=in_rows, other=0.0).to(tl.float32)
        out = out_bias_ptr + col[None, :] * width + row[:, None]
        tl.store(out, y + constant[:, None], mask=in_rows[:, None] & in_cols[None, :])
    else:
        in_cols = col < actions
        for start in range(0, width, BLOCK_WIDTH):
            k = start + tl.arange(0, BLOCK_WIDTH)
            left = tl.load(
                weight_rows + k[None, :], mask=in_rows[:, None] & (k < width)[None, :], other=0.0
            ).to(tl.float32)
            in_weight = tl.load(
                in_weight_ptr + k[:, None] * actions + col[None, :],
                mask=(k < width)[:, None] & in_cols[None, :],
                other=0.0,
            ).to(tl.float32)
            y = tl.dot(left, in_weight, y, input_precision=PRECISION)
        out = out_weight_ptr + row[:, None] * actions + col[None, :]
        tl.store(out, y, mask=in_rows[:, None] & in_cols[None, :])


def suffix_fold(
    times: Tensor, action_in: tuple[Tensor, Tensor], time_in: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """``Wf = Wa·Wi`` and ``bias[n] = Wa·bi + Wt·time[n] + ba``, with ``[Wa | Wt]`` the weight of ``time_in``.

    times     [N, B, E]  fp64 | fp32 | bf16 | fp16, read as fp32      action_in  (weight [E, A], bias [E])
    time_in   (weight [E, 2E], bias [E]); weights fp32 | bf16 | fp16; all contiguous
    returns   weight [E, A], bias [N, B, 1, E], fp32
    numerics  sums in fp32, products as ``tuning.fp32_precision`` says
    errors    ValueError for other shapes, strides or dtypes
    replaces  half of ``embed_suffix`` of LeRobot's ``VLAFlowMatching``
    """
    op = "suffix_fold"
    (in_weight, in_bias), (weight, bias) = action_in, time_in
    width, actions = in_weight.shape
    shapes = {
        "action_in.weight": (in_weight, (width, actions)),
        "action_in.bias": (in_bias, (width,)),
        "time_in.weight": (weight, (width, 2 * width)),
        "time_in.bias": (bias, (width,)),
    }
    for name, (tensor, shape) in shapes.items():
        check(op, name, tensor, shape, like=times)
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous; call .contiguous() on it")
    if (
        times.ndim != 3
        or times.shape[2] != width
        or not times.is_floating_point()
        or not times.is_contiguous()
    ):
        raise ValueError(
            f"{op}: times is {times.dtype}, {list(times.shape)}; accepted are floats, [N, B, {width}], contiguous"
        )
    steps, batch, device = times.shape[0], times.shape[1], times.device
    folded = torch.empty(width, actions, dtype=torch.float32, device=device)
    folded_bias = torch.empty(steps, batch, 1, width, dtype=torch.float32, device=device)
    if width:
        cc = capability(device)
        tile = suffix_fold_tile(width, actions, steps * batch, cc)
        col_tiles = triton.cdiv(actions, tile.cols) + triton.cdiv(steps * batch, tile.cols)
        _suffix_fold_fwd[(triton.cdiv(width, tile.rows), col_tiles)](
            times,
            in_weight,
            in_bias,
            weight,
            bias,
            folded,
            folded_bias,
            steps * batch,
            actions,
            width,
            PRECISION=fp32_precision(cc),
            **dependent_launch(cc),
            BLOCK_ROWS=tile.rows,
            BLOCK_COLS=tile.cols,
            BLOCK_WIDTH=tile.inner,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return folded, folded_bias
