"""Checks a patched policy against the reference on several observations and prints the report.

Exit status 0 if every observation passes, 1 if one fails. The reference is stock computed in fp32. The bound is 1.5 times
the error of stock itself in the tier's dtype; for fp32, three times the change of stock when its sums run in other orders
("stock moves"), but at least 1e-5. `--precision exact` requires equal bits.
"""

from __future__ import annotations

import argparse
from typing import Any

from ..measure import system
from ..measure.console import CommandError, Console, check_writable, counted, write_json
from ..measure.rounds import as_stock, threads
from . import subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser)
    subject.add_tune(parser)
    parser.add_argument(
        "--observations", type=subject.positive, default=2, help="how many to check (default: 2)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    import smolvla_fast

    device = subject.check(args)
    if args.json is not None:
        check_writable(args.json, "--json")
    reports: list[dict[str, Any]] = []
    with threads(args.threads), console.progress("verify", 1 + args.observations) as step:
        step("making the policy" if args.policy_path is None else "loading the policy")
        policy = subject.make_policy(args, device)
        fault = args.policy_path and subject.unnormalized(args.policy_path, policy.config)
        if fault:
            raise CommandError(fault)
        try:
            smolvla_fast.patch(policy, precision=args.precision, backend=args.backend, tune=args.tune)
            for index in range(args.observations):
                step(f"observation {index + 1} of {args.observations}")
                batch, noise = subject.make_observation(policy, args, args.seed + index)
                try:
                    reports.append(smolvla_fast.verify(policy, batch, noise=noise).to_dict())
                except Exception:
                    _try_stock(policy, batch, noise)
                    raise
        except (ValueError, RuntimeError) as reason:
            raise CommandError(str(reason)) from reason
        facts = system.facts()
    passed = all(report["passed"] for report in reports)
    found = {**facts, "device": str(device), "policy": subject.describe(policy, args), "passed": passed}
    show({**found, "reports": reports}, console)
    if args.json is not None:
        write_json(args.json, {**found, "reports": reports})
        console.line(f"wrote {args.json}")
    return 0 if passed else 1


def _try_stock(policy: Any, batch: dict[str, Any], noise: Any) -> None:
    """CommandError where stock fails too, for then the patch is not at fault."""
    try:
        with as_stock(policy):
            policy.predict_action_chunk(dict(batch), noise=noise.clone())
    except Exception as error:
        raise subject.stock_fails(error) from error


def show(found: dict[str, Any], console: Console) -> None:
    reports = found["reports"]
    console.line(system.headline(found))
    subject.say_whose(found["policy"], console)
    columns = [
        "observation", "fast rel L2", "bound", "stock rel L2", "stock moves", "fast max abs",
        "stock max abs", "cosine", "worst step", "",
    ]  # fmt: skip
    rows = [
        [
            index + 1,
            f"{report['rel_l2']:.2e}",
            "equal bits" if report["precision"] == "exact" else f"{report['bound']:.2e}",
            f"{report['stock_rel_l2']:.2e}",
            "-" if report["movement"] is None else f"{report['movement']:.2e}",
            f"{report['max_abs']:.2e}",
            f"{report['stock_max_abs']:.2e}",
            f"{report['cosine']:.7f}",
            f"{max(report['velocity_rel_l2']):.2e}",
            "passed" if report["passed"] else "FAILED",
        ]
        for index, report in enumerate(reports)
    ]
    title = f"precision {reports[0]['precision']}, backend {reports[0]['backend']}, against stock in fp32"
    console.table(title, columns, rows)
    good = sum(report["passed"] for report in reports)
    console.line(f"{good} of {counted(len(reports), 'observation')} passed")
