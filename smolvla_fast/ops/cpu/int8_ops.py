"""Tier ``int8``: the ops of backend ``cpu`` where the matrices of a chunk are integers of 8 bits (``int8.py``).

Activations become integers when they are made: behind a norm, or behind an activation, in the pass that computes them.
What is no such matrix goes to backend ``cpu``: attention, norms and softmax are fp32 as ever, and so is the connector, whose
rows of 12288 lose the most to one scale and take the least of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import Memory
from ..reference.quantize import IntegerRows
from . import ops as cpu
from . import quantize
from .int8 import Packed
from .int8 import int8_matmul as _int8_matmul
from .rope import rotate as _rotate

Weight = Tensor | Packed
Rows = Tensor | IntegerRows
Next = Any
"""What the next product reads: ``Rows``. The table of ops knows tensors alone, and stages hand these on unseen."""


def _rows(x: Rows) -> IntegerRows:
    return x if isinstance(x, IntegerRows) else quantize.quantize_rows(x.contiguous())


def _plain(weight: Weight | None) -> Tensor | None:
    assert weight is None or isinstance(weight, Tensor), "q, k and v of a layer are of one kind"
    return weight


def _project(x: IntegerRows, weight: Packed) -> Tensor:
    return quantize.finish(_int8_matmul(x, weight), x.scale)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None = None,
    *,
    memory: Memory | None = None,
) -> Next:
    """See ``reference.layer_norm``; for ``dtype`` uint8 straight to the rows of the next product."""
    if dtype is torch.uint8:
        return quantize.layer_norm_rows(x.contiguous(), weight, bias, eps)
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
    """See ``reference.linear``; with an activation and no residual, rows of 8 bits: the hidden layer of an MLP."""
    if not isinstance(weight, Packed):
        assert isinstance(x, Tensor), "rows of integers meet weights of integers"
        return cpu.linear(x, weight, bias, activation, residual, memory=memory)
    rows = _rows(x)
    if activation is not None and residual is None:
        return quantize.finish_rows(_int8_matmul(rows, weight), rows.scale, bias, activation)
    return quantize.finish(_int8_matmul(rows, weight), rows.scale, bias, activation, residual)


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
    if not any(isinstance(weight, Packed) for weight in weights):
        q, k, v = (_plain(weight) for weight in weights)
        return cpu.norm_qkv_rope(x, norm, (q, k, v), rope, slots, memory=memory)
    rows = quantize.rms_norm_rows(x.contiguous(), *norm)

    def project(weight: Weight) -> Tensor:
        assert isinstance(weight, Packed), "q, k and v of a layer are of one kind"
        return _project(rows, weight).view(*x.shape[:-1], -1, 2 * rope[0].shape[-1])

    q_weight, k_weight, v_weight = weights
    if slots is not None and k_weight is not None and v_weight is not None:
        _rotate(project(k_weight), *rope, out=slots[0])
        slots[1].copy_(project(v_weight))
    if q_weight is None:
        return None
    q = project(q_weight)
    return _rotate(q, *rope, out=q)


def linear_residual(x: Rows, weight: Weight, residual: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See ``reference.linear_residual``."""
    if not isinstance(weight, Packed):
        assert isinstance(x, Tensor), "rows of integers meet weights of integers"
        return cpu.linear_residual(x, weight, residual, out=out)
    rows = _rows(x)
    return quantize.finish(_int8_matmul(rows, weight), rows.scale, residual=residual.contiguous())


def norm_swiglu(
    x: Tensor,
    norm: tuple[Tensor, float],
    gate_weight: Weight,
    up_weight: Weight,
    *,
    memory: Memory | None = None,
) -> Next:
    """See ``reference.norm_swiglu``; the result in rows of 8 bits, for ``down_proj`` is what reads it."""
    if not (isinstance(gate_weight, Packed) and isinstance(up_weight, Packed)):
        assert isinstance(gate_weight, Tensor) and isinstance(up_weight, Tensor), (
            "gate and up are of one kind"
        )
        return cpu.norm_swiglu(x, norm, gate_weight, up_weight, memory=memory)
    rows = quantize.rms_norm_rows(x.contiguous(), *norm)
    gate, up = _int8_matmul(rows, gate_weight), _int8_matmul(rows, up_weight)
    return quantize.finish_rows(gate, rows.scale, None, "silu", up)
