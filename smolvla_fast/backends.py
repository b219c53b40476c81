"""The table: which backend serves which op, and why a cell is empty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from . import extension
from .ops import NAMES, Ops

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
    )


@cache
def _torch() -> Ops:
    from .aten import decoder, linear, masked_attention, suffix, vision
    from .reference import attention

    return Ops(
        backend="torch",
        single_launch=False,
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
    )


@cache
def _cpu() -> Ops:
    from . import compiled

    return replace(
        _torch(),
        backend="cpu",
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


def why_not(backend: str, device: torch.device) -> str | None:
    """Why a backend cannot serve a whole chunk on this device, or None."""
    if backend == "cpu":
        if device.type != "cpu":
            return f"its kernels run on the CPU, the policy is on {device}"
        return extension.why_missing("cpu") or None
    if backend in ("triton", "cuda"):
        return "it has no kernels for a whole chunk in this release"
    return None


def select(backend: str, device: torch.device, stock_order: bool) -> Ops:
    """The ops for a wish.

    backend      "auto": "cpu" where its kernels are compiled and the policy is on a CPU, else "torch"; or a name
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
    if backend == "auto":
        return _torch() if why_not("cpu", device) else _cpu()
    reason = why_not(backend, device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot serve this policy: {reason}; 'auto' takes what can")
    return _cpu() if backend == "cpu" else _torch()


def table(device: torch.device | None = None) -> list[Row]:
    """Op by op and backend by backend: who can serve it here, and why not. For ``device``, the CPU where not given."""
    device = device or torch.device("cpu")
    torch_ops = _torch()
    rows = []
    for name in NAMES:
        for backend in BACKENDS:
            reason = why_not(backend, device)
            if backend == "cpu" and not reason and getattr(_cpu(), name) is getattr(torch_ops, name):
                reason = "torch's own call, which serves it, measured no slower"
            rows.append(Row(name, backend, not reason, reason or ""))
    return rows
