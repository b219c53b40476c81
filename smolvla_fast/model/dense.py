"""Which tensors a kernel may read by their address: dense ones, of torch's own class, with memory of their own.

Quantised weights (torchao, bitsandbytes), DTensor and other subclasses answer ``dtype``, ``shape`` and
``is_contiguous()`` as a dense tensor would, and have no memory behind ``data_ptr()``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def why_not_dense(tensor: Any) -> str | None:
    """What a tensor is instead of a dense one, as the end of a sentence; None for a dense tensor."""
    cls = type(tensor)
    if cls not in PLAIN:
        return f"a {cls.__module__}.{cls.__qualname__}, not a plain tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "a tensor of a torch.func transform"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout is not torch.strided:
        return f"stored as {tensor.layout}"
    if tensor.is_meta:
        return "on the meta device"
    if tensor.is_neg() or tensor.is_conj():
        return "a negated or conjugated view; call .resolve_neg().resolve_conj() on it"
    if tensor.numel() and not tensor.data_ptr():
        return "without memory (its storage was freed)"
    return None


def memory_reason(model: nn.Module) -> str | None:
    """Which parameter or buffer of a model is not dense, or None. All are asked, those that nobody reads too."""
    for kind in (model.named_parameters(), model.named_buffers()):
        for name, tensor in kind:
            why = why_not_dense(tensor)
            if why is not None:
                return f"{name} is {why}"
    return None
