"""What all wrappers share: the compiled library for a device, addresses, streams, and checks of arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import extension

MIN_CAPABILITY = 90
"""The first with clusters of blocks that read each other's shared memory, and launches that begin early."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def library(device: torch.device) -> ModuleType:
    """The compiled kernels for this device. Raises RuntimeError for a device that has none."""
    if device.type == "cuda":
        return extension.load("cuda")
    raise RuntimeError(f"CUDA C++ kernels run on an NVIDIA GPU, the tensors are on {device}")


def properties(device: torch.device) -> dict[str, Any]:
    """Of the device, as the library sees it: compute_capability is 90 for 9.0."""
    index = device.index if device.type == "cuda" else 0
    found: dict[str, Any] = library(device).device(torch.cuda.current_device() if index is None else index)
    return found


def why_no_dependent_launches(device: torch.device) -> str | None:
    """Why a device that takes this library's code runs no launch early, and has no clusters, or None."""
    found = properties(device)
    have = found["compute_capability"]
    if have < MIN_CAPABILITY:
        return f"compute capability {have // 10}.{have % 10} has no clusters of blocks; accepted is 9.0 and later"
    if found["ptx_version"] < MIN_CAPABILITY:
        return (
            "smolvla_fast._cuda has code with clusters for no GPU like this one; "
            f"`SMOLVLA_CUDA_ARCHS={have}a pip install .` compiles it"
        )
    return None


@cache
def begins_early(device: torch.device) -> bool:
    """Whether kernels that are compiled for every architecture wait for earlier launches themselves on this device."""
    return why_no_dependent_launches(device) is None


def why_no_code(device: torch.device) -> str | None:
    """Why a GPU takes none of the codes in this build, in CUDA's own words, or None. Starts a CUDA context."""
    try:
        index = torch.cuda.current_device() if device.index is None else device.index
    except RuntimeError as error:
        return f"torch finds no current GPU: {error}"
    return _why_no_code(index)


@cache
def _why_no_code(index: int) -> str | None:
    try:
        extension.load("cuda").device(index)
    except RuntimeError as error:
        archs = extension.build_record().get("cuda", {}).get("archs", [])
        built = f"; it was compiled for {', '.join(f'sm_{arch}' for arch in archs)}" if archs else ""
        return f"smolvla_fast._cuda does not run on this GPU: {error}{built}"
    return None


def or_fallback(
    kernel: Callable[..., Any], why_not: Callable[..., str | None], fallback: Callable[..., Any]
) -> Callable[..., Any]:
    """``kernel``, by ``fallback`` for operands that ``why_not`` has a reason against."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        return (fallback if why_not(*args, **kwargs) else kernel)(*args, **kwargs)

    return serve


def address(tensor: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """The handle of the stream that torch works on now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def check(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    like: Tensor | None = None,
    contiguous: bool = True,
    aligned: int = 1,
) -> None:
    """Raise ValueError unless the tensor has this shape, one of the dtypes, the device of ``like``, and, where asked
    for, contiguous elements and an address that is a multiple of ``aligned`` bytes."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
    if tensor.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {str(tensor.dtype).removeprefix('torch.')}; accepted: {accepted}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}; accepted is {like.device}, as the others are")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tensor.stride()}; call .contiguous() on it")
    if tensor.data_ptr() % aligned:
        raise ValueError(
            f"{op}: {name} begins at an address that is no multiple of {aligned} bytes; call .clone() on it"
        )
