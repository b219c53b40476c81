"""No speed without a check: what a variant must show before it is timed. What fails gets no number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.measure.rounds import error
from smolvla_fast.model.precision import TIERS
from smolvla_fast.verify import FP32_BOUND, cosine

# The compiler may reorder every sum. fp32: 1e-4 is far above what that can do, far below a wrong mask;
# mixed: bf16 rounds at 4e-3, and 26 layers and 10 steps of other roundings stay below 5e-2.
COMPILED_BOUND = {"fp32": 1e-4, "mixed": 5e-2}
LOSS_OF_STOCK = 2.0
"""A bf16 chunk may lose this many times what stock run in bf16 loses against fp32. Two orders of the same roundings
scatter against each other; a mask or a scale that is wrong loses ten times as much and more."""
COSINE = 0.999
"""The least cosine of an 8-bit chunk to stock's in fp32: the error is then below 4.5 % of the chunk's length."""
SCALED = 2 * (1 - COSINE**2) ** 0.5
"""The most relative L2 of an 8-bit chunk: twice what an angle of that cosine alone makes of it."""


class CheckFailed(AssertionError):
    """The thing to be timed computes something wrong."""


class Unavailable(Exception):
    """A variant cannot run here; the message says why."""


def fallback_reasons(status: Any) -> dict[str, str]:
    return status.fallback_reasons


def compare(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors against the truth; raises CheckFailed where a value is not finite."""
    if not torch.isfinite(found).all():
        raise CheckFailed("the chunk holds values that are not finite")
    return {**error(found, truth), "cosine": cosine(found, truth)}


def within(facts: dict[str, Any], bound: float) -> dict[str, Any]:
    """``facts`` with the bound on their rel_l2; raises CheckFailed beyond it. bound  0: equal bits."""
    said = f"rel L2 {facts['rel_l2']:.1e}, allowed {bound:.0e}" if bound else "equal bits"
    if bound == 0 and facts["max_abs"] != 0:
        raise CheckFailed(f"bits differ from stock's: max abs {facts['max_abs']:.3g}")
    if not facts["rel_l2"] <= bound:
        raise CheckFailed(said)
    return {**facts, "bound": bound, "gate": said}


def aligned(facts: dict[str, Any]) -> dict[str, Any]:
    """The same with the least cosine, of 8-bit weights. A cosine sees no wrong scale, so the length is asked as well."""
    said = f"cosine {facts['cosine']:.5f}, at least {COSINE}"
    if not facts["cosine"] >= COSINE:
        raise CheckFailed(said)
    if not facts["rel_l2"] <= SCALED:
        raise CheckFailed(f"{said}, but rel L2 {facts['rel_l2']:.2g}, allowed {SCALED:.2g}")
    return {**facts, "gate": said}


def lossy(facts: dict[str, Any], errors: list[dict[str, float]], lost: float | None) -> dict[str, Any]:
    """The same of bf16. lost  relative L2 of stock run in bf16 to stock in fp32, on the first observation."""
    if lost is None:
        raise CheckFailed("stock could not be run in bf16, so there is nothing to compare with")
    times = errors[0]["rel_l2"] / lost
    said = f"{times:.2f} of bf16 stock's error, allowed {LOSS_OF_STOCK:g}"
    if not times <= LOSS_OF_STOCK:
        raise CheckFailed(said)
    return {**facts, "stock_bf16_rel_l2": lost, "rel_l2_to_stock_bf16": times, "gate": said}


def worst(errors: list[dict[str, float]]) -> dict[str, float]:
    pick = {"cosine": min}
    return {name: pick.get(name, max)(each[name] for each in errors) for name in errors[0]}


def check_peer(
    precision: str, chunks: list[Tensor], truths: list[Tensor], lost: float | None
) -> dict[str, Any]:
    """Another runtime's chunks against stock's in fp32."""
    errors = [compare(*pair) for pair in zip(chunks, truths, strict=True)]
    facts = worst(errors)
    if precision == "fp32":
        return within(facts, COMPILED_BOUND["fp32"])
    return lossy(facts, errors, lost) if precision == "bf16" else aligned(facts)


def check_tier(
    policy: Any, precision: str, layout: str, inputs: list[Any], chunks: list[Tensor], truths: list[Tensor]
) -> dict[str, Any]:
    """A patched policy's chunks: against stock's, and where they may differ by more than fp32's rounding, by ``verify``.

    chunks, truths  of the policy and of stock on each of ``inputs``
    """
    now = smolvla_fast.status(policy)
    if not now.active or now.calls_stock:
        raise CheckFailed(f"stock ran in its place: {now.last_fallback}")
    errors = [compare(*pair) for pair in zip(chunks, truths, strict=True)]
    if not torch.equal(act(policy, inputs[0]), chunks[0]):
        raise CheckFailed("a second chunk of the same observation has other bits")
    facts: dict[str, Any] = {**worst(errors), "backend": now.backend, "stage_backends": now.stages}
    facts.update(fallback_reasons=fallback_reasons(now), extra_bytes=now.extra_bytes)
    if TIERS[precision].stock_order or (precision == "fp32" and layout == "fp32"):
        return within(facts, 0.0 if TIERS[precision].stock_order else FP32_BOUND)
    report = smolvla_fast.verify(policy, inputs[0][0], noise=inputs[0][1]).to_dict()
    if not report["passed"]:
        raise CheckFailed(f"verify: rel L2 to fp32 {report['rel_l2']:.2g}, allowed {report['bound']:.2g}")
    facts.update({name: report[name] for name in ("bound", "stock_rel_l2", "stock_max_abs")})
    if layout != "fp32":  # stock itself is not the truth
        facts.update({name: report[name] for name in ("rel_l2", "max_abs", "cosine")}, gate="verify")
        return aligned(facts) if TIERS[precision].quantized else facts
    return aligned(facts) if TIERS[precision].quantized else lossy(facts, errors, report["stock_rel_l2"])


def check_late(policy: Any) -> str | None:
    """What is wrong after the rounds: times are stock's where stock ran."""
    now = smolvla_fast.status(policy)
    return f"stock ran in its place: {now.last_fallback}" if now.calls_stock else None


def act(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    observation, noise = inputs
    return policy.predict_action_chunk(dict(observation), noise=noise.clone())
