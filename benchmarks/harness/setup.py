"""The policy under test, and for each number of cameras and samples an observation with stock's chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.gate import check_chunk, check_report
from smolvla_fast.measure.rounds import as_stock, synchronize


def why_not(variant: str, device: torch.device, backend: str = "auto") -> str | None:
    """Why a tier cannot be served on this device by a backend, or None; None for what is no tier too."""
    from smolvla_fast.model.precision import TIERS
    from smolvla_fast.ops.select import select

    tier = TIERS.get(variant)
    try:
        if tier is not None:
            select(backend, device, tier.stock_order, tier.quantized)
    except RuntimeError as reason:
        return str(reason)
    return None


class Subject:
    """One policy of random weights.

    size    "full" or "tiny"      layout  dtypes of the weights (None: on a CPU "fp32", on a GPU "mixed")
    steps   denoise steps, layers  text and expert layers (None: the configuration's)
    """

    def __init__(
        self,
        device: torch.device,
        *,
        size: str = "full",
        layout: str | None = None,
        steps: int | None = None,
        layers: int | None = None,
    ) -> None:
        from smolvla_fast.testing import policies

        self.layout = layout or ("mixed" if device.type == "cuda" else "fp32")
        self.device, self.size = device, size
        config = {} if layers is None else {"num_vlm_layers": layers}
        self.policy = policies.make_policy(size, cameras=3, layout=self.layout, device=device, **config)
        if steps:
            self.policy.config.num_steps = steps
        self._observations: dict[tuple[int, int], tuple[dict[str, Tensor], Tensor]] = {}
        self._stock: dict[tuple[int, int], Tensor] = {}

    @property
    def group(self) -> str:
        config = self.policy.config
        return (
            f"{self.size} size, {self.device.type}, {self.layout} weights, {config.num_vlm_layers} layers, "
            f"{config.num_steps} steps"
        )

    def observation(self, cameras: int, batch: int = 1) -> dict[str, Tensor]:
        return self._given(cameras, batch)[0]

    def noise(self, batch: int = 1) -> Tensor:
        from smolvla_fast.testing import policies

        return policies.make_noise(self.policy, batch=batch)

    def _given(self, cameras: int, batch: int) -> tuple[dict[str, Tensor], Tensor]:
        from smolvla_fast.testing import policies

        if (cameras, batch) not in self._observations:
            observation = policies.make_observation(self.policy, cameras=cameras, batch=batch)
            self._observations[cameras, batch] = observation, self.noise(batch)
        return self._observations[cameras, batch]

    def queue(self, cameras: int, batch: int = 1) -> Tensor:
        """A chunk without waiting for the device."""
        observation, noise = self._given(cameras, batch)
        return self.policy.predict_action_chunk(dict(observation), noise=noise.clone())

    def chunk(self, cameras: int, batch: int = 1) -> Tensor:
        chunk = self.queue(cameras, batch)
        synchronize(self.device)
        return chunk

    def stock_chunk(self, cameras: int, batch: int = 1) -> Tensor:
        if (cameras, batch) not in self._stock:
            with as_stock(self.policy):
                self._stock[cameras, batch] = self.chunk(cameras, batch)
        return self._stock[cameras, batch]

    def check(self, precision: str, cameras: int, batch: int = 1) -> dict[str, Any]:
        """The gate of a tier, with the policy patched to it. Raises AssertionError where it is red."""
        import smolvla_fast
        from smolvla_fast.verify import FP32_BOUND

        before = smolvla_fast.status(self.policy)
        assert before.active, f"stock runs: {before.last_fallback}"
        chunk = self.chunk(cameras, batch)
        if precision == "exact" or (precision == "fp32" and self.layout == "fp32"):
            bound = 0.0 if precision == "exact" else FP32_BOUND
            found = check_chunk(chunk, self.stock_chunk(cameras, batch), bound)
        else:
            observation, noise = self._given(cameras, batch)
            found = check_report(smolvla_fast.verify(self.policy, observation, noise=noise).to_dict())
            assert torch.isfinite(chunk).all(), "the chunk holds values that are not finite"
        again = self.chunk(cameras, batch)
        assert torch.equal(again, chunk), "a second chunk of the same observation has other bits"
        status = smolvla_fast.status(self.policy)
        assert status.calls_stock == 0, f"stock ran: {status.last_fallback}"
        return {**found, "backend": status.backend}

    def compute_dtype(self, variant: str) -> torch.dtype:
        """The dtype of a variant's large matrix products."""
        from smolvla_fast.model.precision import TIERS

        stored = torch.float32 if self.layout == "fp32" else torch.bfloat16
        tier = TIERS.get(variant)
        return stored if tier is None or tier.gemm_dtype is None else tier.gemm_dtype
