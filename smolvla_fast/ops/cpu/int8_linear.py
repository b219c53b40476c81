"""Products of rows of bytes on AMX tiles, finished while their sums are in cache; checked here as in ``kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import extension
from ..memory import Memory, empty
from ..reference.quantize import IntegerRows, IntegerWeight
from .kernels import ACTIVATIONS
from .operands import check_contiguous, check_one
from .quantize import MOST_INPUTS, _address, _check_fp32, _rows

PANEL = 32
"""Outputs that are packed side by side."""


def serves() -> bool:
    """Whether the kernel runs at the level in use: it needs AMX."""
    return extension.available("cpu") and extension.load("cpu").integer_level() == "amx"


def pack(weight: IntegerWeight) -> IntegerWeight:
    """[O, K] -> data [panels, bytes of a panel] as tiles read it, and the scale."""
    outputs, inputs = weight.data.shape
    if not 0 < inputs < MOST_INPUTS:
        raise ValueError(
            f"int8 linear: weight has shape [{outputs}, {inputs}]; accepted is [O, K], 0 < K < 2^17"
        )
    check_one("int8 linear", "weight", weight.data, torch.int8, "this kernel", weight.data.shape)
    kernels, data = extension.load("cpu"), weight.data.contiguous()
    panels = torch.empty(
        -(-outputs // PANEL), int(kernels.int8_panel_bytes(inputs)), dtype=torch.int8, device="cpu"
    )
    kernels.pack_int8_panels(data.data_ptr(), panels.data_ptr(), outputs, inputs)
    return IntegerWeight(panels, weight.scale)


def linear(
    x: IntegerRows,
    weight: IntegerWeight,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    up_weight: IntegerWeight | None = None,
    to_rows: bool = False,
    out: Tensor | None = None,
    memory: Memory | None = None,
) -> Any:
    """``y = residual + act(x·weightᵀ + bias)``, or ``act(x·weightᵀ) · (x·up_weightᵀ)``; x and weights are scaled integers.

    x          data [..., K] uint8, contiguous, scale [...] fp32      weight, up_weight  [O, K] by ``pack``, O by its scale
    bias       [O] fp32      residual  [..., O] fp32, not with to_rows      activation  None | "silu" | "gelu_tanh"
    to_rows    whether the result is rows of 8 bits for the next product; always so with up_weight
    out        where to write what is fp32; may be ``residual`` itself      memory  where the rest is kept
    returns    [..., O] fp32, or ``IntegerRows``
    numerics   those of ``quantize.int8_matmul`` and ``finish`` or ``finish_rows``, to the bit
    errors     as ``kernels.rms_norm``; ValueError for another activation
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"int8 linear: unknown activation {activation!r}; accepted are None, 'silu', 'gelu_tanh'"
        )
    outputs, to_rows, kernels = len(weight.scale), to_rows or up_weight is not None, extension.load("cpu")
    shape, count = (*x.scale.shape, outputs), x.scale.numel()
    for name, tensor, wanted in (
        ("scale", x.scale, x.data.shape[:-1]),
        ("bias", bias, (outputs,)),
        ("residual", residual, shape),
        ("out", out, shape),
    ):
        if tensor is not None:
            _check_fp32("int8 linear", name, tensor, wanted)
    rows = _rows(memory, shape, torch.uint8) if to_rows else None
    sums, up_sums = out, None
    fits = int(kernels.int8_rows_fit(count, torch.get_num_threads()))
    in_place = out is not None and residual is not None and out.data_ptr() == residual.data_ptr()
    if (rows is None and out is None) or (not fits and (out is None or in_place)):
        sums = empty(memory, "linear", shape, torch.float32)
    if up_weight is not None and not fits:
        up_sums = empty(memory, "up", shape, torch.float32)
    _run(x, x.scale, weight, up_weight, bias, residual, sums, up_sums, rows, ACTIVATIONS[activation])
    if rows is not None:
        return rows
    return sums if sums is None or out is None or sums is out else out.copy_(sums)


def matmul(x: IntegerRows, weight: IntegerWeight) -> Tensor:
    """As ``quantize.int8_matmul``."""
    sums = torch.empty(*x.scale.shape, len(weight.scale), dtype=torch.float32, device="cpu")
    _run(x, None, weight, None, None, None, sums, None, None, ACTIVATIONS[None])
    return sums


def _run(
    x: IntegerRows,
    scale: Tensor | None,
    weight: IntegerWeight,
    up_weight: IntegerWeight | None,
    bias: Tensor | None,
    residual: Tensor | None,
    sums: Tensor | None,
    up_sums: Tensor | None,
    rows: IntegerRows | None,
    activation: int,
) -> None:
    kernels, inputs, outputs = extension.load("cpu"), x.data.shape[-1], len(weight.scale)
    check_one("int8 linear", "data", x.data, torch.uint8, "this kernel", x.data.shape)
    check_contiguous("int8 linear", "data", x.data)
    for each in (weight, up_weight):
        if each is not None:
            _check_fp32("int8 linear", "scale of the weight", each.scale, (outputs,))
            panels = (-(-outputs // PANEL), int(kernels.int8_panel_bytes(inputs)))
            check_one("int8 linear", "packed weight", each.data, torch.int8, "this kernel", panels)
    if not x.scale.numel():
        return
    up, out = up_weight or IntegerWeight(None, None), rows or IntegerRows(None, None)  # type: ignore[arg-type]
    operands = (
        x.data,
        scale,
        weight.data,
        up.data,
        weight.scale,
        up.scale,
        bias,
        residual,
        sums,
        up_sums,
        *out,
    )
    kernels.int8_linear(
        *map(_address, operands), x.scale.numel(), inputs, outputs, activation, torch.get_num_threads()
    )
