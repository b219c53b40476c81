"""The end of a denoise step: final RMSNorm, velocity, guidance and Euler, one program a token and a few actions.

The row's statistic is taken by every program that shares the row; that is 3 KB read from cache again, and lets 50
tokens of 32 actions spread over 200 programs where tiles for tensor cores would fill 4. The output projection is a sum
of fp32 products in registers, so it rounds as fp32 does on every device. Guidance reads its weight from memory: a
captured graph serves every chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capability, check
from .dependent_launch import await_inputs, dependent_launch, prefetch_weight
from .tuning import euler_step_tile


@triton.jit
def _euler_step_fwd(
    h_ptr,
    norm_weight_ptr,
    out_weight_ptr,
    out_bias_ptr,
    x_ptr,
    previous_ptr,
    weights_ptr,
    strength_ptr,
    new_x_ptr,
    v_ptr,
    tokens,
    width,
    actions,
    previous_batch_stride,
    previous_token_stride,
    previous_action_stride,
    weights_stride,
    eps,
    dt,
    time,
    GUIDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_ACTIONS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    row = tl.program_id(0)
    action = tl.program_id(1) * BLOCK_ACTIONS + tl.arange(0, BLOCK_ACTIONS)
    in_actions = action < actions
    h_row = h_ptr + row.to(tl.int64) * width
    out_rows = out_weight_ptr + tl.minimum(action, actions - 1)[None, :] * width
    prefetch_weight(out_rows, 0, width, row == 0, DEPENDENT)
    await_inputs(DEPENDENT)

    squares = tl.zeros([BLOCK_COLS], tl.float32)
    for start in range(0, width, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        h = tl.load(h_row + col, mask=col < width, other=0.0).to(tl.float32)
        squares += h * h
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / width + eps)

    products = tl.zeros([BLOCK_ACTIONS, BLOCK_COLS], tl.float32)
    for start in range(0, width, BLOCK_COLS):
        col = start + tl.arange(0, BLOCK_COLS)
        in_cols = col < width
        h = tl.load(h_row + col, mask=in_cols, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + col, mask=in_cols, other=0.0).to(tl.float32)
        out_weight = tl.load(
            out_weight_ptr + action[:, None] * width + col[None, :],
            mask=in_actions[:, None] & in_cols[None, :],
            other=0.0,
        ).to(tl.float32)
        products += (h * scale * norm_weight)[None, :] * out_weight
    v = tl.sum(products, axis=1)
    v += tl.load(out_bias_ptr + action, mask=in_actions, other=0.0).to(tl.float32)

    place = row * actions + action
    x = tl.load(x_ptr + place, mask=in_actions, other=0.0)
    if GUIDED:
        batch, token = row // tokens, row % tokens
        previous_row = previous_ptr + batch * previous_batch_stride + token * previous_token_stride
        previous = tl.load(previous_row + action * previous_action_stride, mask=in_actions, other=0.0)
        error = (previous - (x - time * v)) * tl.load(weights_ptr + token * weights_stride)
        v = v - tl.load(strength_ptr) * error
    tl.store(v_ptr + place, v, mask=in_actions)
    tl.store(new_x_ptr + place, x + dt * v, mask=in_actions)


def euler_step(
    h: Tensor,
    norm: tuple[Tensor, float],
    action_out: tuple[Tensor, Tensor],
    x: Tensor,
    dt: float,
    guidance: Any = None,
    *,
    memory: Any = None,
) -> tuple[Tensor, Tensor]:
    """``v = rms_norm(h)·Woutᵀ + b;  v ← v - g·((previous - (x - t·v))·w) if guided;  x' = x + dt·v``.

    h         [B, S, E]  fp32 | bf16 | fp16, contiguous      memory  not used
    norm      (weight [E], eps)      action_out  (weight [A, E], bias [A])
    x         [B, S, A]  fp32, left as it is; contiguous, or it is copied first      dt  -1/N
    guidance  None, or .previous [B or 1, S, A] fp32 of any strides, .weights [1, S, 1] fp32, .time a number,
              .weight 0-dim fp32: read from device memory, copied there first where it lies on the host
    returns   x' and v, both [B, S, A] fp32, fresh
    numerics  all in fp32, whatever the weights are stored in
    errors    ValueError for other shapes, strides or dtypes
    replaces  the expert's final norm, ``action_out_proj``, the elementwise part of ``RTCProcessor.denoise_step`` and
              the body of ``euler_integrate``
    """
    if h.ndim != 3 or x.ndim != 3:
        raise ValueError(
            f"euler_step: h and x have shapes {list(h.shape)} and {list(x.shape)}; "
            "accepted are [B, S, E] and [B, S, A]"
        )
    (norm_weight, eps), (out_weight, out_bias) = norm, action_out
    x = x.contiguous()  # itself, but for a caller's first noise
    batch, tokens, width = h.shape
    actions = x.shape[2]
    shapes = {
        "h": (h, (batch, tokens, width)),
        "norm.weight": (norm_weight, (width,)),
        "action_out.weight": (out_weight, (actions, width)),
        "action_out.bias": (out_bias, (actions,)),
        "x": (x, (batch, tokens, actions)),
    }
    for name, (tensor, shape) in shapes.items():
        check("euler_step", name, tensor, shape, like=h)
        if not tensor.is_contiguous():
            raise ValueError(f"euler_step: {name} must be contiguous; call .contiguous() on it")
    if x.dtype is not torch.float32:
        raise ValueError(
            f"euler_step: x is {x.dtype}; accepted is torch.float32, in which actions are integrated"
        )
    previous = weights = strength = x  # never read unless guided
    time = 0.0
    if guidance is not None:
        previous, weights, strength = guidance.previous, guidance.weights, guidance.weight.to(h.device)
        time = float(guidance.time)
        shapes = {
            "guidance.previous": (previous, tuple(x.shape)),
            "guidance.weights": (weights, (1, tokens, 1)),
            "guidance.weight": (strength, ()),
        }
        if previous.ndim == 3 and previous.shape[0] == 1:
            shapes["guidance.previous"] = (previous := previous.expand(batch, -1, -1), tuple(x.shape))
        for name, (tensor, shape) in shapes.items():
            if tensor.dtype is not torch.float32 or tensor.shape != shape or tensor.device != h.device:
                raise ValueError(
                    f"euler_step: {name} is {tensor.dtype}, {list(tensor.shape)}, on {tensor.device}; "
                    f"accepted is torch.float32, {list(shape)}, on {h.device}"
                )
    new_x, v = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return new_x, v
    tile = euler_step_tile(width, actions)
    _euler_step_fwd[(batch * tokens, triton.cdiv(actions, tile.rows))](
        h,
        norm_weight,
        out_weight,
        out_bias,
        x,
        previous,
        weights,
        strength,
        new_x,
        v,
        tokens,
        width,
        actions,
        *previous.stride(),
        weights.stride(1),
        eps,
        dt,
        time,
        GUIDED=guidance is not None,
        **dependent_launch(capability(h.device)),
        BLOCK_ACTIONS=tile.rows,
        BLOCK_COLS=tile.cols,
        num_warps=tile.num_warps,
    )
    return new_x, v
