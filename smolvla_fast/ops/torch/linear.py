"""Linears through oneDNN where it serves, ``F.linear`` elsewhere.

On AMD CPUs ``F.linear`` in fp32 goes to MKL, which runs there below what oneDNN reaches on the same live weight, and
oneDNN applies bias, activation or residual to a tile while it is in cache. Off x86, and there without AVX2, oneDNN was never
measured beside it, so stock's own call serves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..reference import linear as reference

_ATTR = {None: ("none", ""), "gelu_tanh": ("gelu", "tanh"), "silu": ("swish", "")}

Linear = Callable[..., Tensor]
"""x, weight, bias, activation, residual -> y, as ``reference.linear``"""


def onednn_serves(dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused linear is there for CPU tensors of this dtype, and was measured on such a processor."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX") and onednn_has(dtype)


@cache
def onednn_has(dtype: torch.dtype) -> bool:
    """Whether this torch build has oneDNN's fused linear for CPU tensors of this dtype on this CPU."""
    ops = torch.ops.mkldnn
    if not (torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")):
        return False
    if dtype is torch.bfloat16:
        return bool(hasattr(ops, "_is_mkldnn_bf16_supported") and ops._is_mkldnn_bf16_supported())
    return dtype is torch.float32


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``reference.linear``; x is converted to the dtype of the weight, a residual keeps its own."""
    serve = onednn if x.device.type == "cpu" and onednn_serves(weight.dtype) else aten
    return serve(x, weight, bias, activation, residual)


def aten(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same by ``F.linear``: MKL, cuBLAS, whatever this torch has for the device."""
    return reference.linear(x.to(weight.dtype), weight, bias, activation, residual)


def onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same by oneDNN's product with what follows it, CPU tensors."""
    x = x.to(weight.dtype)
    if activation not in _ATTR:
        return reference.linear(x, weight, bias, activation, residual)  # raises, naming what is accepted
    # oneDNN reads these two as if each lay in one piece.
    bias, residual = (None if each is None else each.contiguous() for each in (bias, residual))
    if residual is not None and activation is None and residual.dtype is weight.dtype:
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    attr, algorithm = _ATTR[activation]
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, attr, [], algorithm)
    return y if residual is None else residual + y


def cublaslt(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The same with bias and GELU in the product's own epilogue, one launch. NVIDIA GPUs.

    The call applies cuBLASLt's GELU there, which is the tanh form; on any other device torch gives it the erf form.
    """
    if activation != "gelu_tanh" or bias is None or residual is not None:
        return aten(x, weight, bias, activation, residual)
    rows = x.to(weight.dtype).reshape(x.shape[:-1].numel(), x.shape[-1])
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*x.shape[:-1], len(weight))


def why_no_cublas() -> str | None:
    """Why this torch cannot add a product of 16 bits to fp32 where it lies, or None."""
    has = "dtype_out" in torch.ops.aten.addmm.overloads()
    return (
        None
        if has
        else "this torch's addmm has no dtype of its own for the result; accepted is torch 2.8 and later"
    )


def cublas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    offset: Any = None,
) -> Tensor:
    """The same into an fp32 residual stream: a product of 16 bits whose C and D are the stream, one launch. NVIDIA GPUs.

    offset  ``StreamOffset`` of the stream, which is then written where it lies; the bias is left there. Without it the bias
            is first added to a copy, one launch more.
    """
    fits = residual is not None and residual.dtype is torch.float32 and residual.is_contiguous()
    if activation is not None or residual is None or not fits or x.dtype is not weight.dtype:
        return aten(x, weight, bias, activation, residual)
    y = residual
    if offset is None:
        y = residual.clone() if bias is None else residual + bias
    rows = y.view(-1, len(weight))
    x = x.reshape(len(rows), x.shape[-1])
    torch.ops.aten.addmm.dtype_out(rows, x, weight.t(), torch.float32, out=rows)
    if offset is not None and bias is not None:
        offset.leave(bias)
    return y
