"""The op table of one precision tier on one device, and the conversion that it applies to weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.precision import Tier
from ..model.weights import Cast
from ..ops.availability import fallback_reasons
from ..ops.plan import Plan
from ..ops.processor import why_bf16_is_slow
from ..ops.select import select
from .quantized_weights import FLOATS, KINDS, IntegerCast, QuantizedWeights


class Products:
    """Of one model: its chunks and its single layers share one.

    ops                the table of the backend, or of the plan
    backend, plan      the wish, and who serves what as measured on this machine; never in the tier ``exact``
    quantized_weights  of the tiers that have them
    fallback_reasons   what the tier does without here, with the reasons
    cast               a matrix in the form that the tier multiplies with; see ``weights.Cast``
    raises             as ``select``
    """

    def __init__(self, tier: Tier, backend: str, device: torch.device, plan: Plan | None = None) -> None:
        self.tier, self.backend, self.device = tier, backend, device
        self.plan = None if tier.stock_order else plan
        self.ops = select(backend, device, tier.stock_order, tier.quantized, plan=self.plan)
        self._gemm_dtype = tier.gemm_dtype
        wished = backend != "auto" or tier.stock_order
        self._fallback_reasons = {} if wished else fallback_reasons(device)
        narrow = tier.name not in ("exact", "fp32", "int8")
        slow = why_bf16_is_slow() if narrow and device.type == "cpu" else None
        if slow is not None:  # wider products err less and are faster, so they serve the narrower tier
            self._gemm_dtype = torch.float32
            self._fallback_reasons["bf16 products"] = f"{slow}; products run in fp32"
        self.quantized_weights: QuantizedWeights | None = None
        self.cast: Cast = self._to_gemm_dtype
        if tier.quantized:
            kind = KINDS[tier.quantized]
            self.quantized_weights = QuantizedWeights(tier.gemm_dtype or torch.bfloat16, kind)
            if kind is not FLOATS:
                self.cast = IntegerCast(self.quantized_weights, self._to_gemm_dtype)

    def _to_gemm_dtype(self, matrix: Tensor) -> Any:
        quantized = self.quantized_weights
        if quantized is not None and quantized.kind is FLOATS and matrix.ndim == 2:
            return quantized.of(matrix)
        return matrix if self.is_live(matrix) else matrix.to(self._gemm_dtype)

    def is_live(self, matrix: Tensor) -> bool:
        """Whether the tier multiplies with the matrix itself, with no copy of it."""
        return self.quantized_weights is None and self._gemm_dtype in (None, matrix.dtype)

    def cast_cross_kv(self, matrix: Tensor) -> Tensor:
        """For matrices that no tier narrows: the expert's cross K/V, fp32 in LeRobot's bf16 layout."""
        return matrix.float() if self._gemm_dtype is torch.float32 else matrix

    @property
    def fallback_reasons(self) -> dict[str, str]:
        copies = {} if self.quantized_weights is None else self.quantized_weights.fallback_reasons
        return {**self._fallback_reasons, **copies}

    def after_fork(self) -> None:
        if self.quantized_weights is not None:
            self.quantized_weights.renew_lock()
