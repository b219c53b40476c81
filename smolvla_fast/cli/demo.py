"""Runs SmolVLA stock and patched on the same observation and noise: times, error, chart.

Stock is LeRobot's own class or, where LeRobot is not installed, smolvla_fast's own SmolVLA in plain PyTorch.
Before any is timed the patched chunk is judged by the tier's bound, as `verify` does: exit status 1 and no times if it
fails. Stock and patched rounds alternate, so that other load on the machine affects both; medians are compared.
Without --policy.path, a full-size policy with random weights is made offline; nothing is downloaded. The observation is
drawn by code, or a frame of the recording that --dataset.repo_id, --dataset.root or --observations names.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from ..engine.timing import STAGES
from ..measure import system
from ..measure.console import (
    CommandError,
    Console,
    cannot_write,
    check_writable,
    counted,
    mebibytes,
    milliseconds,
    write_json,
)
from ..measure.rounds import PeakMemory, as_stock, error, fresh, median_stages, summary, threads, timed_ms
from ..verify import StockNotFinite, StockServed, compare
from . import checkpoint, recording, subject
from .recording import Recording

logger = logging.getLogger(__name__)

PARTS = (*STAGES, "other")
NOT_COMPARED = 3


class Failed(Exception):
    """The patched chunk breaks the bound of its tier."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser)
    subject.add_tune(parser)
    recording.add_arguments(parser)
    parser.set_defaults(json="demo.json")
    parser.add_argument(
        "--rounds", type=subject.positive, default=5, help="timed chunks of each (default: 5)"
    )
    parser.add_argument("--plot", metavar="PATH", default="demo.png", help="the chart (default: demo.png)")


def run(args: argparse.Namespace, console: Console) -> int:
    device = subject.check(args)
    check_writable(args.json, "--json")
    check_writable(args.plot, "--plot")
    check_plot(args.plot)
    recorded = recording.open_recording(args, device, 1)
    try:
        with threads(args.threads):
            found = measure(args, device, recorded, console)
    except StockServed as why:
        console.line(f"The patched policy ran stock, so nothing was compared: {why}")
        return NOT_COMPARED
    except Failed as why:
        console.line(f"FAILED, so nothing was timed: {why}")
        return 1
    show(found, console)
    write_json(args.json, found)
    console.line(f"wrote {args.json}")
    draw("stages", found, args.plot, console)
    return 0


def measure(
    args: argparse.Namespace, device: Any, recorded: Recording | None, console: Console
) -> dict[str, Any]:
    """Judges the patched chunk, then times stock and patched rounds in turn. Returns the figures.

    raises  StockServed where stock computed a patched chunk; Failed
    """
    import smolvla_fast
    from smolvla_fast.engine.timing import stage_times

    facts = system.facts()
    # A GPU runs a chunk as one graph without stages, so stages are timed in extra rounds.
    stage_rounds = min(2, args.rounds) if device.type == "cuda" else 0
    total = 4 + 2 * (args.rounds + stage_rounds)
    with console.progress("demo") as show_share:
        done = count()

        def step(label: str) -> None:
            show_share(label, next(done) / total)

        step("making the policy" if args.policy_path is None else "loading the policy")
        policy = subject.make_policy(args, device)
        fault = args.policy_path and checkpoint.unnormalized(args.policy_path, policy.config)
        if fault:
            logger.warning("%s", fault)
        batch, noise = subject.make_observation(policy, args, args.seed)
        shown = "an observation drawn by code"
        if recorded is not None:
            (frame,) = recorded.frames
            batch, shown = (
                recorded.batch(frame),
                f"frame {frame.number} of episode {frame.episode} in {recorded.source}",
            )

        def chunk() -> Tensor:
            return policy.predict_action_chunk(fresh(batch), noise=noise.clone())

        peaks: dict[str, int | None] = {}
        warm: dict[str, float] = {}
        chunks: dict[str, Tensor] = {}
        step("stock: first chunk")
        memory = PeakMemory(device)
        try:
            warm["stock_ms"], chunks["stock"] = timed_ms(chunk, device)
        except Exception as reason:
            raise subject.stock_fails(reason) from reason
        peaks["stock"] = memory.bytes
        step("patch, and first chunk")
        memory.reset()
        try:
            warm["patch_ms"], _ = timed_ms(
                lambda: smolvla_fast.patch(
                    policy, precision=args.precision, backend=args.backend, tune=args.tune, warmup=batch
                ),
                device,
            )
        except (ValueError, RuntimeError) as reason:
            raise CommandError(f"cannot patch: {reason}") from reason
        warm["fast_ms"], chunks["fast"] = timed_ms(chunk, device)
        peaks["fast"] = memory.bytes
        step("judging the patched chunk")
        try:
            compared = compare(policy, batch, noise)
        except StockNotFinite as reason:
            raise CommandError(f"nothing to compare with: {reason}") from reason
        if not compared.judgement.passed:
            raise Failed(
                f"in {compared.tier} the patched chunk is not stock's: {compared.judgement} (relative L2). Do not run it; "
                "`smolvla-fast verify` says what it does to the joints"
            )

        raw: dict[str, list[float]] = {"stock_ms": [], "fast_ms": []}
        stages: dict[str, list[dict[str, float]]] = {"stock": [], "fast": []}

        def timed_round(which: str) -> None:
            if stage_rounds:
                raw[f"{which}_ms"].append(timed_ms(chunk, device)[0])
                return
            times = stage_times(policy, batch, noise)
            stages[which].append(times)
            raw[f"{which}_ms"].append(times["total"])

        for index in range(args.rounds):
            step(f"stock: round {index + 1} of {args.rounds}")
            with as_stock(policy):
                timed_round("stock")
            step(f"patched: round {index + 1} of {args.rounds}")
            timed_round("fast")
        for _ in range(stage_rounds):
            step("stock by stage")
            with as_stock(policy):
                stages["stock"].append(stage_times(policy, batch, noise))
            step("patched by stage")
            stages["fast"].append(stage_times(policy, batch, noise))
        status = smolvla_fast.status(policy)
        if not status.active or status.calls_stock:
            raise StockServed(status.last_fallback)

    stock_ms, fast_ms = statistics.median(raw["stock_ms"]), statistics.median(raw["fast_ms"])
    return {
        **facts, "device": str(device), "policy": subject.describe(policy, args), "observation": shown,
        "cameras": sum(key in batch for key in policy.config.image_features),
        "steps": policy.config.num_steps, "precision": status.precision, "backend": status.backend,
        "stock_ms": stock_ms, "fast_ms": fast_ms, "ratio": stock_ms / fast_ms,
        "ratio_of_best": min(raw["stock_ms"]) / min(raw["fast_ms"]),
        "stages": compare_stages(median_stages(stages["stock"]), median_stages(stages["fast"])),
        "stock": summary(raw["stock_ms"]), "fast": summary(raw["fast_ms"]), "rounds": args.rounds,
        "raw": raw, "warmup": warm, "peak_bytes": peaks, "status": status.to_dict(),
        **error(chunks["fast"], chunks["stock"]), "bound": compared.judgement.bound,
    }  # fmt: skip


