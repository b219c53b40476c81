"""No speed without a check: what a variant must show before it is timed. What fails gets no number."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.measure.rounds import error
from smolvla_fast.model.precision import TIERS
from smolvla_fast.patch import engine_of
from smolvla_fast.verify import FP32_BOUND, cosine

# The compiler may reorder every sum. fp32: 1e-4 is far above what that can do, far below a wrong mask;
# mixed: bf16 rounds at 4e-3, and 26 layers and 10 steps of other roundings stay below 5e-2.
COMPILED_BOUND = {"fp32": 1e-4, "mixed": 5e-2}
LOSS_OF_STOCK = 2.0
"""A bf16 chunk may lose this many times what stock run in bf16 loses against fp32. Two orders of the same roundings
scatter against each other; a mask or a scale that is wrong loses ten times as much and more."""
COSINE = 0.999
"""The least cosine to stock's chunk in fp32 of what is 8 bits wide and no tier that promises one: the error is then below
4.5 % of the chunk's length."""
TINY_COSINE = 0.997
"""The most that is asked of a tiny policy with heavy tails: its rows have 48 columns to average over, not 720 and more
(tests/acceptance/test_outliers.py)."""

Facts = dict[str, Any]


class CheckFailed(AssertionError):
    """The thing to be timed computes something wrong."""


class Unavailable(Exception):
    """A variant cannot run here; the message says why."""


