"""The CPU backend beside stock and its peers: tiers, OpenVINO and compiled stock in turn; Python's share; curves.

Stock, every tier and every peer take their rounds in turn, so that whatever else the machine does hits all of them alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import gate
from benchmarks.harness.flags import counts
from benchmarks.harness.gate import CheckFailed, Unavailable
from benchmarks.harness.measure import Variant
from benchmarks.harness.plugin import rounds
from benchmarks.harness.setup import MOST_CAMERAS, BenchmarkSetup, Case, twin
from benchmarks.peers import openvino as openvino_peer
from benchmarks.suites import overhead
from smolvla_fast.measure.rounds import synchronize, threads
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops import extension
from smolvla_fast.patch import patch
from smolvla_fast.testing.outliers import heavy_tailed

MAIN_SHARE = 0.65
"""Of the suite's time, for tiers and peers; the rest is for the curves."""
BY_STAGE_ROUNDS = 2
AXES = {"cameras": range(1, MOST_CAMERAS + 1), "steps": (1, 2, 5, 10), "threads": None, "batch": (1, 2, 4, 8)}
COMPILED = "compiling takes minutes on a CPU; ask for it by --with-compile"


def openvino(setup: BenchmarkSetup, precision: str, case: Case) -> Variant:
    def make(model: Any) -> Any:
        missing = openvino_peer.why_missing(precision)
        if missing:
            raise Unavailable(missing)
        return openvino_peer.make_runner(model, precision, torch.get_num_threads())

    variant = setup.peer(f"OpenVINO {precision}", precision, case, make)

    def run() -> dict[str, float]:
        setup.chunk(variant.policy, case)
        return dict(variant.policy.model.__dict__["sample_actions"].stage_ms)

    variant.run = run
    return variant


def check_heavy(facts: dict[str, Any], found: Tensor, stock: Tensor) -> None:
    """On heavy-tailed weights an 8-bit tier has to hold its cosine too; of the others it is a fact."""
    errors = gate.error(found, stock)
    facts["heavy_cosine"], facts["heavy_rel_l2"] = gate.cosine(found, stock), errors["rel_l2"]
    if facts["precision"] not in ("stock", "fp32", "bf16") and not facts["heavy_cosine"] >= gate.COSINE:
        raise CheckFailed(
            f"cosine {facts['heavy_cosine']:.5f} on heavy-tailed weights, at least {gate.COSINE}"
        )


