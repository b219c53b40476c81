"""The compiled CPU kernels as functions on tensors: all checks are made here, the extension gets addresses.

Same names and signatures as the references, plus ``out``, the buffers to write into. Forward passes only.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..memory import Memory, empty
from .operands import KERNELS, check, check_apart, check_contiguous, check_one

_X86 = ("baseline", "avx2", "avx512", "avx512_bf16")
_ARM = ("baseline", "neon", "neon_dotprod", "neon_i8mm", "neon_bf16")
LEVELS = _ARM if platform.machine().lower() in ("aarch64", "arm64") else _X86
"""All instruction levels that the kernels are compiled for, each with what the one before it has."""

_LAYER_NORMS = ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """``y = weight · x / sqrt(mean(x²) + eps)`` on CPU tensors.

    x         [..., M]  fp32 | bf16, contiguous      weight  [M], same dtype
    out       where to write, overlapping no input; allocated where it is None
    returns   [..., M]  dtype of x
    numerics  sums and products in fp32, one rounding; equal bits at every instruction level
    errors    TypeError, ValueError naming the tensor; RuntimeError where a gradient is wanted;
              extension.ExtensionUnavailable where nothing was compiled
    replaces  ``input_layernorm`` / ``post_attention_layernorm`` of a layer
    """
    if x.dtype not in KERNELS:
        raise TypeError(f"rms_norm: x has dtype {x.dtype}; accepted are {', '.join(map(str, KERNELS))}")
    if not x.shape:
        raise ValueError("rms_norm: x has no dimensions; accepted is [..., M]")
    check("rms_norm", x.dtype, {"x": (x, x.shape), "weight": (weight, x.shape[-1:])})
    if out is None:
        out = torch.empty_like(x)
    else:
        check("rms_norm", x.dtype, {"out": (out, x.shape)})
        check_apart("rms_norm", out, [x, weight])
    if x.numel():
        kernel = getattr(extension.load("cpu"), "rms_norm_" + KERNELS[x.dtype])
        addresses = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
        kernel(*addresses, x.numel() // x.shape[-1], x.shape[-1], eps, torch.get_num_threads())
    return out


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias`` on CPU tensors.

    x             [..., W]  fp32 | bf16, contiguous      weight, bias  [W]  fp32 | bf16
    out_dtype     fp32 or bf16 for fp32 x; bf16 for bf16 x; the dtype of x where None
    out           where to write, overlapping no input; allocated where it is None
    returns       [..., W]  out_dtype
    numerics      all in fp32, one rounding; equal bits at every instruction level
    errors        as ``rms_norm``
    replaces      ``layer_norm1`` / ``layer_norm2`` / ``post_layernorm`` of SigLIP
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if (x.dtype, out_dtype) not in _LAYER_NORMS:
        accepted = ", ".join(f"{a} -> {b}" for a, b in _LAYER_NORMS)
        raise TypeError(f"layer_norm: x has dtype {x.dtype}, the result {out_dtype}; accepted are {accepted}")
    if not x.shape:
        raise ValueError("layer_norm: x has no dimensions; accepted is [..., W]")
    check("layer_norm", x.dtype, {"x": (x, x.shape)})
    for name, tensor in (("weight", weight), ("bias", bias)):
        dtype = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
        check_one("layer_norm", name, tensor, dtype, "a norm", x.shape[-1:])
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    if out is None:
        out = torch.empty_like(x, dtype=out_dtype)
    else:
        check("layer_norm", out_dtype, {"out": (out, x.shape)})
        check_apart("layer_norm", out, [x, weight, bias])
    if x.numel():
        kernel = getattr(extension.load("cpu"), f"layer_norm_{KERNELS[x.dtype]}_{KERNELS[out_dtype]}")
        addresses = (x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr())
        kernel(*addresses, x.numel() // x.shape[-1], x.shape[-1], eps, torch.get_num_threads())
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v``, each KV head serving ``H / K`` query heads in turn.

    q         [B, T, H, D]      k, v  [B, S, K, D]      fp32 | bf16, any strides but the last, which is 1
    mask      None, or [B, T, S] bool of any strides; a row with no True looks at every key alike
    out       where to write, contiguous, overlapping no input
    returns   [B, T, H, D]  dtype of q
    numerics  scores, softmax, sums in fp32. With bf16, the levels "avx512_bf16" and "neon_bf16" round probabilities
              to bf16 and take subnormals for zero; other levels widen. Bits independent of the number of threads
    errors    as ``rms_norm``
    replaces  ``F.scaled_dot_product_attention`` of the vision tower, ``eager_attention_forward`` elsewhere
    """
    if q.dtype not in KERNELS:
        raise TypeError(f"attention: q has dtype {q.dtype}; accepted are {', '.join(map(str, KERNELS))}")
    out, operands = attention_operands("attention", q, k, v, mask, out)
    if q.numel():
        kernel = getattr(extension.load("cpu"), "attention_" + KERNELS[q.dtype])
        kernel(*operands, torch.get_num_threads())
    return out


