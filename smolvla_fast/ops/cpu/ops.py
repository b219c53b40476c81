"""Backend ``cpu``: the compiled CPU kernels under the signatures of the ops, where they measure faster than torch's own.

Everything not named here is served by the ``torch`` backend. Matrix products of many rows are too: there oneDNN is near
the processor's peak. At the 50 rows of an action chunk it is not, for it first rearranges each weight it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.euler_step import Guidance
from ..reference.guidance import guide
from ..reference.image_prep import image_prep as reference_image_prep
from ..torch import decoder
from ..torch.linear import linear as aten_linear
from ..torch.suffix import Folded
from ..torch.suffix import euler_step as aten_euler_step
from ..torch.suffix import suffix_embed as aten_suffix_embed
from . import kernels as cpu
from .image_prep import image_prep as compiled_image_prep
from .rope import rope
from .workspace import buffer, is_lent

FEW_ROWS = 64
"""Up to this many rows a product goes to the compiled kernel, above it to oneDNN."""

_RESULTS = (torch.float32, torch.bfloat16)


def _few_rows(x: Tensor) -> bool:
    return x.numel() <= FEW_ROWS * x.shape[-1]


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
        return reference_image_prep(frames, height, width, dtype)
    return compiled_image_prep(frames, height, width, dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """See ``reference.linear``.

    oneDNN is ahead on plain products. With an activation, or a residual wider than the weight, its epilogue or the
    separate addition costs more than the difference.
    """
    wider = residual is not None and residual.dtype is not weight.dtype
    if (activation is None and not wider) or (residual is not None and not wider):
        return aten_linear(x, weight, bias, activation, residual)
    return cpu.linear(_rows(x, weight), _dense(weight), _dense(bias), activation, _dense(residual))


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None
) -> Tensor:
    """See ``reference.layer_norm``; from the fp32 residual stream straight to the dtype of the next product."""
    return cpu.layer_norm(_dense(x), weight, bias, eps, dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """See ``reference.attention``."""
    q, k, v = (_heads(x).view(*x.shape[:2], heads, -1) for x in (q, k, v))
    return cpu.attention(q, k, v).flatten(2)


def prepare_mask(mask: Tensor) -> Tensor:
    """The kernel reads the bool mask as it is."""
    return mask


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """See ``reference.masked_attention``; a query narrower than the cross KV is widened to it."""
    if q.dtype is not k.dtype:
        q = buffer("wide q", q.shape, k.dtype).copy_(q)
    out = buffer("attention", q.shape, k.dtype)
    return cpu.attention(_heads(q), _heads(k), _heads(v), mask, out=out).flatten(2)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See ``aten.rms_norm``: from the fp32 residual stream, rounded once to ``dtype``."""
    return cpu.add_rms_norm(_dense(x), None, _dense(weight.to(x.dtype)), eps)[0].to(dtype)


def rotate(x: Tensor, sin: Tensor, cos: Tensor, out: Tensor | None = None) -> Tensor:
    """See ``reference.rope.apply_rope``; into ``out`` where there is one, be it x itself or of another dtype."""
    sin, cos = _dense(sin), _dense(cos)
    if out is not None and (out.dtype is not x.dtype or out.stride(-1) != 1):
        return out.copy_(rope(x, sin, cos))
    return rope(x, sin, cos, out)


def norm_qkv_rope(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    rope: tuple[Tensor, Tensor],
    k_out: Tensor | None,
    v_out: Tensor | None,
    head_dim: int,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``."""
    if not _few_rows(x):
        weights = (q_weight, k_weight, v_weight)
        return decoder.norm_qkv_rope(
            x, norm_weight, eps, *weights, rope, k_out, v_out, head_dim, rms_norm=rms_norm, rotate=rotate
        )
    x = _dense(x)

    def project(weight: Tensor, role: str, slot: Tensor | None = None) -> Tensor:
        """Into the slot where that is one piece of memory, as it is for one sample; else into memory of its own."""
        if slot is None or not slot.is_contiguous() or slot.dtype is not weight.dtype:
            heads = (*x.shape[:-1], weight.shape[0] // head_dim, head_dim)
            slot = buffer(role, heads, weight.dtype)
        cpu.linear(x, _dense(weight), norm=(norm_weight, eps), out=slot.flatten(2))
        return slot

    if k_weight is not None and v_weight is not None and k_out is not None and v_out is not None:
        rotate(project(k_weight, "k", k_out), *rope, out=k_out)
        v = project(v_weight, "v", v_out)
        if v is not v_out:
            v_out.copy_(v)
    if q_weight is None:
        return None
    q = project(q_weight, "q")
    return rotate(q, *rope, out=q)


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See ``reference.linear_residual``; returns the dtype of the residual."""
    if not _few_rows(x):
        return decoder.linear_residual(x, weight, residual)
    residual = _dense(residual)
    in_place = residual if is_lent() else None
    return cpu.linear(_rows(x, weight), _dense(weight), residual=residual, out=in_place)


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """See ``reference.norm_swiglu``."""
    if not _few_rows(x):
        return decoder.norm_swiglu(x, norm_weight, eps, gate_weight, up_weight, rms_norm=rms_norm)
    out = buffer("hidden", (*x.shape[:-1], gate_weight.shape[0]), gate_weight.dtype)
    return cpu.swiglu(_dense(x), _dense(gate_weight), _dense(up_weight), norm=(norm_weight, eps), out=out)


def suffix_embed(
    x: Tensor, step: int, folded: Folded, mlp_out_weight: Tensor, mlp_out_bias: Tensor
) -> Tensor:
    """See ``reference.suffix_embed``; returns fp32."""
    if not _few_rows(x):
        return aten_suffix_embed(x, step, folded, mlp_out_weight, mlp_out_bias)
    width = folded.weight.shape[0]
    hidden = buffer("suffix hidden", (*x.shape[:-1], width), folded.weight.dtype)
    cpu.linear(_dense(x.to(folded.weight.dtype)), folded.weight, out=hidden)
    torch.nn.functional.silu(hidden.add_(folded.bias[step]), inplace=True)
    h = buffer("suffix", hidden.shape, torch.float32)
    return cpu.linear(hidden, _dense(mlp_out_weight), _dense(mlp_out_bias), out_dtype=h.dtype, out=h)


def euler_step(
    h: Tensor,
    norm_weight: Tensor,
    eps: float,
    out_weight: Tensor,
    out_bias: Tensor,
    x: Tensor,
    dt: float,
    guidance: Guidance | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.euler_step``."""
    if not _few_rows(h):
        return aten_euler_step(h, norm_weight, eps, out_weight, out_bias, x, dt, guidance, rms_norm=rms_norm)
    v = buffer("velocity", (*h.shape[:-1], out_weight.shape[0]), torch.float32)
    operands = (_rows(h, out_weight), _dense(out_weight), _dense(out_bias))
    cpu.linear(*operands, norm=(norm_weight, eps), out_dtype=v.dtype, out=v)
    if guidance is not None:
        v = guide(v, x, guidance.previous, guidance.weights, guidance.time, guidance.weight)
    return torch.add(x, v, alpha=dt, out=buffer("actions", x.shape, v.dtype)), v
