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
        if tensor is None:
            continue
        if not tensor.is_cpu:
            raise ValueError(f"{op}: {name} is on {tensor.device}; this kernel takes CPU tensors")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, x has {dtype}; they must be equal")
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is not contiguous; call .contiguous() first")
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