def compare_stages(stock: dict[str, float], fast: dict[str, float]) -> dict[str, dict[str, float]]:
    """By stage: milliseconds of stock and patched, the patched stage's share of its chunk, the ratio."""
    return {
        stage: {
            "stock_ms": stock[stage],
            "fast_ms": fast[stage],
            "share": fast[stage] / fast["total"],
            "ratio": stock[stage] / max(fast[stage], 1e-6),
        }
        for stage in PARTS
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Prints the tables."""
    console.line(system.headline(found))
    policy = found["policy"]
    dtypes = ", ".join(f"{count / 1e6:,.1f} M {name}" for name, count in policy["dtypes"].items())
    console.line(
        f"SmolVLA, {policy['source']} ({dtypes}), {counted(found['cameras'], 'camera')}, "
        f"{counted(found['steps'], 'step')}, chunk of {policy['chunk_size']}, on {found['device']}; {found['observation']}"
    )
    subject.say_whose(policy, console)
    if found["status"]["plan"]:
        console.line(found["status"]["plan"])
    warning = system.busy(found)
    if warning:
        console.line(warning)
    console.line()
    rows = [
        [
            stage,
            milliseconds(figures["stock_ms"]),
            milliseconds(figures["fast_ms"]),
            f"{figures['share']:.0%}",
            f"{figures['ratio']:.2f}x",
        ]
        for stage, figures in found["stages"].items()
    ]
    whole = [milliseconds(found["stock_ms"]), milliseconds(found["fast_ms"]), "", f"{found['ratio']:.2f}x"]
    title = f"One action chunk, precision {found['precision']}, backend {found['backend']}"
    console.table(
        title, ["stage", "stock ms", "fast ms", "fast share", "ratio"], [*rows, ["whole chunk (p50)", *whole]]
    )
    rows = [
        [
            name,
            *(milliseconds(found[name][f"{which}_ms"]) for which in ("min", "p50", "p95", "p99")),
            f"{1000 / found[name]['p50_ms']:.2f}",
            mebibytes(found["peak_bytes"][name]),
        ]
        for name in ("stock", "fast")
    ]
    title = f"{counted(found['rounds'], 'round')} each, in turn"
    console.table(title, ["", "best ms", "p50 ms", "p95 ms", "p99 ms", "chunks/s", "peak memory"], rows)
    if warning:
        console.line(
            f"Ratio of the best rounds, which other work disturbed least: {found['ratio_of_best']:.2f}x"
        )
    same = ", every bit the same" if found["max_abs"] == 0 else ""
    console.line(
        f"Error against stock: relative L2 {found['rel_l2']:.2e}, max abs {found['max_abs']:.2e}{same}; "
        f"{found['precision']} keeps its bound"
    )


def check_plot(path: str) -> None:
    """CommandError for a file type that matplotlib does not write; nothing where it is not installed."""
    try:
        from ..measure.plot import KINDS
    except ImportError:
        return
    if Path(path).suffix.lstrip(".").lower() not in KINDS:
        raise CommandError(f"--plot {path}: no kind of picture; accepted are {', '.join(sorted(KINDS))}")


def draw(chart: str, found: Any, path: str, console: Console) -> None:
    """Saves the chart of this name, or prints why there is none."""
    try:
        from ..measure.plot import stage_bars, tuning_bars
    except ImportError:
        console.line('no chart: matplotlib is not installed; run `pip install "smolvla_fast[cli]"`')
        return
    try:
        {"stages": stage_bars, "tuning": tuning_bars}[chart](found, path)
    except (OSError, ValueError) as reason:
        raise cannot_write(path, reason, "--plot") from reason
    console.line(f"wrote {path}")