def test_cpu(measure: Any, make_setup: Any, ceilings: Any, pytestconfig: Any) -> None:
    option, setup = pytestconfig.getoption, make_setup()
    (cameras,) = counts(option("--cameras"), "--cameras", (2,))
    case = Case(cameras, observations=2)
    measure.recorder.facts.update(
        openvino_version=openvino_peer.version(), torch_capability=torch.backends.cpu.get_cpu_capability(),
        instruction_level=extension.load("cpu").level() if extension.available("cpu") else None,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    # Every tier but ``exact``, which is stock's own calls. bf16 comes before the peer that is held to its error.
    variants = [
        setup.stock(case),
        *(setup.tier(tier.name, case) for tier in TIERS.values() if not tier.stock_order),
    ]
    variants += [openvino(setup, precision, case) for precision in ("fp32", "bf16", "int8")]
    if option("--with-compile"):
        variants.append(setup.compiled(case, option("--compile-mode")))
    else:
        variants.append(setup.peer("stock compiled", "fp32", case, _unavailable))
    for each in variants:
        each.facts["floor_ms"] = setup.floor_ms(each.facts["precision"], case, ceilings)
    group = f"cpu: {setup.size} size, fp32 weights, {setup.group.split('weights, ')[1]}, {cameras} cameras, "
    group += f"{torch.get_num_threads()} threads"

    def on_heavy_tails(ready: list[Variant]) -> None:
        if any(each.facts["kind"] == "tier" for each in ready):
            with heavy_tailed(setup.policy.model):
                truth = setup.chunk(setup.policy, case)
                for each in (each for each in ready if each.facts["kind"] != "peer"):
                    with measure.recorder.attempt(each, group):
                        check_heavy(each.facts, setup.chunk(each.policy, case), truth)

    ready = measure(group, variants, rounds(pytestconfig, 20, 80), MAIN_SHARE, on_heavy_tails, suite="cpu")
    for each in ready:
        with measure.recorder.attempt(each, group):
            if each.facts["kind"] != "peer":
                for _ in range(BY_STAGE_ROUNDS):
                    each.facts.setdefault("stage_rounds_ms", []).append(setup.stage_times(each.policy, case))
            if each.name in two_ends(ready):
                each.facts["overhead"] = overhead.measure(
                    each.policy, each.name, cameras, setup.inputs(cameras), min(3, rounds(pytestconfig))
                )
    pytestconfig.stash[ENDS] = two_ends(ready)


ENDS: pytest.StashKey[list[str]] = pytest.StashKey()


def _unavailable(model: Any) -> Any:
    raise Unavailable(COMPILED)


def two_ends(ready: list[Variant]) -> list[str]:
    """fp32 and whatever is fastest: the two ends of what a user can choose."""
    tiers = {each.name: min(each.stats.stats.data) for each in ready if each.facts["kind"] == "tier"}
    return [name for name in tiers if name == "fp32" or name == min(tiers, key=tiers.__getitem__)]


@contextmanager
def at(setup: BenchmarkSetup, axis: str, value: int) -> Iterator[None]:
    """Sets steps or threads."""
    config = setup.policy.config
    before = config.num_steps
    config.num_steps = value if axis == "steps" else before
    try:
        with threads(value if axis == "threads" else None):
            yield
    finally:
        config.num_steps = before


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "axis" in metafunc.fixturenames:
        most = metafunc.config.getoption("--threads") or torch.get_num_threads()
        points = [(a, v) for a, values in AXES.items() for v in values or range(1, most + 1)]
        chosen = points if metafunc.config.getoption("--scaling") else []
        metafunc.parametrize(("axis", "value"), chosen, ids=[f"{a}{v}" for a, v in chosen])


def test_scaling(measure: Any, make_setup: Any, pytestconfig: Any, axis: str, value: int) -> None:
    """One point; of a batch stock computes the first and the last sample alone, as a check."""
    setup = make_setup()
    (cameras,) = counts(pytestconfig.getoption("--cameras"), "--cameras", (2,))
    samples = [
        setup.inputs(value if axis == "cameras" else cameras, seed=s)
        for s in range(value if axis == "batch" else 1)
    ]
    joined = {key: torch.cat([each[0][key] for each in samples]) for key in samples[0][0]}
    inputs = joined, torch.cat([noise for _, noise in samples])
    judged = sorted({0, len(samples) - 1})
    truth: list[Tensor] = []

    def variant(name: str) -> Variant:
        policy = twin(setup.policy)

        def check() -> dict[str, Any]:
            if not truth:
                truth.append(torch.cat([gate.act(setup.policy, samples[index]) for index in judged]))
            if name == "stock":
                return {}
            patch(policy, precision=name)
            return check_point(name, gate.act(policy, inputs)[judged], truth[0])

        facts = dict(variant=name, ratio_to="stock", axis=axis, value=value)
        return Variant(name, check, lambda: gate.act(policy, inputs), policy=policy, facts=facts)

    ends = pytestconfig.stash.get(ENDS, ["fp32"])
    # Stock computes a batch sample by sample at best; its curve would say nothing there.
    names = ends if axis == "batch" else ["stock", *ends]
    with at(setup, axis, value):
        few = min(rounds(pytestconfig, 2, 5), 5)
        measure(f"scaling: {axis} {value}", [variant(name) for name in names], few, suite="scaling")
    synchronize(setup.device)


def check_point(precision: str, found: Tensor, stock: Tensor) -> dict[str, Any]:
    """One point of the curves against stock. bf16 is held to the cosine of 8 bits, looser than its own gate, for stock is
    not run in bf16 at every point."""
    facts = gate.compare(found, stock)
    return gate.within(facts, gate.FP32_BOUND) if precision == "fp32" else gate.aligned(facts)
