"""What every compiled CPU kernel asks of its operands: a device, a dtype, a shape, no gradient, memory of its own."""

from __future__ import annotations

import torch
from torch import Tensor

KERNELS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""How the kernels for a dtype end."""


def check(op: str, dtype: torch.dtype, tensors: dict[str, tuple[Tensor | None, torch.Size]]) -> None:
    """Raises unless each is a contiguous CPU tensor of this dtype and its shape, and wants no gradient."""
    for name, (tensor, shape) in tensors.items():
        if tensor is not None:
            check_one(op, name, tensor, dtype, "x", shape)
            check_contiguous(op, name, tensor)


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous; call .contiguous() first")


def check_one(
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


def check_apart(op: str, out: Tensor, inputs: list[Tensor | None]) -> None:
    """Inputs are read again after the output is written, so it may overlap no other tensor."""
    begin, end = _span(out)
    spans = [_span(tensor) for tensor in inputs if tensor is not None]
    if any(begin < other_end and other_begin < end for other_begin, other_end in spans):
        raise ValueError(f"{op}: out overlaps another tensor of the call; give it memory of its own")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and last address + 1; by strides, as a view reaches further than its elements and an expanded one less."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * size
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return begin, begin + size * (1 + sum((count - 1) * stride for count, stride in steps))
