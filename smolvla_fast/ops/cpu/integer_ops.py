"""Tiers ``int8`` and ``int16``: the ops of backend ``cpu`` where matrices are integers (``int8.py``, ``int16.py``).

Activations become integers where a product reads them: behind a norm in the pass that computes it, in 8 bits behind an
activation too. What is no such matrix goes to backend ``cpu``: norms and softmax are fp32 as ever, and so is the connector,
whose rows of 12288 lose the most to one scale and take the least of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import Memory
from ..memory import part as _part
from ..reference.quantize import KINDS, IntegerRows
from . import int8, int16, quantize
from . import ops as cpu
from .rope import rotate as _rotate

Weight = Tensor | int8.Packed | int16.Packed
Rows = Tensor | IntegerRows
Next = Any
"""What the next product reads: ``Rows``. The table of ops knows tensors alone, and stages hand these on unseen."""
PACKED = (int8.Packed, int16.Packed)


def _rows(x: Rows, weight: int8.Packed | int16.Packed, memory: Memory | None = None) -> IntegerRows:
    if isinstance(x, IntegerRows):
        return x
    return quantize.quantize_rows(x.contiguous(), weight.operand_dtype, memory=memory)


def _plain(weight: Weight | None) -> Tensor | None:
    assert weight is None or isinstance(weight, Tensor), "the matrices that read one norm are of one kind"
    return weight


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    memory: Memory | None = None,
) -> Next:
    """See ``reference.layer_norm``; for the dtype of integers straight to the rows of the next product."""
    if dtype in KINDS:
        return quantize.layer_norm_rows(x.contiguous(), weight, bias, eps, dtype, memory=memory)
    return cpu.layer_norm(x, weight, bias, eps, dtype, memory=memory)


def linear(
    x: Rows,
    weight: Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    memory: Memory | None = None,
) -> Next:
    """See ``reference.linear``."""
    if isinstance(weight, PACKED):
        return weight.linear(_rows(x, weight, memory), bias, activation, residual, memory=memory)
    assert isinstance(x, Tensor), "rows of integers meet weights of integers"
    return cpu.linear(x, weight, bias, activation, residual, memory=memory)


def norm_qkv_rope(
    x: Tensor,
    norm: tuple[Tensor, float],
    weights: tuple[Weight | None, Weight | None, Weight | None],
    rope: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor] | None,
    *,
    memory: Memory | None = None,
) -> Tensor | None:
    """See ``reference.norm_qkv_rope``; one quantised x for all three."""
    packed = next((weight for weight in weights if isinstance(weight, PACKED)), None)
    if packed is None:
        q, k, v = (_plain(weight) for weight in weights)
        return cpu.norm_qkv_rope(x, norm, (q, k, v), rope, slots, memory=memory)
    rows = quantize.rms_norm_rows(x.contiguous(), *norm, packed.operand_dtype, memory=memory)

    def project(weight: Weight, name: str) -> Tensor:
        assert isinstance(weight, PACKED), "q, k and v of a layer are of one kind"
        y = weight.linear(rows, memory=_part(memory, name))
        return y.view(*x.shape[:-1], -1, 2 * rope[0].shape[-1])

    q_weight, k_weight, v_weight = weights
    if slots is not None and k_weight is not None and v_weight is not None:
        _rotate(project(k_weight, "k"), *rope, out=slots[0])
        slots[1].copy_(project(v_weight, "v"))
    if q_weight is None:
        return None
    q = project(q_weight, "q")
    return _rotate(q, *rope, out=q)


def linear_residual(
    x: Rows, weight: Weight, residual: Tensor, *, out: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """See ``reference.linear_residual``."""
    if isinstance(weight, PACKED):
        out = out if out is not None and out.is_contiguous() else None
        rows = _rows(x, weight, _part(memory, "x"))
        return weight.linear(rows, residual=residual.contiguous(), out=out)
    assert isinstance(x, Tensor), "rows of integers meet weights of integers"
    return cpu.linear_residual(x, weight, residual, out=out)


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Weight,
    up_weight: Weight,
    *,
    memory: Memory | None = None,
) -> Next:
    """See ``reference.norm_swiglu``."""
    if isinstance(gate_weight, PACKED):
        rows = quantize.rms_norm_rows(x.contiguous(), *norm, gate_weight.operand_dtype, memory=memory)
        packed: Any = gate_weight  # both are of one kind
        return packed.swiglu(rows, up_weight, memory=memory)
    gate, up = _plain(gate_weight), _plain(up_weight)
    assert gate is not None and up is not None
    return cpu.norm_swiglu(x, norm, gate, up, memory=memory)
