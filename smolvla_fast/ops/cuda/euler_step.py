"""The end of a denoise step; csrc/cuda/euler_step.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library

_FP32 = (torch.float32,)
# What CUDA accepts as the second extent of a grid, eight actions each.
_MAX_ACTIONS = 65535 * 8


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
    norm      (weight [E], eps)      action_out  (weight [A, E], bias [A])      each fp32 | bf16 | fp16, contiguous
    x         [B, S, A]  fp32, left as it is; contiguous, or it is copied first      dt  -1/N
    guidance  None, or .previous [B or 1, S, A] fp32 of any strides, .weights [1, S, 1] fp32, .time a number,
              .weight 0-dim fp32: read from device memory, copied there first where it lies on the host
    returns   x' and v, both [B, S, A] fp32, fresh
    numerics  all in fp32, whatever the weights are stored in; equal bits whatever the alignment
    errors    ValueError for other shapes, strides, dtypes or devices; RuntimeError for a device that is no NVIDIA GPU,
              or with CUDA's own words
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
    library.check("euler_step", "h", h, (batch, tokens, width))
    library.check("euler_step", "norm.weight", norm_weight, (width,), like=h)
    library.check("euler_step", "action_out.weight", out_weight, (actions, width), like=h)
    library.check("euler_step", "action_out.bias", out_bias, (actions,), like=h)
    library.check("euler_step", "x", x, (batch, tokens, actions), _FP32, like=h)
    if not width or actions > _MAX_ACTIONS:
        raise ValueError(
            f"euler_step: width {width}, {actions} actions; accepted are at least 1, at most {_MAX_ACTIONS}"
        )
    time, previous, weights, strength = 0.0, None, None, None
    strides = (0, 0, 0, 0)
    if guidance is not None:
        previous, weights, strength = guidance.previous, guidance.weights, guidance.weight.to(h.device)
        if previous.ndim == 3 and previous.shape[0] == 1:
            previous = previous.expand(batch, -1, -1)
        shape = (batch, tokens, actions)
        library.check("euler_step", "guidance.previous", previous, shape, _FP32, like=h, contiguous=False)
        library.check(
            "euler_step", "guidance.weights", weights, (1, tokens, 1), _FP32, like=h, contiguous=False
        )
        library.check("euler_step", "guidance.weight", strength, (), _FP32, like=h)
        time, strides = float(guidance.time), (*previous.stride(), weights.stride(1))
    kernels = library.library(h.device)
    new_x, v = torch.empty_like(x), torch.empty_like(x)
    if not x.numel():
        return new_x, v
    inputs = (h, norm_weight, out_weight, out_bias)
    # A launch goes to the device that is current.
    with torch.cuda.device_of(h):
        kernels.euler_step(
            inputs=[library.address(tensor) for tensor in inputs],
            dtypes=[library.DTYPES.index(tensor.dtype) for tensor in inputs],
            x=library.address(x),
            guidance=[library.address(tensor) for tensor in (previous, weights, strength)],
            strides=strides,
            new_x=library.address(new_x),
            v=library.address(v),
            sizes=(batch * tokens, tokens, width, actions),
            eps=eps,
            dt=dt,
            time=time,
            stream=library.stream(h.device),
        )
    return new_x, v
