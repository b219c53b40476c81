"""Rotary embedding on a CPU, as a function on tensors; checked here as in ``kernels.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from .operands import KERNELS, check_apart, check_contiguous, check_one


def rope(x: Tensor, sin: Tensor, cos: Tensor, out: Tensor | None = None) -> Tensor:
    """``y = [x1·cos - x2·sin, x2·cos + x1·sin]`` for the halves of every head, written where the cache wants it.

    x         [B, T, H, D]  fp32 | bf16, contiguous, D even
    sin, cos  [B, T, 1, D/2]  or  [1, T, 1, D/2]  fp32, contiguous
    out       [B, T, H, D]  dtype of x, any strides but the last, which is 1; x itself, or overlapping no input
    returns   out, fresh and contiguous where None
    numerics  fp32, one rounding: the reference's bits, at every instruction level and for any number of threads
    errors    as ``kernels.rms_norm``
    replaces  ``apply_rope`` of LeRobot's ``smolvlm_with_expert``, and the copy into the cache behind it
    """
    if x.dtype not in KERNELS:
        raise TypeError(f"rope: x has dtype {x.dtype}; accepted are {', '.join(map(str, KERNELS))}")
    if x.dim() != 4 or x.shape[3] % 2 or not x.shape[3]:
        raise ValueError(
            f"rope: x has shape {list(x.shape)}; accepted is [B, T, H, D], D even and at least 2"
        )
    batch, tokens, heads, head_dim = x.shape
    check_one("rope", "x", x, x.dtype, "x", x.shape)
    check_contiguous("rope", "x", x)
    tables = sin.shape[0] if sin.dim() else 0
    for name, table in (("sin", sin), ("cos", cos)):
        shape = (1 if tables == 1 else batch, tokens, 1, head_dim // 2)
        check_one("rope", name, table, torch.float32, "a table", shape)
        check_contiguous("rope", name, table)
    if out is None:
        out = torch.empty_like(x)
    elif out is not x:
        check_one("rope", "out", out, x.dtype, "x", x.shape)
        if out.stride(3) != 1:
            raise ValueError(f"rope: out has strides {out.stride()}; the last must be 1")
        in_place = out.data_ptr() == x.data_ptr() and out.is_contiguous()
        check_apart("rope", out, [sin, cos, None if in_place else x])
    if x.numel():
        kernel = getattr(extension.load("cpu"), "rope_" + KERNELS[x.dtype])
        addresses = (x.data_ptr(), out.data_ptr(), sin.data_ptr(), cos.data_ptr())
        table_stride = 0 if tables == 1 else sin.stride(0)
        kernel(
            *addresses, (batch, tokens, heads, head_dim), out.stride()[:3], table_stride,
            torch.get_num_threads(),
        )  # fmt: skip
    return out


def rotate(x: Tensor, sin: Tensor, cos: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``reference.rope.apply_rope``; into ``out`` where there is one, be it x itself or of another dtype."""
    sin, cos = sin.contiguous(), cos.contiguous()
    if out is not None and (out.dtype is not x.dtype or out.stride(-1) != 1):
        return out.copy_(rope(x, sin, cos))
    return rope(x, sin, cos, out)
