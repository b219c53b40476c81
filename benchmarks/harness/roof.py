"""The machine's best in the dtypes that a tier's products may have: fp32, bf16 and 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.machine import Ceilings, best_seconds, gemm_side, measure_ceilings

CPU = torch.device("cpu")
WIDTHS = {"stock": 4, "fp32": 4, "bf16": 2, "int8": 1}
"""Bytes of a weight in the products of a tier; any other tier's are those of fp32."""
OF_WIDTH = {4: torch.float32, 2: torch.bfloat16, 1: torch.int8}


@dataclass(frozen=True)
class Roofs:
    """The best rates of this machine by dtype; int8 is missing where torch has no such product here."""

    ceilings: Ceilings

    def itemsize(self, precision: str) -> int:
        return WIDTHS.get(precision, 4)

    def best(self, precision: str) -> float:
        """Operations a second of the fastest product that is no narrower than the tier's."""
        return self.ceilings.best(OF_WIDTH[self.itemsize(precision)])

    def floor_ms(self, flops: float, bytes_: float, precision: str) -> float:
        """The least time for so much work: whichever of arithmetic and memory takes longer."""
        return self.ceilings.floor_ms(flops, bytes_, OF_WIDTH[self.itemsize(precision)])

    def to_dict(self) -> dict[str, Any]:
        return self.ceilings.to_dict()


def measure_roofs(small: bool = False) -> Roofs:
    """``small`` as in ``measure_ceilings``."""
    found = measure_ceilings(CPU, small)
    int8 = _int8(gemm_side(CPU, small))
    return Roofs(found if int8 is None else Ceilings({**found.flops, torch.int8: int8}, found.bytes))


def _int8(side: int) -> float | None:
    """uint8 activations by a prepacked int8 weight, as oneDNN multiplies them fastest; None where torch cannot."""
    x = torch.randint(0, 255, (side, side), dtype=torch.uint8)
    weight = torch.randint(-127, 127, (side, side), dtype=torch.int8)
    scales, zeros = torch.ones(side), torch.zeros(side, dtype=torch.int32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, [side, side])

        def product() -> Any:
            return torch.ops.onednn.qlinear_pointwise(
                x, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )

        return 2.0 * side**3 / best_seconds(product, CPU)
    except (AttributeError, RuntimeError):
        return None
