"""Which backends can serve a device, and why the others cannot."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform

import torch

from . import extension
from .torch import fused_attention, linear

PREFERRED = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
"""What ``auto`` prefers on a device; anything else than these two is served by torch."""

MIN_CAPABILITY = (8, 0)
"""The first compute capability whose tensor cores multiply bf16."""


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve a whole chunk on this device, or None."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"its kernels run on the CPU, the policy is on {device}"
        return extension.why_missing("cpu") or None
    if backend == "triton":
        return _why_not_triton(device)
    if backend == "cuda":
        return _why_not_cuda(device)
    return None


def why_not_auto(backend: str, device: torch.device) -> str | None:
    """Why ``auto`` does not take a backend on this device: it cannot serve, or may be slower than torch. Or None."""
    return why_not(backend, device) or (_why_slow() if backend == "cpu" else None)


def _why_slow() -> str | None:
    """Why the CPU kernels, running as they do here, were never measured ahead of torch, or None."""
    reason = None
    if platform.machine().lower() in ("aarch64", "arm64"):
        reason = f"its kernels for {platform.machine()} have run in an emulator alone, which tells no times"
    elif platform.machine().lower() not in ("x86_64", "amd64"):
        reason = (
            f"its kernels have vector code for x86-64 and ARM alone, this processor is {platform.machine()}"
        )
    elif extension.load("cpu").levels()[-1] == "baseline":
        reason = "its kernels have vector code from AVX2 on, which this processor has not"
    elif not extension.build_record().get("cpu", {}).get("openmp", True):
        reason = "its kernels were compiled without OpenMP and run on threads of their own beside torch's"
    return reason and (
        f"{reason}; torch was never measured slower there, a plan of `smolvla-fast tune` may say otherwise, "
        "backend='cpu' takes them all the same"
    )


def _why_not_cuda(device: torch.device) -> str | None:
    from .cuda import library

    return (
        _why_not_nvidia(device)
        or extension.why_missing("cuda")
        or _too_old(device)
        or library.why_no_code(device)
    )


def _why_not_triton(device: torch.device) -> str | None:
    # Asked first: off a GPU nothing has to import Triton to know the answer.
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    reason = None if interpreted else _why_not_nvidia(device)
    if reason:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; `pip install triton` (Linux, Windows: triton-windows)"
    try:
        importlib.import_module(f"{__package__}.triton.ops")
    except Exception as error:  # of another torch, half removed, a stub: whatever it is, torch serves
        said = (str(error).strip() or "no message").splitlines()[0]
        return (
            f"Triton is installed and does not load ({type(error).__name__}: {said}); install the one that this torch "
            "asks for, as `pip check` names it"
        )
    return None if interpreted else _too_old(device)


def _why_not_nvidia(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its kernels run on an NVIDIA GPU, the policy is on {device}"
    if torch.version.hip:  # torch calls AMD's GPUs "cuda" too, with capabilities that look like NVIDIA's
        return f"its kernels run on an NVIDIA GPU, this torch is built for AMD's (ROCm {torch.version.hip})"
    return None


def _too_old(device: torch.device) -> str | None:
    have = torch.cuda.get_device_capability(device)
    if have >= MIN_CAPABILITY:
        return None
    return f"compute capability {have[0]}.{have[1]} has no bf16 tensor cores; accepted is 8.0 and later"


def fallback_reasons(device: torch.device) -> dict[str, str]:
    """The backends that ``auto`` would rather have taken on this device, each with the reason why it could not."""
    found: dict[str, str] = {}
    for name in PREFERRED.get(device.type, ()):
        reason = why_not_auto(name, device)
        if reason is None:
            return found
        found[name] = reason
    return found


def why_not_library(name: str, device: torch.device) -> str | None:
    """Why a library's own call is no candidate on this device, or None: "cublas", "cublaslt", "flash-sdpa", "cudnn",
    "flash"."""
    reason = _why_not_nvidia(device) or _too_old(device)
    if reason or name == "cublaslt":
        return reason
    return linear.why_no_cublas() if name == "cublas" else fused_attention.why_not(name)


def why_not_fp8(device: torch.device) -> str | None:
    """Why 8-bit floats cannot be multiplied on this device, or None."""
    reason = why_not("triton", device)
    if reason is None and device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        if have < (8, 9):
            return f"compute capability {have[0]}.{have[1]} does not multiply e4m3; accepted is 8.9 and later"
    return reason


def why_not_int8(device: torch.device) -> str | None:
    """Why integers of 8 bits cannot be multiplied quickly and exactly on this device, or None."""
    from .cpu import int8

    return int8.why_not(device)


def why_not_int16(device: torch.device) -> str | None:
    """Why there is no product of 16-bit integers on this device, or None; ``int16.why_slow`` asks for its speed."""
    from .cpu import int16

    return int16.why_not(device)
