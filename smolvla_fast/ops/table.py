"""The menu: every op of a chunk under one name and one signature, whoever computes it.

The maths, shapes, dtypes and what each op replaces stand in its reference, ``smolvla_fast/ops/reference/<op>.py``; every
backend has the same function under the same name. Which backend serves which op is decided in ``select.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Ops:
    """One function for each op. The stages call these and nothing else for their heavy work."""

    backend: str
    single_launch: bool
    """whether every op of a denoise step is one kernel launch, but for products that the backend leaves to torch"""
    leaves_to_torch: Callable[[Any, int], bool]
    """dtype of a weight, rows -> whether the products of a decoder layer are torch's calls"""
    image_prep: Callable[..., Tensor]
    """observation: camera frames of any size, bytes or floats -> images of the vision tower's size"""
    patch_embed: Callable[..., Tensor]
    """vision: images -> patch tokens"""
    layer_norm: Callable[..., Tensor]
    """vision"""
    linear: Callable[..., Tensor]
    """vision: GEMM + bias + activation or residual"""
    attention: Callable[..., Tensor]
    """vision: every patch to every patch of its image"""
    pixel_shuffle_linear: Callable[..., Tensor]
    """vision: the connector"""
    prepare_mask: Callable[[Tensor], Any]
    """prefix, denoise: a bool mask in the form in which this backend's masked_attention reads it; once a chunk"""
    norm_qkv_rope: Callable[..., Any]
    """prefix, denoise: RMSNorm + Q, K, V + rotation + write of K, V into the cache"""
    masked_attention: Callable[..., Tensor]
    """prefix, denoise: grouped heads under a mask; self, suffix and cross attention"""
    cross_kv: Callable[..., tuple[Tensor, Tensor]]
    """prefix: the expert's projections of the prefix KV"""
    linear_residual: Callable[..., Tensor]
    """prefix, denoise: o_proj or down_proj + residual"""
    norm_swiglu: Callable[..., Tensor]
    """prefix, denoise: RMSNorm + gate, up + silu·mul"""
    suffix_fold: Callable[..., Any]
    """denoise: what of the suffix embedding does not depend on the actions; once a chunk"""
    suffix_embed: Callable[..., Tensor]
    """denoise: noisy actions and time -> suffix"""
    euler_step: Callable[..., tuple[Tensor, Tensor]]
    """denoise: final norm + velocity + guidance + Euler"""
    learning_attention: Callable[..., Tensor]
    """training: masked_attention of a bool mask, differentiable"""
    flow_point: Callable[..., Tensor]
    """training: actions, noise, time -> the point between them"""
    flow_loss: Callable[..., Tensor]
    """training: velocity -> its squared error, differentiable"""
    denoise_persistent: Callable[..., Tensor] | None = None
    """denoise: all steps of all layers, the whole stage; None where it runs op by op"""
    why_not_persistent: Callable[..., str | None] | None = None
    """arguments of denoise_persistent -> why it cannot serve them, or None; there where it is"""
    beside: Ops | None = None
    """the table that this one was made from: it serves what this backend has no kernel for"""


SETTINGS = ("backend", "single_launch", "leaves_to_torch", "why_not_persistent", "beside")
NAMES = tuple(name for name in Ops.__dataclass_fields__ if name not in SETTINGS)
STAGES = {
    "vision": ("patch_embed", "layer_norm", "linear", "attention", "pixel_shuffle_linear"),
    "prefix": ("norm_qkv_rope", "masked_attention", "cross_kv", "linear_residual", "norm_swiglu"),
    "denoise": (
        "norm_qkv_rope", "masked_attention", "linear_residual", "norm_swiglu", "suffix_embed", "euler_step",
    ),
}  # fmt: skip
"""The ops that each stage's time goes into."""


def serving(ops: Ops, stage: str) -> str:
    """Who computes a stage op by op: the backend, or where it took ops over from another, both: "cuda, triton"."""
    if ops.beside is None:
        return ops.backend
    own = [getattr(ops, name) is not getattr(ops.beside, name) for name in STAGES[stage]]
    return ", ".join(
        name for name, found in ((ops.backend, any(own)), (ops.beside.backend, not all(own))) if found
    )
