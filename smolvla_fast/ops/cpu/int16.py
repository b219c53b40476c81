"""Tier ``int16`` on a CPU: matrices of 16-bit integers and their product, ours, on any x86 with AVX2.

An instruction multiplies twice as many numbers of 16 bits as of fp32, and 192 products of two such add up in 32 bits without
rounding: a product loses less than half of what bf16 does, and needs no instruction for bf16.
"""

from __future__ import annotations

import time
from functools import cache
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import extension
from ..memory import Memory, empty, part
from ..reference.quantize import WORDS, IntegerRows, IntegerWeight, quantize_weight
from . import quantize
from .kernels import ACTIVATIONS
from .operands import check_apart, check_contiguous, check_one

PANEL = 32
"""Outputs of a panel, ``kInt16Panel`` of csrc/cpu/int16_linear.h."""


class Packed(NamedTuple):
    """A weight [O, K] in panels: word w of an output are its inputs 2w and 2w + 1.

    data  [panels, words, PANEL, 2] int16, zeros beyond O and K      scale  [O] fp32      shape  [O, K]
    """

    data: Tensor
    scale: Tensor
    shape: torch.Size

    @property
    def dtype(self) -> torch.dtype:
        """Of what a product with it gives."""
        return torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        return WORDS.activations

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def linear(
        self,
        x: IntegerRows,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        *,
        out: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Into ``out``, or what ``memory`` has for it."""
        if out is None and memory is not None:
            out = memory.empty("linear", (*x.scale.shape, self.shape[0]), self.dtype)
        return linear(x, self, bias, activation, residual, out=out)

    def swiglu(self, x: IntegerRows, up_weight: Packed, *, memory: Memory | None = None) -> IntegerRows:
        """In rows of 16 bits, for ``down_proj`` is what reads it."""
        hidden = empty(memory, "hidden", (*x.scale.shape, self.shape[0]), self.dtype)
        linear(x, self, activation="silu", up_weight=up_weight, out=hidden)
        return quantize.quantize_rows(hidden, self.operand_dtype, memory=part(memory, "hidden"))


def pack(weight: Tensor) -> Packed:
    """[O, K] any float dtype -> panels of its rows in 16 bits (``reference.quantize.quantize_weight``)."""
    return pack_integers(quantize_weight(weight, WORDS))


def pack_integers(weight: IntegerWeight) -> Packed:
    """[O, K] -> packed."""
    outputs, inputs = weight.data.shape
    data = F.pad(weight.data, (0, inputs % 2, 0, -outputs % PANEL))
    data = data.view(-1, PANEL, data.shape[1] // 2, 2).transpose(1, 2).contiguous()
    return Packed(data, weight.scale, weight.data.shape)


def linear(
    x: IntegerRows,
    weight: Packed,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    *,
    up_weight: Packed | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``y = residual + act(x·weightᵀ + bias)``, or ``act(x·weightᵀ) · (x·up_weightᵀ)``; x and weights are scaled integers.

    x          data [..., K + K % 2] int16, scale [...] fp32: ``quantize.quantize_rows`` and the like
    bias       [O] fp32      residual  [..., O] fp32      activation  None | "silu" | "gelu_tanh"
    out        where to write, [..., O] fp32; may be ``residual`` itself, else overlapping no input
    returns    [..., O] fp32
    numerics   sums over 192 inputs are exact, the rest is fp32; equal bits at every instruction level, for any number of
               threads and of rows
    errors     as ``kernels.rms_norm``; ValueError for another activation
    replaces   as ``kernels.linear`` and ``kernels.swiglu``
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"int16 linear: unknown activation {activation!r}; accepted are None, 'silu', 'gelu_tanh'"
        )
    outputs, inputs = weight.shape
    if not inputs:
        raise ValueError(
            f"int16 linear: weight has shape {list(weight.shape)}; accepted is [O, K], K at least 1"
        )
    words = -(-inputs // 2)
    up = (None, None) if up_weight is None else up_weight[:2]
    shape = (*x.scale.shape, outputs)
    panels = (-(-outputs // PANEL), words, PANEL, 2)
    if up_weight is not None and (bias is not None or residual is not None):
        raise ValueError("int16 linear: up_weight goes with neither bias nor residual")
    for name, tensor, dtype, wanted in (
        ("data", x.data, torch.int16, (*x.scale.shape, 2 * words)),
        ("scale", x.scale, torch.float32, x.scale.shape),
        ("weight", weight.data, torch.int16, panels),
        ("weight's scale", weight.scale, torch.float32, (outputs,)),
        ("up_weight", up[0], torch.int16, panels),
        ("up_weight's scale", up[1], torch.float32, (outputs,)),
        ("bias", bias, torch.float32, (outputs,)),
        ("residual", residual, torch.float32, shape),
        ("out", out, torch.float32, shape),
    ):
        if tensor is not None:
            check_one("int16 linear", name, tensor, dtype, "this kernel", wanted)
            check_contiguous("int16 linear", name, tensor)
            if tensor.data_ptr() % 4:
                raise ValueError(f"int16 linear: {name} begins in the middle of a word; call .clone() first")
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
    else:
        in_place = residual is not None and out.data_ptr() == residual.data_ptr()
        check_apart("int16 linear", out, [*x, *weight[:2], *up, bias, None if in_place else residual])
    if out.numel():
        operands = (*x, *weight[:2], *up, bias, residual, out)
        addresses = (0 if each is None else each.data_ptr() for each in operands)
        extension.load("cpu").int16_linear(
            *addresses, x.scale.numel(), words, outputs, ACTIVATIONS[activation], torch.get_num_threads()
        )
    return out


def why_not(device: torch.device) -> str | None:
    """Why there is no product of 16-bit integers on this device, or None."""
    if device.type != "cpu":
        return f"its product is a CPU kernel, the policy is on {device}"
    return extension.why_missing("cpu") or None


ROWS, INPUTS, OUTPUTS, ROUNDS = 48, 960, 320, 9
"""Of the product that is timed."""
MARGIN = 0.9
"""Share of fp32's time from which on integers are taken: less would not pay for their copies."""


@cache
def why_slow() -> str | None:
    """Why products of 16 bits are left in fp32 on this machine, or None where they measured ahead: by the middle one of the
    ratios of rounds in turn, on one thread, which other work disturbs least. Once a process."""
    kernels, cpu = extension.load("cpu"), torch.device("cpu")
    x, matrix = (torch.ones(n, INPUTS, dtype=torch.float32, device=cpu) for n in (ROWS, OUTPUTS))
    y = torch.empty(ROWS, OUTPUTS, dtype=torch.float32, device=cpu)
    rows, packed = quantize.quantize_rows(x, WORDS.activations), pack(matrix)
    integers = [each.data_ptr() for each in (*rows, *packed[:2])]
    ratios = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        kernels.int16_linear(*integers, 0, 0, 0, 0, y.data_ptr(), ROWS, INPUTS // 2, OUTPUTS, 0, 1)
        between = time.perf_counter()
        kernels.linear_float32_float32_float32(
            x.data_ptr(), 0, matrix.data_ptr(), 0, 0, 0, y.data_ptr(), ROWS, INPUTS, OUTPUTS, 0, 0.0, 1
        )
        ratios.append((between - start) / (time.perf_counter() - between))
    if median(ratios[1:]) <= MARGIN:  # the first warms up
        return None
    return "products of 16-bit integers measured no faster than fp32's on this machine"
