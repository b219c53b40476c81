"""The gates: what a tier or a peer has to show before it is timed. Nothing red gets a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from benchmarks.harness.gate import COMPILED_BOUND, Red
from benchmarks.harness.variants import Contestant, chunk
from smolvla_fast.measure.rounds import error
from smolvla_fast.verify import FP32_BOUND, cosine

LOSS_OF_STOCK = 2.0
"""A bf16 chunk may lose this many times what stock run in bf16 loses against fp32. Two orders of the same roundings
scatter against each other; a mask or a scale that is wrong loses ten times as much and more."""
COSINE = 0.999
"""The least cosine of an 8-bit chunk to stock's in fp32: the error is then below 4.5 % of the chunk's length."""


def check_all(
    contestant: Contestant, chunks: list[Tensor], stock: list[Tensor], inputs: list[Any], lost: float | None
) -> None:
    """Notes errors against stock on every observation and turns red what is wrong.

    chunks, stock  of the contestant and of stock on each of ``inputs``
    lost           relative L2 of stock run in bf16 to stock in fp32, on the first of them
    """
    facts = contestant.facts
    try:
        for found in chunks:
            if not torch.isfinite(found).all():
                raise Red("the chunk holds values that are not finite")
        errors = [error(found, want) for found, want in zip(chunks, stock, strict=True)]
        facts.update({name: max(each[name] for each in errors) for name in errors[0]})
        facts["cosine"] = min(cosine(found, want) for found, want in zip(chunks, stock, strict=True))
        again = chunk(contestant.policy, inputs[0])
        if contestant.kind == "tier":
            if not torch.equal(again, chunks[0]):
                raise Red("a second chunk of the same observation has other bits")
            _check_status(contestant)
        _check_bound(contestant, errors, lost)
    except Red as reason:
        contestant.red = str(reason)


def _check_status(contestant: Contestant) -> None:
    status = smolvla_fast.status(contestant.policy)
    if status.calls_stock:
        raise Red(f"stock ran in its place: {status.last_fallback}")
    contestant.facts.update(
        backend=status.backend,
        stage_backends=status.stages,
        passed_over=status.passed_over,
        extra_bytes=status.extra_bytes,
    )


def _check_bound(contestant: Contestant, errors: list[dict[str, float]], lost: float | None) -> None:
    facts, precision = contestant.facts, contestant.precision
    if precision == "bf16":
        if lost is None:
            raise Red("stock could not be run in bf16, so there is nothing to compare with")
        facts["stock_bf16_rel_l2"] = lost
        # On the observation that stock was run on in bf16.
        facts["rel_l2_to_stock_bf16"] = errors[0]["rel_l2"] / lost
        facts["gate"] = (
            f"{facts['rel_l2_to_stock_bf16']:.2f} of bf16 stock's error, allowed {LOSS_OF_STOCK:g}"
        )
        if facts["rel_l2_to_stock_bf16"] > LOSS_OF_STOCK:
            raise Red(facts["gate"])
        return
    if precision in ("stock", "fp32"):
        # A compiler may reorder every sum and replace every function; our own order is known.
        bound = {"stock": 0.0, "tier": FP32_BOUND, "peer": COMPILED_BOUND["fp32"]}[contestant.kind]
        facts["gate"] = f"rel L2 {facts['rel_l2']:.1e}, allowed {bound:.0e}" if bound else "equal bits"
        if facts["rel_l2"] > bound:
            raise Red(f"rel L2 {facts['rel_l2']:.1e}, allowed {bound:.0e}")
        return
    facts["gate"] = f"cosine {facts['cosine']:.5f}, at least {COSINE}"
    if facts["cosine"] < COSINE:
        raise Red(facts["gate"])


def check_heavy(contestant: Contestant, found: Tensor, stock: Tensor) -> None:
    """The same on heavy-tailed weights. An 8-bit tier has to hold its cosine there too; of the others it is a fact."""
    facts = contestant.facts
    facts["heavy_cosine"], facts["heavy_rel_l2"] = cosine(found, stock), error(found, stock)["rel_l2"]
    if contestant.precision not in ("stock", "fp32", "bf16") and not facts["heavy_cosine"] >= COSINE:
        contestant.red = f"cosine {facts['heavy_cosine']:.5f} on heavy-tailed weights, at least {COSINE}"


def check_point(precision: str, found: Tensor, stock: Tensor) -> dict[str, float]:
    """One point of the scaling curves against stock. Raises Red; bf16 is held to the cosine of 8 bits, looser than its own
    gate, for stock is not run in bf16 at every point."""
    facts = {**error(found, stock), "cosine": cosine(found, stock)}
    if precision == "fp32" and not facts["rel_l2"] <= FP32_BOUND:
        raise Red(f"rel L2 {facts['rel_l2']:.1e}, allowed {FP32_BOUND:.0e}")
    if not facts["cosine"] >= COSINE:
        raise Red(f"cosine {facts['cosine']:.5f}, at least {COSINE}")
    return facts


def loss_of_bf16_stock(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> float:
    """Relative L2 of stock run in bf16 to stock in fp32. policy  patched to ``bf16``"""
    observation, noise = inputs
    return smolvla_fast.verify(policy, observation, noise=noise).stock_rel_l2
