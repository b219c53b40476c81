"""The CPU backend beside stock and its peers, from one run: ``python -m benchmarks.suites.cpu --json FILE``.

No pytest suite: stock, every tier and every peer take their rounds in turn, so that whatever else the machine does hits
all of them alike, and a ratio is that of two rounds which stood side by side. Each is checked before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import smolvla_fast
from benchmarks.harness.account import stage_costs
from benchmarks.harness.checks import check_all, check_heavy, loss_of_bf16_stock
from benchmarks.harness.roof import Roofs, measure_roofs
from benchmarks.harness.variants import CPU, Arena, Contestant, chunk, first_chunk
from benchmarks.peers import openvino as openvino_peer
from benchmarks.suites import overhead, scaling
from smolvla_fast.engine.timing import stage_times
from smolvla_fast.measure import system
from smolvla_fast.measure.console import write_json
from smolvla_fast.measure.rounds import median_stages, percentile, side_by_side, summary, timed_ms
from smolvla_fast.ops import extension
from smolvla_fast.testing.outliers import heavy_tailed

LEAST_ROUNDS = 3
MAIN_SECONDS, SCALING_SECONDS = 270.0, 150.0
"""Time for the alternating rounds and for the scaling curves; on a slow machine there are fewer rounds, and the last
points are left out, so that a run stays below ten minutes on two cores that are idle."""
FULL_FACTOR = 4.0
STRUCTURED = 2
"""Observations on which a tier is compared with stock."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.cpu", description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--full", action="store_true", help="four times the time for rounds and curves")
    parser.add_argument("--with-compile", action="store_true")
    parser.add_argument("--cameras", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scaling", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def tell(label: str) -> None:
    print(f"cpu: {label}", file=sys.stderr, flush=True)


def prepare(arena: Arena, args: argparse.Namespace) -> list[Contestant]:
    """Stock, tiers and peers, each checked; what is skipped or red says why and is not timed."""
    inputs = [arena.inputs(seed=seed) for seed in range(STRUCTURED)]
    tell("stock: first chunk")
    stock, tiers = arena.stock(), arena.tiers()
    truths = [first_chunk(stock, inputs[0]), *(chunk(stock.policy, each) for each in inputs[1:])]
    check_all(stock, truths, truths, inputs, None)
    lost = _loss_of_bf16(tiers, inputs[0])
    chunks: dict[str, list[Any]] = {}
    for tier in tiers:
        if tier.runs:
            tell(f"{tier.name}: first chunks and check")
            chunks[tier.name] = [
                first_chunk(tier, inputs[0]),
                *(chunk(tier.policy, each) for each in inputs[1:]),
            ]
            check_all(tier, chunks[tier.name], truths, inputs, lost)
    tell("heavy-tailed weights")
    with heavy_tailed(arena.policy.model):
        truth = chunk(stock.policy, inputs[0])
        for contestant in (stock, *(tier for tier in tiers if tier.runs)):
            check_heavy(contestant, chunk(contestant.policy, inputs[0]), truth)
    peers = []
    for name, precision, make in _peers(args):
        tell(f"{name}: conversion, first chunks and check")
        peer = _peer(arena, name, precision, make)
        peers.append(peer)
        if peer.runs:
            try:
                found = [first_chunk(peer, inputs[0]), *(chunk(peer.policy, each) for each in inputs[1:])]
            except Exception as reason:  # another's compiler: whatever it raises is the reason
                peer.skipped = f"it does not convert or run: {type(reason).__name__}: {str(reason)[:300]}"
                continue
            check_all(peer, found, truths, inputs, lost)
    return [stock, *tiers, *peers]


def _loss_of_bf16(tiers: list[Contestant], inputs: Any) -> float | None:
    bf16 = next((tier for tier in tiers if tier.name == "bf16" and tier.runs), None)
    if bf16 is None:
        return None
    tell("stock run in bf16")
    return loss_of_bf16_stock(bf16.policy, inputs)


def _peers(args: argparse.Namespace) -> list[tuple[str, str, Callable[[Any], Any] | str]]:
    """Name, the tier it stands beside, and what makes its ``sample_actions`` or why it cannot be made."""
    missing = openvino_peer.why_missing()
    found: list[tuple[str, str, Callable[[Any], Any] | str]] = [
        (
            f"OpenVINO {precision}", precision,
            missing or (lambda model, p=precision: openvino_peer.make_runner(model, p, args.threads)),
        )
        for precision in openvino_peer.PRECISIONS
    ]  # fmt: skip
    found.append(("OpenVINO int8", "int8", openvino_peer.INT8))
    compiled: Callable[[Any], Any] | str = "compiling takes minutes on a CPU; ask for it by --with-compile"
    if args.with_compile:
        compiled = lambda model: torch.compile(model.sample_actions)  # noqa: E731
    return [*found, ("stock compiled", "fp32", compiled)]


def _peer(arena: Arena, name: str, precision: str, make: Callable[[Any], Any] | str) -> Contestant:
    if isinstance(make, str):
        return Contestant(name, "peer", precision, skipped=make)
    return arena.peer(name, precision, make)


def alternate(contestants: list[Contestant], inputs: Any, rounds: int, seconds: float) -> None:
    """Rounds in turn; each round begins with another, so that nobody always follows the same neighbour."""
    end = time.perf_counter() + seconds
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        tell(f"round {index + 1} of {rounds}")
        start = index % len(contestants)
        for contestant in contestants[start:] + contestants[:start]:
            ms, _ = timed_ms(lambda: chunk(contestant.policy, inputs), CPU)  # noqa: B023
            contestant.rounds_ms.append(ms)
            runner = contestant.policy.model.__dict__.get("sample_actions")
            if getattr(runner, "stage_ms", None):
                contestant.stages.append(dict(runner.stage_ms))


def by_stage(contestants: list[Contestant], inputs: Any, rounds: int) -> None:
    for index in range(rounds):
        tell(f"by stage {index + 1} of {rounds}")
        for contestant in contestants:
            if contestant.kind != "peer":
                contestant.stages.append(stage_times(contestant.policy, *inputs))


def entry(
    contestant: Contestant, stock: Contestant, arena: Arena, roofs: Roofs, group: str
) -> dict[str, Any]:
    """A row in the form of pytest-benchmark's JSON."""
    rounds = contestant.rounds_ms
    language = arena.inputs()[0]["observation.language.tokens"].shape[1]
    itemsize = roofs.itemsize(contestant.precision)
    costs = stage_costs(arena.policy.model, arena.cameras, language, itemsize)
    floor_ms = sum(roofs.floor_ms(cost.flops, cost.bytes, contestant.precision) for cost in costs.values())
    extra = {
        "suite": "cpu", "variant": contestant.name, "kind": contestant.kind, "precision": contestant.precision,
        "cameras": arena.cameras, "steps": arena.policy.config.num_steps, "threads": torch.get_num_threads(),
        **contestant.facts, **summary(rounds), "rounds_ms": rounds,
        "ratio": side_by_side(stock.rounds_ms, rounds),
        "floor_ms": floor_ms, "share_of_floor": floor_ms / percentile(rounds, 0.5),
    }  # fmt: skip
    if contestant.stages:
        extra["stages"] = median_stages(contestant.stages)
    return {"group": group, "name": f"cpu[{contestant.name}]", "extra_info": extra}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole suite; returns what is written as JSON."""
    torch.set_num_threads(args.threads)
    facts = system.facts()
    facts["openvino_version"] = openvino_peer.version()
    tell("roof")
    roofs = measure_roofs(small=args.size == "tiny")
    facts["ceilings"] = roofs.to_dict()
    facts["instruction_level"] = extension.load("cpu").level() if extension.available("cpu") else None
    facts["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    tell("policy")
    arena = Arena(args.size, args.cameras, args.steps)
    config = arena.policy.config
    group = (
        f"cpu: {args.size} size, fp32 weights, {config.num_vlm_layers} layers, {config.num_steps} steps, "
        f"{args.cameras} cameras, {args.threads} threads"
    )
    contestants = prepare(arena, args)
    ready = [contestant for contestant in contestants if contestant.runs]
    stock, inputs = contestants[0], arena.inputs()
    factor = FULL_FACTOR if args.full else 1.0
    alternate(ready, inputs, args.rounds, factor * MAIN_SECONDS)
    by_stage(ready, inputs, min(2, args.rounds))
    tiers = [contestant for contestant in ready if contestant.kind == "tier"]
    # fp32 and whatever is fastest: the two ends of what a user can choose.
    chosen = [tier for tier in tiers if tier.name == "fp32"]
    fastest = min(tiers, key=lambda tier: percentile(tier.rounds_ms, 0.5), default=None)
    chosen += [fastest] if fastest is not None and fastest not in chosen else []
    costs = {}
    for tier in chosen:
        tell(f"{tier.name}: overhead")
        costs[tier.name] = overhead.measure(
            tier.policy, tier.precision, args.cameras, inputs, min(3, args.rounds)
        )
    curves, left_out = [], []
    if args.scaling:
        rounds = min(5 if args.full else 2, args.rounds)
        curves, left_out = scaling.measure(arena, stock, chosen, rounds, factor * SCALING_SECONDS, tell)
    for tier in tiers:
        late = smolvla_fast.status(tier.policy)
        if late.calls_stock:  # its times are then stock's
            tier.red = f"stock ran in its place: {late.last_fallback}"
    ready = [contestant for contestant in ready if contestant.runs]
    still = {contestant.name for contestant in ready}
    return {
        "machine_info": {"smolvla_fast": facts},
        "benchmarks": [entry(each, stock, arena, roofs, group) for each in ready],
        "cpu": {
            "not_timed": {
                each.name: {"red": each.red is not None, "kind": each.kind, "reason": each.red or each.skipped}
                for each in contestants
                if not each.runs
            },
            "overhead": {name: each for name, each in costs.items() if name in still},
            "scaling": [row for row in curves if row["variant"] in still],
            "left_out": left_out,
        },
    }  # fmt: skip


def red(data: dict[str, Any]) -> list[str]:
    """What of our own was wrong: tiers, and points of the curves."""
    tiers = [
        f"{name}: {each['reason']}"
        for name, each in data["cpu"]["not_timed"].items()
        if each["red"] and each["kind"] == "tier"
    ]
    points = [
        f"{row['variant']} at {row['axis']} {row['value']}: {row['red']}"
        for row in data["cpu"]["scaling"]
        if "red" in row
    ]
    return tiers + points


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    data = run(args)
    write_json(args.json, data)
    for line in red(data):
        print(f"red, so it is not timed: {line}")
    return 1 if red(data) else 0


if __name__ == "__main__":
    sys.exit(main())
