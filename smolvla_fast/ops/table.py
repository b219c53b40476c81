"""The table of ops: every op of a chunk under one name and one signature, whoever computes it.

The maths, shapes, dtypes and what each op replaces stand in its reference, ``ops/reference/<op>.py``. A backend is a module
with functions of these names, ``ops/<backend>/ops.py``; ``derive`` makes its table from what is there. Which backend serves
which op is decided in ``select.py``.

A new op is a line here, its reference, the backends' functions of that name, and its tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import isfunction
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .reference.suffix_tokens import Tokens

if TYPE_CHECKING:
    from .cpu.int8_attention import Heads


@dataclass(frozen=True)
class Ops:
    """One function for each op. The stages call these and nothing else for their heavy work."""

    backend: str
    layer_launches: Callable[[int], int | None]
    """rows of a denoise step -> kernel launches of a layer; None where ops were not one launch each"""
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
    prefix_embed: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """prefix: image tokens, language, state -> the residual stream and its masks"""
    rope_masks: Callable[..., tuple[Tokens, Tokens, Tokens]]
    """prefix: the masks of its tokens -> rotary tables and attention masks, of the suffix too; once a chunk"""
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
    attention_with_grad: Callable[..., Tensor]
    """training: masked_attention of a bool mask, differentiable"""
    flow_point: Callable[..., Tensor]
    """training: actions, noise, time -> the point between them"""
    flow_loss: Callable[..., Tensor]
    """training: velocity -> its squared error, differentiable"""
    attention_residual: Callable[..., Tensor] | None = None
    """prefix, denoise: masked_attention and linear_residual in one; None where they run one after the other"""
    denoise_persistent: Callable[..., Tensor] | None = None
    """denoise: all steps of all layers, the whole stage; None where it runs op by op"""
    why_not_persistent: Callable[..., str | None] | None = None
    """arguments of denoise_persistent -> why it cannot serve them, or None; there where it is"""
    prepares_norms: bool = False
    """whether ops that write a residual stream take ``next_norm``, and those that read it ``normed`` (``next_norm.py``), and
    those of the vision tower's ``offset`` (``stream_offset.py``)"""
    heads: Heads | None = None
    """of tier ``int8``: attention of chunks, and what became of its heads"""
    fallback: Ops | None = None
    """of a backend with few kernels: the table that serves the rest"""
    missing: dict[str, str] = field(default_factory=dict, compare=False)
    """why the backend has no kernel of its own for an op, by name"""


SETTINGS = (
    "backend",
    "layer_launches",
    "why_not_persistent",
    "prepares_norms",
    "heads",
    "fallback",
    "missing",
)
NAMES = tuple(name for name in Ops.__dataclass_fields__ if name not in SETTINGS)
STAGES = {
    "vision": ("patch_embed", "layer_norm", "linear", "attention", "pixel_shuffle_linear"),
    "prefix": (
        "prefix_embed", "rope_masks", "norm_qkv_rope", "masked_attention", "cross_kv", "linear_residual", "norm_swiglu",
    ),
    "denoise": (
        "norm_qkv_rope", "masked_attention", "linear_residual", "attention_residual", "norm_swiglu", "suffix_embed",
        "euler_step",
    ),
}  # fmt: skip
"""The ops that each stage's time goes into."""

BY_TORCH = "torch's own call serves it"


def exports(module: ModuleType) -> dict[str, Any]:
    """The ops and settings that a backend's module has, by name.

    raises  TypeError for a public function of another name: a misspelt op would silently be served by another backend
    """
    found = {name: value for name, value in vars(module).items() if isfunction(value) and name[0] != "_"}
    unknown = sorted(found.keys() - Ops.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(
            f"{module.__name__} has {', '.join(unknown)}, which is no op; accepted are {', '.join(NAMES)}. "
            "Helpers begin with an underscore"
        )
    return found


def derive(backend: str, module: ModuleType, below: Ops | None, **changes: Any) -> Ops:
    """The table of a backend: what its module exports, and the ops of the table ``below`` for the rest, with the reason."""
    # What is several ops in one would pass over the backend's own.
    own = {"attention_residual": None, **exports(module), **changes}
    if below is None:
        return Ops(backend=backend, layer_launches=lambda rows: None, **own)
    by_torch = below.backend in ("reference", "torch")
    missing = {
        name: below.missing.get(name)
        or (BY_TORCH if by_torch else f"the kernel of {below.backend!r} serves it")
        for name in NAMES
        if name not in own and getattr(below, name) is not None
    }
    return replace(below, backend=backend, missing=missing, **own)


def serving(ops: Ops, stage: str) -> str:
    """Who computes a stage op by op: the backend, or where it took ops over from another, both: "cuda, triton". The same
    where kernels of CUDA C++ have served calls of Triton's table (``Choice.served``)."""
    if ops.fallback is None:
        chosen = (getattr(getattr(ops, name), "served", {}).values() for name in STAGES[stage])
        by_cuda = ops.backend == "triton" and any("cuda" in names for names in chosen)
        return f"cuda, {ops.backend}" if by_cuda else ops.backend
    own = [getattr(ops, name) is not getattr(ops.fallback, name) for name in STAGES[stage]]
    return ", ".join(
        name for name, found in ((ops.backend, any(own)), (ops.fallback.backend, not all(own))) if found
    )
