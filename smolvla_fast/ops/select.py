"""The table: which backend serves which op, and why a cell is empty."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass, replace
from functools import cache

import torch

from . import extension
from .table import NAMES, Ops

BACKENDS = ("torch", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Row:
    """One cell of the table, as ``smolvla-fast doctor`` prints it."""

    op: str
    backend: str
    available: bool
    reason: str


@cache
def reference_ops() -> Ops:
    from .reference import (
        attention,
        cross_kv,
        euler_step,
        flow_loss,
        image_prep,
        layer_norm,
        linear,
        linear_residual,
        masked_attention,
        norm_qkv_rope,
        norm_swiglu,
        patch_embed,
        pixel_shuffle_linear,
        suffix_embed,
    )

    return Ops(
        backend="reference",
        single_launch=False,
        leaves_to_torch=lambda dtype, rows: True,
        image_prep=image_prep.image_prep,
        patch_embed=patch_embed.patch_embed,
        layer_norm=layer_norm.layer_norm,
        linear=linear.linear,
        attention=attention.attention,
        pixel_shuffle_linear=pixel_shuffle_linear.pixel_shuffle_linear,
        prepare_mask=lambda mask: mask,
        norm_qkv_rope=norm_qkv_rope.norm_qkv_rope,
        masked_attention=masked_attention.masked_attention,
        cross_kv=cross_kv.cross_kv,
        linear_residual=linear_residual.linear_residual,
        norm_swiglu=norm_swiglu.norm_swiglu,
        suffix_fold=suffix_embed.suffix_fold,
        suffix_embed=suffix_embed.suffix_embed,
        euler_step=euler_step.euler_step,
        learning_attention=masked_attention.masked_attention,
        flow_point=flow_loss.flow_point,
        flow_loss=flow_loss.flow_loss,
    )


@cache
def _torch() -> Ops:
    from .reference import attention, flow_loss, image_prep
    from .torch import decoder, linear, masked_attention, suffix, vision

    return Ops(
        backend="torch",
        single_launch=False,
        leaves_to_torch=lambda dtype, rows: True,
        image_prep=image_prep.image_prep,
        patch_embed=vision.patch_embed,
        layer_norm=vision.layer_norm,
        linear=linear.linear,
        attention=attention.attention,
        pixel_shuffle_linear=vision.pixel_shuffle_linear,
        prepare_mask=masked_attention.prepare_mask,
        norm_qkv_rope=decoder.norm_qkv_rope,
        masked_attention=masked_attention.masked_attention,
        cross_kv=decoder.cross_kv,
        linear_residual=decoder.linear_residual,
        norm_swiglu=decoder.norm_swiglu,
        suffix_fold=suffix.suffix_fold,
        suffix_embed=suffix.suffix_embed,
        euler_step=suffix.euler_step,
        learning_attention=masked_attention.learning_attention,
        flow_point=flow_loss.flow_point,
        flow_loss=flow_loss.flow_loss,
    )


@cache
def _cpu() -> Ops:
    from .cpu import ops as compiled

    return replace(
        _torch(),
        backend="cpu",
        image_prep=compiled.image_prep,
        layer_norm=compiled.layer_norm,
        linear=compiled.linear,
        attention=compiled.attention,
        prepare_mask=compiled.prepare_mask,
        norm_qkv_rope=compiled.norm_qkv_rope,
        masked_attention=compiled.masked_attention,
        linear_residual=compiled.linear_residual,
        norm_swiglu=compiled.norm_swiglu,
        suffix_embed=compiled.suffix_embed,
        euler_step=compiled.euler_step,
    )


@cache
def _int8() -> Ops:
    """Backend ``cpu`` with integer products where a weight is packed for them."""
    from .cpu import int8

    return replace(
        _cpu(),
        layer_norm=int8.layer_norm,
        linear=int8.linear,
        norm_qkv_rope=int8.norm_qkv_rope,
        linear_residual=int8.linear_residual,
        norm_swiglu=int8.norm_swiglu,
    )


@cache
def _triton() -> Ops:
    from ..kernels.attention import attention
    from ..kernels.cross_kv import cross_kv
    from ..kernels.euler_step import euler_step
    from ..kernels.flow_loss import flow_loss, flow_point
    from ..kernels.image_prep import image_prep
    from ..kernels.layer_norm import layer_norm
    from ..kernels.masked_attention import masked_attention
    from ..kernels.masked_attention_backward import learning_attention
    from ..kernels.patch_embed import patch_embed
    from ..kernels.suffix_embed import suffix_embed
    from .triton import ops as fused

    return replace(
        _torch(),
        backend="triton",
        single_launch=True,
        leaves_to_torch=fused.leaves_to_torch,
        image_prep=image_prep,
        patch_embed=patch_embed,
        layer_norm=layer_norm,
        linear=fused.linear,
        attention=attention,
        pixel_shuffle_linear=fused.pixel_shuffle_linear,
        prepare_mask=lambda mask: mask,
        norm_qkv_rope=fused.norm_qkv_rope,
        masked_attention=masked_attention,
        cross_kv=cross_kv,
        linear_residual=fused.linear_residual,
        norm_swiglu=fused.norm_swiglu,
        suffix_embed=suffix_embed,
        euler_step=euler_step,
        learning_attention=learning_attention,
        flow_point=flow_point,
        flow_loss=flow_loss,
    )


@cache
def _cuda(beside: str) -> Ops:
    """CUDA C++ where there is a kernel, all the rest by the backend ``beside``."""
    from .cuda import ops as cuda

    table = _TABLES[beside]()
    return replace(
        table,
        backend="cuda",
        image_prep=cuda.image_prep,
        prepare_mask=lambda mask: mask,
        masked_attention=cuda.masked_attention_beside(table),
        euler_step=cuda.euler_step,
        denoise_persistent=cuda.denoise_persistent,
        why_not_persistent=cuda.why_not_persistent,
        beside=table,
    )


_TABLES = {"torch": _torch, "cpu": _cpu, "triton": _triton}
_ORDER = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}
"""What ``auto`` prefers on a device; anything else than these two is served by torch."""

OLDEST = (8, 0)
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
    if platform.machine().lower() not in ("x86_64", "amd64"):
        reason = f"its kernels have vector code for x86-64 alone, this processor is {platform.machine()}"
    elif extension.load("cpu").levels()[-1] == "baseline":
        reason = "its kernels have vector code from AVX2 on, which this processor has not"
    elif not extension.build_record().get("cpu", {}).get("openmp", True):
        reason = "its kernels were compiled without OpenMP and run on one thread"
    return (
        reason and f"{reason}; torch was never measured slower there, backend='cpu' takes them all the same"
    )


def _ops(backend: str, device: torch.device) -> Ops:
    """The table of a backend that can serve this device."""
    if backend != "cuda":
        return _TABLES[backend]()
    # Off a GPU, where the emulator takes its place, what is not CUDA C++ is to be quick.
    beside = "triton" if device.type == "cuda" and why_not("triton", device) is None else "torch"
    return _cuda(beside)


def _why_not_cuda(device: torch.device) -> str | None:
    from .cuda import library

    if device.type == "cpu" and library.emulator is not None:
        return None
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
        _triton()
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
    if have >= OLDEST:
        return None
    return f"compute capability {have[0]}.{have[1]} has no bf16 tensor cores; accepted is 8.0 and later"


def fallback_reasons(device: torch.device) -> dict[str, str]:
    """The backends that ``auto`` would rather have taken on this device, each with the reason why it could not."""
    found: dict[str, str] = {}
    for name in _ORDER.get(device.type, ()):
        reason = why_not_auto(name, device)
        if reason is None:
            return found
        found[name] = reason
    return found


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


_EIGHT_BITS = {"e4m3": ("fp8", "triton", why_not_fp8, _triton), "int8": ("int8", "cpu", why_not_int8, _int8)}
"""Of each kind of 8-bit matrices: the tier, the one backend that has kernels for it, why not here, its ops."""


def why_not_eight_bits(device: torch.device) -> dict[str, str | None]:
    """Of each tier with 8-bit matrices: why ``auto`` cannot serve it on this device, or None."""
    return {
        tier: reason(device) or why_not_auto(alone, device) for tier, alone, reason, _ in _EIGHT_BITS.values()
    }


def select(backend: str, device: torch.device, stock_order: bool, quantized: str | None = None) -> Ops:
    """The ops for a wish.

    backend      "auto": on a CPU "cpu", on an NVIDIA GPU "triton", and "torch" where these cannot serve or were never
                 measured ahead of it; or a name. "cuda" has to be named: it was never measured to be ahead of Triton
    quantized    "e4m3", the tier ``fp8``, which Triton's kernels alone serve, or "int8", which backend ``cpu`` alone does
    stock_order  the ``exact`` tier: the references, which are stock's own ATen calls, on any device
    raises       ValueError for an unknown name, RuntimeError naming the reason where an explicit wish cannot be met
    """
    if backend not in ("auto", *BACKENDS):
        accepted = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend={backend!r} is not a backend; accepted are {accepted}")
    if stock_order:
        if backend not in ("auto", "torch"):
            raise RuntimeError(
                f"precision='exact' runs stock's own ATen calls, backend={backend!r} has other kernels; "
                "accepted are 'auto' and 'torch'"
            )
        return reference_ops()
    if quantized:
        tier, alone, why_not_tier, ops = _EIGHT_BITS[quantized]
        reason = why_not_tier(device)
        if reason is None and backend != alone:
            other = f"backend={backend!r} has no kernels for it"
            reason = why_not_auto(alone, device) if backend == "auto" else other
        if reason:
            raise RuntimeError(
                f"precision={tier!r} cannot serve this policy: {reason}; 'auto' takes what can"
            )
        return ops()
    if backend == "auto":
        ready = (name for name in _ORDER.get(device.type, ()) if why_not_auto(name, device) is None)
        return _ops(next(ready, "torch"), device)
    reason = why_not(backend, device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot serve this policy: {reason}; 'auto' takes what can")
    return _ops(backend, device)


def table(device: torch.device | None = None) -> list[Row]:
    """Op by op and backend by backend: who can serve it here, and why not. For ``device``, the CPU where not given."""
    device = device or torch.device("cpu")
    rows = []
    for name in NAMES:
        for backend in BACKENDS:
            reason = why_not(backend, device) or _why_empty(name, _ops(backend, device))
            rows.append(Row(name, backend, not reason, reason or ""))
    return rows


def _why_empty(op: str, ops: Ops) -> str | None:
    """Why a backend that can serve has no kernel of its own for an op, or None where it has."""
    serves = getattr(ops, op)
    if serves is None:
        return "it runs the denoise loop op by op"
    if ops.backend != "torch" and serves is getattr(_torch(), op):
        return "torch's own call serves it"
    if ops.beside is not None and serves is getattr(ops.beside, op):
        return f"the kernel of {ops.beside.backend!r} serves it"
    return None