def attention_operands(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor | None,
    *,
    writes: bool = True,
) -> tuple[Any, tuple[Any, ...]]:
    """Checked: where the result goes, and what the extension is told of all five, up to the number of threads.

    writes  else there is no result, and the extension is told of none
    """
    dtype = q.dtype
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, k {list(k.shape)}; accepted are [B, T, H, D], [B, S, K, D]"
        )
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if not keys or not head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"{op}: q has shape {list(q.shape)}, k {list(k.shape)}; S and D must be at least 1, H a multiple of K"
        )
    for name, tensor, shape in (
        ("q", q, q.shape),
        ("k", k, (batch, keys, kv_heads, head_dim)),
        ("v", v, k.shape),
    ):
        check_one(op, name, tensor, dtype, "q", shape)
        if tensor.stride(3) != 1:
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; the last must be 1")
    strides = q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    mask_address = 0
    if mask is None:
        strides += (0, 0, 0)
    else:
        check_one(op, "mask", mask, torch.bool, "a mask", (batch, queries, keys))
        strides, mask_address = strides + mask.stride(), mask.data_ptr()
    if out is not None:
        check(op, dtype, {"out": (out, q.shape)})
        check_apart(op, out, [q, k, v, mask])
    elif writes:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), mask_address, 0 if out is None else out.data_ptr())
    return out, (*addresses, (batch, queries, keys, heads, kv_heads, head_dim), strides, head_dim**-0.5)


ACTIVATIONS = {None: 0, "silu": 1, "gelu_tanh": 2}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """``y = residual + act(h·weightᵀ + bias)``, for the rows of an action chunk, of a prefix and of images.

    x          [..., I]  dtype of weight, or fp32 with a bf16 weight: a residual stream, rounded on the way in
    weight     [O, I]  fp32 | bf16, as ``nn.Linear`` holds it, read where it lies      bias  [O], same dtype
    norm       (weight [I] fp32 | bf16, eps): ``h = rms_norm(x)``, rounded once to the dtype of weight;
               else ``h = x``
    activation None | "silu" | "gelu_tanh"
    residual   [..., O]  dtype of y, added in fp32
    out_dtype  fp32, or the dtype of weight; where None, that of residual, else that of weight
    out        where to write; may be ``residual`` itself, else overlapping no input
    memory     for a norm weight in fp32, where it is stored in another way; see ``ops.memory``
    returns    [..., O]  out_dtype
    numerics   sums and epilogue in fp32, one rounding; bits do not depend on the number of threads, nor on that of rows
               except in fp32 at the levels baseline and avx2, where fewer than 48, and up to four at the end of 48 to 64,
               are summed in another order
    errors     as ``rms_norm``; ValueError for another activation
    replaces   q/k/v, ``o_proj``, ``down_proj`` of an expert layer, with the norm before or the addition after
    """
    return _linear("linear", x, weight, None, bias, activation, residual, out_dtype, norm, out, memory)


def swiglu(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """``y = silu(h·gate_weightᵀ) · (h·up_weightᵀ)`` (arXiv 2002.05202); the rest as in ``linear``.

    x  [..., I]      gate_weight, up_weight  [O, I]      returns  [..., O]  out_dtype
    replaces  ``post_attention_layernorm`` and ``mlp`` up to its ``down_proj``
    """
    return _linear("swiglu", x, gate_weight, up_weight, None, "silu", None, out_dtype, norm, out, memory)


def _linear(
    op: str,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
    norm: tuple[Tensor, float] | None,
    out: Tensor | None,
    memory: Memory | None,
) -> Tensor:
    dtype = weight.dtype
    if dtype not in KERNELS:
        raise TypeError(f"{op}: weight has dtype {dtype}; accepted are {', '.join(map(str, KERNELS))}")
    if weight.dim() != 2 or not weight.shape[1]:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}; accepted is [O, I], I at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; accepted are None, 'silu', 'gelu_tanh'")
    outputs, inputs = weight.shape
    if out_dtype is None:
        out_dtype = residual.dtype if residual is not None else out.dtype if out is not None else dtype
    if out_dtype not in (dtype, torch.float32):
        raise TypeError(
            f"{op}: weight has dtype {dtype}; the result can be that or torch.float32, not {out_dtype}"
        )
    norm_weight, eps = (None, 0.0) if norm is None else norm
    shape = (*x.shape[:-1], outputs)
    x_dtype = torch.float32 if x.dtype == torch.float32 else dtype
    check_one(op, "x", x, x_dtype, "weight", (*x.shape[:-1], inputs))
    check_contiguous(op, "x", x)
    for name, tensor, wanted in (
        ("weight", weight, (outputs, inputs)),
        ("up_weight", up_weight, (outputs, inputs)),
        ("bias", bias, (outputs,)),
    ):
        if tensor is not None:
            check_one(op, name, tensor, dtype, "weight", wanted)
            check_contiguous(op, name, tensor)
    if norm_weight is not None:
        norm_dtype = torch.bfloat16 if norm_weight.dtype == torch.bfloat16 else torch.float32
        check_one(op, "norm weight", norm_weight, norm_dtype, "a norm", (inputs,))
        if norm_dtype is not torch.float32 or not norm_weight.is_contiguous():
            norm_weight = empty(memory, "norm weight", norm_weight.shape, torch.float32).copy_(norm_weight)
    if residual is not None:
        check_one(op, "residual", residual, out_dtype, "the result", shape)
        check_contiguous(op, "residual", residual)
    if out is None:
        out = x.new_empty(shape, dtype=out_dtype)
    else:
        check_one(op, "out", out, out_dtype, "the result", shape)
        check_contiguous(op, "out", out)
        in_place = residual is not None and out.data_ptr() == residual.data_ptr()
        check_apart(op, out, [x, weight, up_weight, bias, norm_weight, None if in_place else residual])
    if out.numel():
        dtypes = (KERNELS[x_dtype], KERNELS[dtype], KERNELS[out_dtype])
        kernel = getattr(extension.load("cpu"), "linear_" + "_".join(dtypes))
        kernel(
            x.data_ptr(),
            0 if norm_weight is None else norm_weight.data_ptr(),
            weight.data_ptr(),
            0 if up_weight is None else up_weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            out.data_ptr(),
            out.numel() // outputs,
            inputs,
            outputs,
            ACTIVATIONS[activation],
            eps,
            torch.get_num_threads(),
        )
    return out
