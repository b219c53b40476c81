"""The compiled CPU kernels as functions on tensors: all checks are made here, the extension gets addresses.

Same names and signatures as the references, plus ``out``, the buffers to write into. Forward passes only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import extension

# dtype -> how the kernels for it end
_KERNELS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + residual;  y = weight · r / sqrt(mean(r²) + eps)`` on CPU tensors.

    x, residual  [..., M]  fp32 | bf16, contiguous; without a residual r is x itself
    weight       [M], same dtype
    out          (y, r) to write into, overlapping no input; allocated where it is None; r is left alone where
                 there is no residual
    returns      y, r  [..., M], dtype of x
    numerics     sums and products in fp32, y from the unrounded sum, one rounding each; equal bits at every
                 instruction level
    errors       TypeError, ValueError naming the tensor; RuntimeError where a gradient is wanted;
                 extension.ExtensionUnavailable where nothing was compiled
    replaces     the residual add and ``input_layernorm`` / ``post_attention_layernorm`` of a layer
    """
    dtype, shape = x.dtype, x.shape
    if dtype not in _KERNELS:
        raise TypeError(f"add_rms_norm: x has dtype {dtype}; accepted are {', '.join(map(str, _KERNELS))}")
    if not shape:
        raise ValueError("add_rms_norm: x has no dimensions; accepted is [..., M]")
    _check(
        "add_rms_norm",
        dtype,
        {"x": (x, shape), "residual": (residual, shape), "weight": (weight, shape[-1:])},
    )
    if out is None:
        y = torch.empty_like(x)
        r = x if residual is None else torch.empty_like(x)
    else:
        y, r = out[0], x if residual is None else out[1]
        _check("add_rms_norm", dtype, {"out[0]": (y, shape), "out[1]": (r, shape)})
        _check_apart("add_rms_norm", [y] if r is x else [y, r], [x, residual, weight])
    if x.numel():
        kernel = getattr(extension.load("cpu"), "add_rms_norm_" + _KERNELS[dtype])
        residual_address = 0 if residual is None else residual.data_ptr()
        addresses = (x.data_ptr(), residual_address, weight.data_ptr(), y.data_ptr(), r.data_ptr())
        kernel(*addresses, x.numel() // shape[-1], shape[-1], eps, torch.get_num_threads())
    return y, r


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v``, each KV head serving ``H / K`` query heads in turn.

    q         [B, T, H, D]      k, v  [B, S, K, D]      fp32 | bf16, any strides but a last one of 1, as in views of a cache
    mask      None, or [B, T, S] bool of any strides; a row with no True looks at every key alike
    out       where to write, contiguous, overlapping no input
    returns   [B, T, H, D]  dtype of q
    numerics  scores, softmax and sums in fp32; exp within 2 ulp, or 3e-6 where probabilities are rounded to bf16, which the
              level "avx512_bf16" does (it also takes subnormals for zero); other levels widen bf16 to fp32. The bits do
              not depend on the number of threads
    errors    TypeError, ValueError, RuntimeError naming the tensor; ExtensionUnavailable where nothing was compiled
    replaces  ``F.scaled_dot_product_attention`` of the vision tower, ``eager_attention_forward`` of text and expert layers
    """
    dtype = q.dtype
    if dtype not in _KERNELS:
        raise TypeError(f"attention: q has dtype {dtype}; accepted are {', '.join(map(str, _KERNELS))}")
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q, k have shapes {list(q.shape)}, {list(k.shape)}; accepted are [B, T, H, D], [B, S, K, D]"
        )
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = q.shape, k.shape
    if not keys or not head_dim or not kv_heads or heads % kv_heads:
        raise ValueError(
            f"attention: q, k have shapes {list(q.shape)}, {list(k.shape)}; there must be a key, and H a multiple of K"
        )
    for name, tensor, shape in (("q", q, q.shape), ("k", k, (batch, keys, kv_heads, head_dim)), ("v", v, k.shape)):
        _check_one("attention", name, tensor, dtype, "q", shape)
        if tensor.stride(3) != 1:
            raise ValueError(f"attention: {name} has strides {tensor.stride()}; the last must be 1")
    strides = q.stride()[:3] + k.stride()[:3] + v.stride()[:3]
    mask_address = 0
    if mask is None:
        strides += (0, 0, 0)
    else:
        _check_one("attention", "mask", mask, torch.bool, "a mask", (batch, queries, keys))
        strides, mask_address = strides + mask.stride(), mask.data_ptr()
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    else:
        _check("attention", dtype, {"out": (out, q.shape)})
        _check_apart("attention", [out], [q, k, v, mask])
    if q.numel():
        kernel = getattr(extension.load("cpu"), "attention_" + _KERNELS[dtype])
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), mask_address, out.data_ptr())
        sizes = (batch, queries, keys, heads, kv_heads, head_dim)
        kernel(*addresses, sizes, strides, head_dim**-0.5, torch.get_num_threads())
    return out


@contextmanager
def instruction_level(name: str) -> Iterator[None]:
    """For tests: run the CPU kernels at one of ``instruction_levels()``, in the whole process."""
    kernels = extension.load("cpu")
    if name not in kernels.levels():
        raise ValueError(
            f"level {name!r} does not run here; this processor has {', '.join(kernels.levels())}"
        )
    before = kernels.level()
    kernels.set_level(name)
    try:
        yield
    finally:
        kernels.set_level(before)


def instruction_levels() -> list[str]:
    """What this processor runs, lowest first: "baseline", "avx2", "avx512". The kernels use the last."""
    return extension.load("cpu").levels()


def _check(op: str, dtype: torch.dtype, tensors: dict[str, tuple[Tensor | None, torch.Size]]) -> None:
    """Raises unless each is a contiguous CPU tensor of this dtype and its shape, and wants no gradient."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None:
            _check_one(op, name, tensor, dtype, "x", shape)
            if not tensor.is_contiguous():
                raise ValueError(f"{op}: {name} is not contiguous; call .contiguous() first")


def _check_one(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, model: str, shape: tuple[int, ...]
) -> None:
    """The same for one tensor of any strides; ``model`` is what it takes its dtype from."""
    if not tensor.is_cpu:
        raise ValueError(f"{op}: {name} is on {tensor.device}; this kernel takes CPU tensors")
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, {model} has {dtype}; they must be equal")
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: {name} wants a gradient, this kernel has none; call it under torch.no_grad()"
        )


def _check_apart(op: str, outputs: list[Tensor], inputs: list[Tensor | None]) -> None:
    """Inputs are read again after outputs are written, so an output may overlap no other tensor."""
    spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in inputs if t is not None]
    for index, tensor in enumerate(outputs):
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(begin < other_end and other_begin < end for other_begin, other_end in spans):
            raise ValueError(
                f"{op}: out[{index}] overlaps another tensor of the call; give it memory of its own"
            )
        spans.append((begin, end))
