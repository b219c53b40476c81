"""The tiers: in which dtype the large matrix products of a chunk run, and what that may cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tier:
    """One named precision.

    gemm_dtype   dtype of the weights of vision, text and expert layers in their matrix products; None means each as it
                 is stored. A matrix stored in another dtype is converted in every chunk; no copy is kept.
    quantized    "e4m3", "int8" or "int16": matrices are 8-bit floats or integers with a scale a row, in copies that are
                 checked at every chunk, and so are the activations that meet them; all else is in gemm_dtype then
    cosine       how near a chunk has to come to fp32's, where the tier is quantized
    stock_order  run stock's ATen calls in stock's order, batch by batch and camera by camera: equal bits

    In every tier but ``exact`` the residual stream, norm statistics, softmax and accumulation are fp32. The projections
    of state, action and time and the expert's cross K/V keep the dtype they are stored in; on backend ``triton``, bf16 and
    fp8 round what those of the cross K/V give to bf16, as other keys and values are.
    """

    name: str
    gemm_dtype: torch.dtype | None
    quantized: str | None = None
    cosine: float | None = None
    stock_order: bool = False


TIERS = {
    tier.name: tier
    for tier in (
        Tier("exact", gemm_dtype=None, stock_order=True),
        Tier("fp32", gemm_dtype=torch.float32),
        Tier("bf16", gemm_dtype=torch.bfloat16),
        Tier("fp8", gemm_dtype=torch.bfloat16, quantized="e4m3", cosine=0.99),
        Tier("int8", gemm_dtype=torch.float32, quantized="int8", cosine=0.999),
        Tier("int16", gemm_dtype=torch.float32, quantized="int16", cosine=0.9999),
    )
}


def resolve_tier(precision: str, stored: torch.dtype) -> Tier:
    """The tier for a wish. ``auto`` runs every product in the dtype its weight is stored in, hence never in less.

    stored   dtype of the text layers' weights, after which ``auto`` is named
    raises   ValueError naming the accepted values
    """
    if precision == "auto":
        return replace(TIERS["bf16" if stored is torch.bfloat16 else "fp32"], gemm_dtype=None)
    if not isinstance(precision, str) or precision not in TIERS:
        accepted = ", ".join(repr(name) for name in ("auto", *TIERS))
        raise ValueError(f"precision={precision!r} is not a tier; accepted are {accepted}")
    return TIERS[precision]
