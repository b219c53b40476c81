"""The CPU backend beside stock and its peers: tiers and OpenVINO in turn; Python's share; curves; compiled stock.

Stock, every tier and every peer take their rounds in turn, so that whatever else the machine does hits all of them alike.
Compiled stock comes last, beside stock and fp32 again: it compiles for minutes, which then cost no other its time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch as patched

import pytest
import torch

from benchmarks.harness import gate
from benchmarks.harness.flags import counts
from benchmarks.harness.gate import Unavailable
from benchmarks.harness.measure import ROOF, Variant
from benchmarks.harness.outliers import heavy_tailed
from benchmarks.harness.plugin import rounds
from benchmarks.harness.roof import product_of_roof
from benchmarks.harness.setup import MOST_CAMERAS, Case, Inputs
from benchmarks.peers import openvino as openvino_peer
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure.rounds import median_stages, percentile, threads, timed_ms
from smolvla_fast.ops import extension, table
from smolvla_fast.ops.cpu import int8_attention
from smolvla_fast.patch import engine_of, patch
from smolvla_fast.testing import policies

MAIN_SHARE, MAIN_SHARE_WITH_COMPILE = 0.65, 0.3
"""Of the suite's time, for tiers and peers; the rest is for the curves and, if asked for, compiled stock."""
COMPILED_POINTS = 10
"""Compiled stock has the time of so many points of a curve."""
BY_STAGE_ROUNDS = 2
AXES = {"cameras": range(1, MOST_CAMERAS + 1), "steps": (1, 2, 5, 10), "threads": None, "batch": (1, 2, 4, 8)}
OFF_LOOP = 1
"""The fewest denoise steps: what a chunk of so many allocates is not the loop's."""
BESIDE = "beside compiled stock"
ENDS: pytest.StashKey[list[str]] = pytest.StashKey()


def openvino(model: Any, precision: str) -> openvino_peer.Runner:
    if missing := openvino_peer.why_missing(precision):
        raise Unavailable(missing)
    return openvino_peer.Runner(model, openvino_peer.compile_for_cpu(precision, torch.get_num_threads()))


def test_cpu(measure: Any, make_setup: Any, pytestconfig: Any) -> None:
    option, setup = pytestconfig.option, make_setup()
    (cameras,) = counts(option.cameras, "--cameras", (2,))
    case, threads = Case(cameras, observations=2), torch.get_num_threads()
    measure.facts.update(
        openvino_version=version("openvino") if find_spec("openvino") else None, threads=threads,
        instruction_level=extension.load("cpu").level() if extension.available("cpu") else None,
        torch_capability=torch.backends.cpu.get_cpu_capability(),
    )  # fmt: skip
    # Every tier but ``exact``, which is stock's own calls. bf16 comes before the peer that is held to its error.
    variants = [each for each in setup.variants(case) if each.name != "exact"]
    for name in ("fp32", "bf16", "int8"):
        variants.append(setup.peer(f"OpenVINO {name}", name, case, partial(openvino, precision=name)))
    variants.insert(1, roof_in_turn(setup))
    group = f"{setup.named('cpu', case)}, {threads} threads"

    def on_heavy_tails(ready: list[Variant]) -> None:
        judged = [each for each in ready if each.facts["kind"] in ("stock", "tier")]
        with heavy_tailed(setup.policy.model) if judged else nullcontext():
            truth = setup.chunk(setup.policy, case)
            for each in judged:
                with measure.attempt(each, group):
                    gate.check_heavy(each.facts, setup.chunk(each.policy, case), truth, setup.size)

    share = MAIN_SHARE_WITH_COMPILE if option.with_compile else MAIN_SHARE
    measured = measure(group, variants, rounds(pytestconfig, 20, 80), share, on_heavy_tails, suite="cpu")
    ready = [each for each in measured if each.name != ROOF]
    pytestconfig.stash[ENDS] = two_ends(ready)
    for each in ready:
        with measure.attempt(each, group):
            times = [stage_times(each.policy, *setup.inputs(cameras)) for _ in range(BY_STAGE_ROUNDS)]
            each.facts["stage_rounds_ms"] = times
            if each.name in two_ends(ready):
                few, inputs = min(3, rounds(pytestconfig)), setup.inputs(cameras)
                outside = outside_ops(each.policy, inputs, few)
                narrow = narrow_ms(each.policy, each.name, cameras, max(3, few))
                shares = dict(narrow_ms=narrow, narrow_share=narrow / outside["sample_actions_ms"])
                each.facts["overhead"] = {**outside, **shares, **step_allocations(each.policy, inputs)}


def roof_in_turn(setup: Any) -> Variant:
    """The fp32 product that its roof is the best of, in the rounds of the others: a shared machine may be slower for minutes
    than it was for that second."""
    product, work = product_of_roof(setup.device, torch.float32, setup.size == "tiny")
    best_ms = 1e3 * work / setup.ceilings.gemm_flops["float32"]
    facts = dict(variant=ROOF, kind="roof", ratio_to=ROOF, suite="roof", best_ms=best_ms)
    return Variant(ROOF, lambda: facts, product, facts=facts)


