"""Tier ``int8`` on a CPU: matrices of 8-bit integers, and their product: ours on AMX and aarch64, else oneDNN's.

Weights have a scale an output channel and are packed once (``engine/quantized_weights.py``), in two terms where their tails
are heavy. Activations get a scale a row when they are made (``integer_ops.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension, processor
from ..memory import Memory, part
from ..reference.quantize import ZERO, IntegerRows, IntegerWeight, dequantize, quantize_weight
from . import int8_linear, quantize

MAX_LOSS = 0.015
"""The most of its length that a weight may lose to one step a row, before what it loses is kept in a second term. Normal
weights stay below it, Student's t with 3 degrees of freedom does not (``tests/ops/test_cpu_quantize.py``)."""


class Packed(NamedTuple):
    """A weight [O, K] as oneDNN wants it, or as one of our own products does.

    data  opaque, panels of tiles, or [O, K] int8      scale  [O] fp32      zero  [O] int64, zeros
    rest  what these lose, where that is much
    """

    data: Tensor
    scale: Tensor
    zero: Tensor
    shape: torch.Size
    rest: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """Of what a product with it gives."""
        return torch.float32

    @property
    def operand_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def nbytes(self) -> int:
        own = self.shape.numel() + self.scale.nbytes + self.zero.nbytes
        return own if self.rest is None else own + self.rest.nbytes

    @property
    def _integers(self) -> IntegerWeight:
        return IntegerWeight(self.data, self.scale)

    @property
    def _on_tiles(self) -> bool:
        """Whether one product of ours does all of it."""
        return self.rest is None and tiles()

    def linear(
        self,
        x: IntegerRows,
        bias: Tensor | None = None,
        activation: str | None = None,
        residual: Tensor | None = None,
        *,
        out: Tensor | None = None,
        memory: Memory | None = None,
    ) -> Any:
        """With an activation and no residual, rows of 8 bits: the hidden layer of an MLP. Sums of oneDNN are where it puts
        them, which has no say of ``out`` and ``memory``."""
        if self._on_tiles:
            to_rows = activation is not None and residual is None
            where = part(memory, "hidden") if to_rows else memory
            return int8_linear.linear(
                x, self._integers, bias, activation, residual, to_rows=to_rows, out=out, memory=where
            )
        sums = int8_matmul(x, self)
        if activation is not None and residual is None:
            return quantize.finish_rows(sums, x.scale, bias, activation, memory=part(memory, "hidden"))
        return quantize.finish(sums, x.scale, bias, activation, residual)

    def swiglu(self, x: IntegerRows, up_weight: Any, *, memory: Memory | None = None) -> IntegerRows:
        """In rows of 8 bits, for ``down_proj`` is what reads it."""
        if self._on_tiles and up_weight._on_tiles:
            hidden, up_weight = part(memory, "hidden"), up_weight._integers
            return int8_linear.linear(x, self._integers, None, "silu", up_weight=up_weight, memory=hidden)
        gate, up = int8_matmul(x, self), int8_matmul(x, up_weight)
        return quantize.finish_rows(gate, x.scale, None, "silu", up, memory=part(memory, "hidden"))


def pack(weight: Tensor) -> Packed:
    """[O, K] any float dtype -> packed; in two terms, each with its scales, where one loses more than ``MAX_LOSS``."""
    first = quantize_weight(weight)
    lost = weight.float() - dequantize(first)
    packed = pack_integers(first)
    if not lost.norm() > MAX_LOSS * weight.float().norm():  # so written that NaN has one term
        return packed
    return packed._replace(rest=pack_integers(quantize_weight(lost)))


def pack_integers(weight: IntegerWeight) -> Packed:
    """[O, K] -> packed."""
    zero = torch.zeros_like(weight.scale, dtype=torch.int64)
    if tiles():
        return Packed(int8_linear.pack(weight).data, weight.scale, zero, weight.data.shape)
    if ours():
        return Packed(weight.data.contiguous(), weight.scale, zero, weight.data.shape)
    # Without a shape of x, oneDNN chooses a layout that serves any number of rows.
    data = torch.ops.onednn.qlinear_prepack(weight.data.contiguous(), None)
    return Packed(data, weight.scale, zero, weight.data.shape)


class SmoothQuantGroup(NamedTuple):
    """Matrices that read one norm, and the weight and bias of the norm that they are made for, fp32."""

    weight: Tensor
    bias: Tensor | None
    packed: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        norm = self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
        return norm + sum(each.nbytes for each in self.packed)


def why_two_terms(copies: list[Any]) -> str | None:
    """Of ``Packed`` and ``SmoothQuantGroup``: how many weights needed a second term, or None where none did."""
    packed = [
        one for each in copies for one in (each.packed if isinstance(each, SmoothQuantGroup) else [each])
    ]
    twice = sum(each.rest is not None for each in packed)
    if not twice:
        return None
    return (
        f"{twice} of {len(packed)} weights lose more than {100 * MAX_LOSS:g} % to one step a row; "
        "they have a second term, for twice their bytes and time"
    )