def compare(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Errors against the truth; raises CheckFailed where a value is not finite."""
    if not torch.isfinite(found).all():
        raise CheckFailed("the chunk holds values that are not finite")
    return {**error(found, truth), "cosine": cosine(found, truth)}


def worst(chunks: Sequence[Tensor], truths: Sequence[Tensor]) -> dict[str, float]:
    errors = [compare(*pair) for pair in zip(chunks, truths, strict=True)]
    return {n: (min if n == "cosine" else max)(each[n] for each in errors) for n in errors[0]}


def within(facts: Facts, bound: float) -> Facts:
    """``facts`` with the bound on their rel_l2; raises CheckFailed beyond it. bound  0: equal bits."""
    if bound == 0 and facts["max_abs"] != 0:
        raise CheckFailed(f"bits differ from stock's: max abs {facts['max_abs']:.3g}")
    said = f"rel L2 {facts['rel_l2']:.1e}, allowed {bound:.0e}" if bound else "equal bits"
    return passed({**facts, "bound": bound}, facts["rel_l2"] <= bound, said)


def aligned(facts: Facts, precision: str) -> Facts:
    """The same with the cosine that the tier promises. A cosine sees no wrong scale, so the length is asked as well."""
    tier = TIERS.get(precision)
    least = (tier and tier.cosine) or COSINE
    found = passed(facts, facts["cosine"] >= least, f"cosine {facts['cosine']:.6f}, at least {least}")
    most = 2 * (1 - least**2) ** 0.5  # twice what an angle of that cosine alone makes of it
    longer = f"{found['gate']}, but rel L2 {facts['rel_l2']:.2g}, allowed {most:.2g}"
    return passed(facts, facts["rel_l2"] <= most, longer) and found


def lossy(facts: Facts, first: float, lost: float | None) -> Facts:
    """The same of bf16. first, lost  relative L2 to stock in fp32 on the first observation: this, and stock run in bf16"""
    if lost is None:
        raise CheckFailed("stock could not be run in bf16, so there is nothing to compare with")
    said = f"{first / lost:.2f} of bf16 stock's error, allowed {LOSS_OF_STOCK:g}"
    more = {"stock_bf16_rel_l2": lost, "rel_l2_to_stock_bf16": first / lost}
    return passed({**facts, **more}, first / lost <= LOSS_OF_STOCK, said)


def passed(facts: Facts, holds: bool, said: str) -> Facts:
    if not holds:
        raise CheckFailed(said)
    return {**facts, "gate": said}


def check_stock(setup: Any, policy: Any, precision: str, case: Any, chunks: list[Tensor]) -> Facts:
    """LeRobot's own code, held to the plain implementation: nothing of what we change may have reached it."""
    if not torch.equal(setup.stock_chunks(case, chunks)[0], chunks[0]):
        raise CheckFailed("stock gave another chunk for the same observation before")
    facts = compare(chunks[0], act(setup.reference, setup.every(case)[0]))
    return {**within(facts, COMPILED_BOUND[setup.layout]), "against": "the plain PyTorch implementation"}


def check_peer(setup: Any, policy: Any, precision: str, case: Any, chunks: list[Tensor]) -> Facts:
    """Another runtime's chunks against stock's."""
    truths = setup.stock_chunks(case)
    facts = worst(chunks, truths)
    if precision == "fp32" or setup.layout != "fp32":
        return within(facts, COMPILED_BOUND[setup.layout])
    if precision == "bf16":
        return lossy(facts, error(chunks[0], truths[0])["rel_l2"], setup.lost.get(case))
    return aligned(facts, precision)


def check_tier(setup: Any, policy: Any, precision: str, case: Any, chunks: list[Tensor]) -> Facts:
    """A patched policy's chunks: against stock's, and where they may differ by more than fp32's rounding, by ``verify``."""
    now, tier, wide = smolvla_fast.status(policy), TIERS[precision], setup.layout == "fp32"
    (observation, noise), truths = setup.every(case)[0], setup.stock_chunks(case)
    if not now.active:
        raise CheckFailed(f"stock ran in its place: {now.last_fallback}")
    check_late(policy)
    kept = {name: getattr(now, name) for name in ("backend", "fallback_reasons", "extra_bytes")}
    facts: Facts = {**worst(chunks, truths), **kept, "status": now.to_dict()}
    if not torch.equal(act(policy, (observation, noise)), chunks[0]):
        raise CheckFailed("a second chunk of the same observation has other bits")
    if tier.stock_order or (precision == "fp32" and wide):
        return within(facts, 0.0 if tier.stock_order else FP32_BOUND)
    report = smolvla_fast.verify(policy, observation, noise=noise).to_dict()
    said = f"verify: rel L2 to fp32 {report['rel_l2']:.2g}, allowed {report['bound']:.2g}"
    # Where weights are not fp32 stock itself is not the truth.
    own = ("bound", "stock_rel_l2", "stock_max_abs", *(() if wide else ("rel_l2", "max_abs", "cosine")))
    facts = passed({**facts, **{name: report[name] for name in own}}, report["passed"], said)
    if wide and tier.quantized:
        return aligned(facts, tier.name)  # every observation: ``verify`` has judged the first
    if wide:
        setup.lost[case] = report["stock_rel_l2"]
    return facts


def check_point(setup: Any, policy: Any, precision: str, case: Any, chunks: list[Tensor]) -> Facts:
    """A point of a curve: the first and the last sample of a batch against stock's of each alone. bf16 is held to the
    cosine of 8 bits, looser than its own gate, for stock is not run in bf16 at every point."""
    (observation, noise), ends = setup.every(case)[0], sorted({0, case.batch - 1})

    def alone() -> Tensor:
        if precision == "stock":
            return chunks[0][ends]
        samples = [({key: x[i : i + 1] for key, x in observation.items()}, noise[i : i + 1]) for i in ends]
        return torch.cat([act(setup.policy, each) for each in samples])

    facts = compare(chunks[0][ends], setup.once(("alone", case, setup.policy.config.num_steps), alone))
    return within(facts, FP32_BOUND) if precision in ("stock", "fp32") else aligned(facts, precision)


CHECKS = {"stock": check_stock, "tier": check_tier, "peer": check_peer, "point": check_point}


def check_heavy(facts: Facts, found: Tensor, stock: Tensor, size: str) -> None:
    """On heavy-tailed weights a quantised tier has to hold its cosine too; of the others it is a fact."""
    facts.update(heavy_cosine=cosine(found, stock), heavy_rel_l2=error(found, stock)["rel_l2"])
    tier = TIERS.get(facts["precision"])
    if tier is None or tier.cosine is None:
        return
    least = min(tier.cosine, TINY_COSINE) if size == "tiny" else tier.cosine
    if not facts["heavy_cosine"] >= least:
        raise CheckFailed(f"cosine {facts['heavy_cosine']:.5f} on heavy-tailed weights, at least {least}")


def check_late(policy: Any) -> None:
    """After the rounds: times are stock's where stock ran."""
    now = smolvla_fast.status(policy)
    if now.calls_stock or now.training_stock:
        with suppress(RuntimeError):  # where no engine serves the model there is no capture to tell of
            graphs = engine_of(policy.model).graphs
            print(*(graphs.failures if graphs is not None else ()), sep="\n", flush=True)
        raise CheckFailed(f"stock ran in its place: {now.last_fallback or now.training_fallback}")


def act(policy: Any, inputs: tuple[dict[str, Tensor], Tensor]) -> Tensor:
    observation, noise = inputs
    return policy.predict_action_chunk(dict(observation), noise=noise.clone())