def two_ends(ready: list[Variant]) -> list[str]:
    """fp32 and whatever is fastest: the two ends of what a user can choose."""
    tiers = {each.name: min(each.stats.stats.data) for each in ready if each.facts["kind"] == "tier"}
    return [name for name in tiers if name == "fp32" or name == min(tiers, key=tiers.__getitem__)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "axis" in metafunc.fixturenames:
        most = metafunc.config.getoption("--threads") or torch.get_num_threads()
        points = [(a, v) for a, values in AXES.items() for v in values or range(1, most + 1)]
        chosen = points if metafunc.config.getoption("--scaling") else []
        metafunc.parametrize(("axis", "value"), chosen, ids=[f"{a}{v}" for a, v in chosen])


def test_scaling(measure: Any, make_setup: Any, pytestconfig: Any, axis: str, value: int) -> None:
    setup = make_setup()
    (cameras,) = counts(pytestconfig.getoption("--cameras"), "--cameras", (2,))
    case = Case(value if axis == "cameras" else cameras, value if axis == "batch" else 1)
    tiers = pytestconfig.stash.get(ENDS, ["fp32"])
    config, few = setup.policy.config, min(rounds(pytestconfig, 2, 5), 5)
    steps = patched.object(config, "num_steps", value if axis == "steps" else config.num_steps)
    with steps, threads(value if axis == "threads" else None):
        # Stock computes a batch sample by sample at best; its curve would say nothing there.
        points = [] if axis == "batch" else [setup.stock(case, "point")]
        points += [setup.tier(name, case, kind="point") for name in tiers]
        share = 1 / (measure.cases + COMPILED_POINTS * pytestconfig.getoption("--with-compile"))
        measure(f"scaling: {axis} {value}", points, few, share, suite="scaling", axis=axis, value=value)


def test_compiled(measure: Any, make_setup: Any, pytestconfig: Any) -> None:
    option, setup = pytestconfig.option, make_setup()
    (cameras,) = counts(option.cameras, "--cameras", (2,))
    case = Case(cameras, observations=2)
    compiled = setup.compiled(case, option)
    timed = option.with_compile and measure.chosen(compiled.name)
    others = [setup.stock(case), setup.tier("fp32", case)] if timed else []
    group = f"{setup.named('cpu', case)}, {torch.get_num_threads()} threads, {BESIDE}"
    measure(group, [*others, compiled], rounds(pytestconfig, 5, 20), 1.0, suite="cpu", beside=BESIDE)


def recorded(function: Callable[..., Any], found: list[float]) -> Callable[..., Any]:
    """The function, with the ms of each call added to ``found``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        ms, result = timed_ms(lambda: function(*args, **kwargs), "cpu")
        found.append(ms)
        return result

    return call


def sample_ms(policy: Any, inputs: Inputs) -> float:
    """ms of ``sample_actions`` of a patched policy: without what LeRobot does before and after it."""
    found, cls = [], type(policy.model)  # one that is replaced on the object itself is for stock
    with patched.object(cls, "sample_actions", recorded(cls.sample_actions, found)):
        gate.act(policy, inputs)
    return found[0]


def outside_ops(policy: Any, inputs: Inputs, repeats: int) -> dict[str, float]:
    """Medians over rounds: ms of ``sample_actions``, ms of it outside every op, their ratio, and calls of ops a chunk.

    Outside are the engine's Python, the look through the model before a chunk, the gathering of weights and the small torch
    calls between ops (masks, rope tables, joining the prefix). The Python inside an op's own wrapper counts as the op's.
    """
    engine, inside, found = engine_of(policy.model), [], []
    served = {name: op for name in table.NAMES if (op := getattr(engine.ops, name)) is not None}
    timed = replace(engine.ops, **{name: recorded(op, inside) for name, op in served.items()})
    # In tiers of integers a chunk's attention is not the table's.
    attend = recorded(int8_attention.Chunk._attend, inside)
    with patched.object(engine, "ops", timed), patched.object(int8_attention.Chunk, "_attend", attend):
        for _ in range(repeats):
            inside.clear()
            whole = sample_ms(policy, inputs)
            outside = whole - sum(inside)
            shares = dict(outside_ms=outside, outside_share=outside / whole)
            found.append(dict(sample_actions_ms=whole, **shares))
    return {**median_stages(found), "op_calls": len(inside)}


def narrow_ms(policy: Any, precision: str, cameras: int, repeats: int) -> float:
    """Median ms of ``sample_actions`` by the same sequence of calls at widths and images that hardly cost arithmetic:
    Python, torch's dispatch, the start and end of parallel work. So an upper bound of the Python in a chunk."""
    config, vlm = policy.config, policy.model.vlm_with_expert.get_vlm_model()
    layers = len(vlm.text_model.layers)
    narrow = policies.make_policy(
        "tiny", cameras=len(config.image_features), vision=dict(num_hidden_layers=len(vlm.vision_model.encoder.layers)),
        text=dict(num_hidden_layers=layers), num_vlm_layers=layers, chunk_size=config.chunk_size, num_steps=config.num_steps,
    )  # fmt: skip
    patch(narrow, precision=precision)
    inputs = policies.make_observation(narrow, cameras=cameras), policies.make_noise(narrow)
    return percentile([sample_ms(narrow, inputs) for _ in range(repeats + 1)][1:], 0.5)


def allocations(work: Callable[[], object]) -> list[int]:
    """Bytes of each request to torch's CPU allocator."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    return [each.nbytes() for each in events if each.name() == "[memory]" and each.nbytes() > 0]


def step_allocations(policy: Any, inputs: Inputs) -> dict[str, float]:
    """How often one denoise step asks torch's CPU allocator for memory, and bytes in all: the difference of two chunks over
    the difference of their steps. Not seen: what oneDNN and the compiled kernels take from the system by themselves."""
    steps, found = max(policy.config.num_steps, OFF_LOOP + 1), []
    for count in (OFF_LOOP, steps):
        with patched.object(policy.config, "num_steps", count):
            gate.act(policy, inputs)  # so that what is made once for a number of steps is there
            taken = allocations(partial(gate.act, policy, inputs))
        found.append((len(taken), sum(taken)))
    count, size = ((high - low) / (steps - OFF_LOOP) for low, high in zip(*found, strict=True))
    return {"step_allocations": count, "step_bytes": size, "chunk_allocations": found[1][0]}