def smoothing(norm_weight: Tensor, norm_bias: Tensor | None, readers: list[Tensor]) -> Tensor:
    """[K] fp32: what the norm's channels are divided by, and the columns of its readers multiplied by.

    All values of a row share one step, so a channel far above the others takes the others their digits. How large a channel
    gets is known from the norm's own weight, without data; balancing it against the weights that read it is SmoothQuant's
    rule (arXiv 2211.10438, alpha = 1/2). It costs nothing at run time: the norm multiplies by something in any case.
    """
    size = norm_weight.float().abs() + (0.0 if norm_bias is None else norm_bias.float().abs())
    squares = sum((reader.float().square().sum(0) for reader in readers), torch.zeros_like(size))
    ratio = size / squares.sqrt()
    usable = ratio.isfinite() & (ratio > 0)
    # Relative to the middle one, and bounded: a column of zeros has no say, and no channel may leave fp32.
    middle = ratio[usable].median() if bool(usable.any()) else torch.ones(())
    return torch.where(usable, ratio / middle, 1.0).sqrt().clamp(2.0**-12, 2.0**12)


def pack_group(
    pack: Callable[[Tensor], Any], norm_weight: Tensor, norm_bias: Tensor | None, readers: list[Tensor]
) -> SmoothQuantGroup:
    """See ``smoothing``; the products are the same but for rounding."""
    by = smoothing(norm_weight, norm_bias, readers)
    bias = None if norm_bias is None else norm_bias.float() / by
    return SmoothQuantGroup(
        norm_weight.float() / by, bias, tuple(pack(reader.float() * by) for reader in readers)
    )


def int8_matmul(x: IntegerRows, weight: Packed) -> Tensor:
    """[..., K], [O, K] -> [..., O] fp32: sums in 32 bits, times the scale of the output channel, rounded once a term.

    With AMX oneDNN rounds the sums of unsigned bytes to fp32 before it takes 128 times the weights off: 2^-24 of these.
    """
    found = _one_term(x, weight)
    return found if weight.rest is None else found.add_(_one_term(x, weight.rest))


@cache
def tiles() -> bool:
    """Whether the product is our kernel for AMX, which finishes sums while they are in cache."""
    return int8_linear.serves()


@cache
def ours() -> bool:
    """Whether the product is our own kernel: on aarch64, from the level with dot products on."""
    return extension.available("cpu") and "neon_dotprod" in extension.load("cpu").levels()


def _one_term(x: IntegerRows, weight: Packed) -> Tensor:
    if tiles():
        return int8_linear.matmul(x, weight._integers)
    if ours():
        return quantize.int8_matmul(x, weight._integers)
    return torch.ops.onednn.qlinear_pointwise(
        x.data, 1.0, ZERO, weight.data, weight.scale, weight.zero, None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


CHECKED = 64
"""Inputs of the product that decides whether sums are exact: pairs of the largest values overflow 16 bits at two."""


@cache
def _sums_are_exact() -> bool:
    data = torch.full((2, CHECKED), 255, dtype=torch.uint8, device="cpu")
    integers = torch.full((16, CHECKED), 127, dtype=torch.int8, device="cpu")
    ones = torch.ones(16, dtype=torch.float32, device="cpu")
    found = int8_matmul(IntegerRows(data, ones[:2]), pack_integers(IntegerWeight(integers, ones)))
    return bool((found == CHECKED * 127 * 127).all())


VNNI = ("AVX512-VNNI", "AVX-VNNI", "AMX-INT8")


def why_not(device: torch.device) -> str | None:
    """Why integers of 8 bits cannot be multiplied quickly and exactly on this device, or None."""
    if device.type != "cpu":
        return f"its products are oneDNN's for CPUs, the policy is on {device}"
    missing = extension.why_missing("cpu")
    if missing or ours():
        return missing or None
    namespace = torch.ops.onednn
    if not (torch.backends.mkldnn.is_available() and hasattr(namespace, "qlinear_pointwise")):
        return f"torch {torch.__version__} was built without oneDNN's integer product; the builds of PyPI have it"
    if processor.is_known() and not any(name in processor.features() for name in VNNI):
        # u8·s8 pairs are added in 16 bits there, and saturate; what avoids it is no faster than fp32.
        by = f" (ONEDNN_MAX_CPU_ISA={processor.limit()})" if processor.limit() else ""
        return f"this processor multiplies no 8-bit integers{by}; accepted are {', '.join(VNNI)}, and dot product on ARM"
    try:
        exact = _sums_are_exact()
    except RuntimeError as error:
        return f"oneDNN refuses the product here: {str(error).splitlines()[0]}"
    if not exact:
        return "oneDNN's integer sums saturate here; accepted is VNNI"
    return None
