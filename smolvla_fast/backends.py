"""The table: which backend serves which op, and why a cell is empty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .ops import NAMES, Ops

BACKENDS = ("reference", "torch", "cpu", "triton", "cuda")


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


def select(backend: str, device: torch.device, stock_order: bool) -> Ops:
    """The ops for a wish.

    backend      "auto" | "torch" | "cpu"        stock_order  the ``exact`` tier: references, whatever the device
    raises       ValueError for an unknown name, RuntimeError naming the reason where the wish cannot be met
    """
    if backend not in ("auto", *BACKENDS):
        accepted = ", ".join(repr(name) for name in ("auto", *BACKENDS[1:]))
        raise ValueError(f"backend={backend!r} is not a backend; accepted are {accepted}")
    if stock_order:
        if backend not in ("auto", "torch", "reference"):
            raise RuntimeError(f"precision='exact' runs stock's own ATen calls; backend={backend!r} has other kernels")
        return reference_ops()
    if backend in ("triton", "cuda"):
        raise RuntimeError(f"backend={backend!r} has no kernels for a whole chunk yet; accepted are 'auto', 'torch'")
    return reference_ops() if backend == "reference" else _torch()


def table() -> list[Row]:
    return [Row(op, "torch", True, "") for op in NAMES]
