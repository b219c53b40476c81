"""Backend ``cpu``: the compiled CPU kernels under the signatures of the ops.

Where others are faster: ``ops/defaults.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import Memory
from ..memory import empty as _empty
from ..reference import image_prep as _reference_image_prep
from ..reference.euler_step import Guidance
from ..reference.guidance import guide as _guide
from ..reference.ops import prepare_mask  # noqa: F401 - the kernel reads the bool mask as it is
from ..torch.suffix import Folded
from . import image_prep as _image_prep
from . import kernels
from .rope import rotate as _rotate

_RESULTS = (torch.float32, torch.bfloat16)


def _dense(x: Tensor | None) -> Any:
    """The kernels read what lies in one piece; anything else is copied, be it a weight. Nothing in LeRobot is."""
    return None if x is None else x.contiguous()


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """As a product reads them: in the dtype of the weight, or in fp32, which the kernel rounds on the way in."""
    return _dense(x if x.dtype is torch.float32 else x.to(weight.dtype))


def _heads(x: Tensor) -> Tensor:
    """Attention takes any strides but that of the last dimension."""
    return x if x.stride(-1) == 1 else x.contiguous()


def image_prep(frames: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """See ``reference.image_prep``; no frames, and other dtypes than a camera's or a data set's, are torch's affair."""
    if not (frames.numel() and frames.dtype in (torch.uint8, torch.float32) and dtype in _RESULTS):
        return _reference_image_prep.image_prep(frames, height, width, dtype)
    return _image_prep.image_prep(frames, height, width, dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    memory: Memory | None = None,
) -> Tensor:
    """See ``reference.linear``."""
    out = None
    if memory is not None:
        dtype = weight.dtype if residual is None else residual.dtype
        out = memory.empty("linear", (*x.shape[:-1], weight.shape[0]), dtype)
    return kernels.linear(
        _rows(x, weight), _dense(weight), _dense(bias), activation, _dense(residual), out=out
    )


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    memory: Memory | None = None,
) -> Tensor:
    """See ``reference.layer_norm``; from the fp32 residual stream straight to the dtype of the next product."""
    out = _empty(memory, "layer norm", x.shape, x.dtype if dtype is None else dtype)
    return kernels.layer_norm(_dense(x), weight, bias, eps, out.dtype, out=out)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, *, memory: Memory | None = None) -> Tensor:
    """See ``reference.attention``."""
    q, k, v = (_heads(x).view(*x.shape[:2], heads, -1) for x in (q, k, v))
    return kernels.attention(q, k, v, out=_empty(memory, "attention", q.shape, q.dtype)).flatten(2)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
) -> Tensor:
    """See ``reference.masked_attention``; a query narrower than the cross KV is widened to it."""
    if q.dtype is not k.dtype:
        q = _empty(memory, "wide q", q.shape, k.dtype).copy_(q)
    out = _empty(memory, "attention", q.shape, k.dtype)
    return kernels.attention(_heads(q), _heads(k), _heads(v), mask, out=out).flatten(2)


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Memory | None = None,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    q_weight, k_weight, v_weight = weights
    head_dim = 2 * rope[0].shape[-1]
    x = _dense(x)

    def project(weight: Tensor, name: str, slot: Tensor | None = None) -> Tensor:
        """Into the slot where that is one piece of memory, as it is for one sample; else into memory of its own."""
        if slot is None or not slot.is_contiguous() or slot.dtype is not weight.dtype:
            heads = (*x.shape[:-1], weight.shape[0] // head_dim, head_dim)
            slot = _empty(memory, name, heads, weight.dtype)
        kernels.linear(x, _dense(weight), norm=norm, out=slot.flatten(2), memory=memory)
        return slot

    if slots is not None and k_weight is not None and v_weight is not None:
        k_slot, v_slot = slots
        _rotate(project(k_weight, "k", k_slot), *rope, out=k_slot)
        v = project(v_weight, "v", v_slot)
        if v is not v_slot:
            v_slot.copy_(v)
    if q_weight is None:
        return None
    q = project(q_weight, "q")
    return _rotate(q, *rope, out=q)


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, out: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """See ``reference.linear_residual``; returns the dtype of the residual."""
    out = out if out is not None and out.is_contiguous() else None
    return kernels.linear(_rows(x, weight), _dense(weight), residual=_dense(residual), out=out)


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    memory: Memory | None = None,
) -> Tensor:
    """See ``reference.norm_swiglu``."""
    out = _empty(memory, "hidden", (*x.shape[:-1], gate_weight.shape[0]), gate_weight.dtype)
    weights = (_dense(gate_weight), _dense(up_weight))
    return kernels.swiglu(_dense(x), *weights, norm=norm, out=out, memory=memory)


def suffix_embed(
    x: Tensor, step: int, folded: Folded, time_out: tuple[Tensor, Tensor], *, memory: Memory | None = None
) -> Tensor:
    """See ``reference.suffix_embed``; returns fp32."""
    width = folded.weight.shape[0]
    hidden = _empty(memory, "suffix hidden", (*x.shape[:-1], width), folded.weight.dtype)
    kernels.linear(_dense(x.to(folded.weight.dtype)), folded.weight, out=hidden)
    torch.nn.functional.silu(hidden.add_(folded.bias[step]), inplace=True)
    h = _empty(memory, "suffix", hidden.shape, torch.float32)
    weight, bias = time_out
    return kernels.linear(hidden, _dense(weight), _dense(bias), out_dtype=h.dtype, out=h)


def euler_step(
    h: Tensor,
    norm: tuple[Tensor, float],
    action_out: tuple[Tensor, Tensor],
    x: Tensor,
    dt: float,
    guidance: Guidance | None = None,
    *,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.euler_step``."""
    weight, bias = action_out
    v = _empty(memory, "velocity", (*h.shape[:-1], weight.shape[0]), torch.float32)
    operands = (_rows(h, weight), _dense(weight), _dense(bias))
    kernels.linear(*operands, norm=norm, out_dtype=v.dtype, out=v, memory=memory)
    if guidance is not None:
        v = _guide(v, x, guidance.previous, guidance.weights, guidance.time, guidance.weight)
    return torch.add(x, v, alpha=dt, out=_empty(memory, "actions", x.shape, v.dtype)), v
