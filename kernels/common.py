"""What all kernels share: the target they are tuned for, checks of arguments, and small jitted pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_assumed: ContextVar[int | None] = ContextVar("assumed_capability", default=None)


@cache
def _of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """The compute capability that launchers tune for, 90 for 9.0: the device's own; off a GPU (Triton's interpreter) 80."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if device.type != "cuda":
        return 80
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def assume_capability(cc: int) -> Iterator[None]:
    """Inside, launchers tune for this capability whatever the device: for compiling ahead of time."""
    token = _assumed.set(cc)
    try:
        yield
    finally:
        _assumed.reset(token)


def check(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """Raise ValueError unless the tensor has this shape, a dtype of DTYPES, a contiguous last dimension and like's device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{op}: {name} is {tensor.dtype}; accepted are {accepted}")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} is strided; call .contiguous() on it")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors on {like.device}")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def gelu_tanh(x):
    """The tanh form of GELU, with tanh(u) = 2·sigmoid(2u) - 1: there is no tanh that every target has."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2.0 * u)
