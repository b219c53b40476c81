"""The op table of one precision tier on one device, and the conversion that it applies to weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model.precision import TIERS, Tier
from ..model.weights import Cast
from ..ops import plan as plans
from ..ops.availability import fallback_reasons
from ..ops.choice import refused
from ..ops.cpu import int16
from ..ops.processor import why_bf16_is_slow
from ..ops.select import select
from .quantized_weights import FLOATS, KINDS, IntegerCast, QuantizedWeights


class Products:
    """Of one model: its chunks and its single layers share one.

    ops                the table of the backend
    quantized_weights  of the tiers that have them
    fallback_reasons   what the tier does without here, with the reasons
    backend            that was asked for
    plan               who computes what, as it was measured on this machine; None: by the defaults; never in tier ``exact``
    gemm_dtype         of the products; None: each in that of its weight
    cast               a matrix in the form that the tier multiplies with; see ``weights.Cast``
    raises             as ``select``
    """

    def __init__(
        self,
        tier: Tier,
        backend: str,
        device: torch.device,
        plan: plans.Plan | None = None,
        quantized_weights: QuantizedWeights | None = None,
    ) -> None:
        self.tier, self.backend, self.device = tier, backend, device
        self.plan = plan = None if tier.stock_order else plan
        self.ops = select(backend, device, tier.stock_order, tier.quantized, plan=plan)
        wished = backend != "auto" or tier.stock_order
        self._fallback_reasons = {} if wished else fallback_reasons(device)
        # Wider products err less, so they serve the narrower tier where they are as fast.
        if tier.quantized == "int16" and (slow := int16.why_slow()) is not None:
            tier = TIERS["fp32"]
            self.ops = select(backend, device, False, plan=plan)
            self._fallback_reasons["int16 products"] = f"{slow}; products run in fp32"
        self.gemm_dtype = tier.gemm_dtype
        if (slow := self._why_wider(plan)) is not None:
            self.gemm_dtype = torch.float32
            self._fallback_reasons["bf16 products"] = f"{slow}; products run in fp32"
        self.quantized_weights = quantized_weights
        self.cast: Cast = self._to_gemm_dtype
        if tier.quantized:
            kind = KINDS[tier.quantized]
            if self.quantized_weights is None:
                self.quantized_weights = QuantizedWeights(tier.gemm_dtype or torch.bfloat16, kind)
            if kind is not FLOATS:
                self.cast = IntegerCast(self.quantized_weights, self._to_gemm_dtype)

    def by(self, plan: plans.Plan | None) -> Products:
        """The same by another plan; quantised copies are shared."""
        return Products(self.tier, self.backend, self.device, plan, self.quantized_weights)

    @property
    def launches_early(self) -> bool:
        """Whether launches may begin before those ahead of them have ended, where kernels can."""
        return self.plan is None or self.plan.choices.get(plans.LAUNCHES) != "in_order"

    @property
    def first_step_beside(self) -> bool:
        """Whether captures may have the first denoise step beside the prefix."""
        return self.plan is None or self.plan.choices.get(plans.FIRST_STEP) != "behind_prefix"

    @property
    def may_widen(self) -> bool:
        """Whether products of this tier may run in fp32 in place of bf16, where that is faster."""
        return self.device.type == "cpu" and self.tier.name not in ("exact", "fp32", "int8", "int16")

    def _why_wider(self, plan: plans.Plan | None) -> str | None:
        measured = None if plan is None else plan.choices.get(plans.PRODUCTS)
        if not self.may_widen or measured == "bfloat16":
            return None
        if measured == "float32":
            return "products of bf16 measured no faster than fp32's on this machine"
        return why_bf16_is_slow()

    def _to_gemm_dtype(self, matrix: Tensor) -> Any:
        quantized = self.quantized_weights
        if quantized is not None and quantized.kind is FLOATS and matrix.ndim == 2:
            return quantized.of(matrix)
        return matrix if self.is_live(matrix) else matrix.to(self.gemm_dtype)

    def is_live(self, matrix: Tensor) -> bool:
        """Whether the tier multiplies with the matrix itself, with no copy of it."""
        return self.quantized_weights is None and self.gemm_dtype in (None, matrix.dtype)

    def cast_cross_kv(self, matrix: Tensor) -> Tensor:
        """For matrices that no tier narrows: the expert's cross K/V, fp32 in LeRobot's bf16 layout."""
        return matrix.float() if self.gemm_dtype is torch.float32 else matrix

    @property
    def cross_kv_dtype(self) -> torch.dtype | None:
        """What cross keys and values are rounded to; None: they keep the dtype of their weights.

        On tensor cores 16-bit attention takes a third of the time of fp32's, and every step attends to them. Prefix and
        suffix are rounded alike.
        """
        return self.gemm_dtype if self.ops.backend == "triton" and self.gemm_dtype is torch.bfloat16 else None

    @property
    def fallback_reasons(self) -> dict[str, str]:
        copies = {} if self.quantized_weights is None else self.quantized_weights.fallback_reasons
        heads = {} if self.ops.heads is None else self.ops.heads.fallback_reasons
        sharp = self.why_too_sharp()
        wide = {} if sharp is None else {self.tier.name: sharp}
        return {**self._fallback_reasons, **copies, **refused(self.ops), **heads, **wide}

    def why_too_sharp(self) -> str | None:
        """Why products of integers cannot keep the tier's promise with the weights as they were last looked at, or None."""
        heads, copies = self.ops.heads, self.quantized_weights
        return None if heads is None or copies is None else heads.why_too_sharp(copies.generation)

    def after_fork(self) -> None:
        if self.quantized_weights is not None:
            self.quantized_weights.renew_lock()
        if self.ops.heads is not None:
            self.ops.heads.renew_lock()
