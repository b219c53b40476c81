"""The flags of every suite, said once: for `smolvla-fast bench`, for pytest and for a visit to a GPU."""

from __future__ import annotations

import argparse
from typing import Any

from smolvla_fast.cli.subject import positive, threads
from smolvla_fast.measure.console import CommandError

SECONDS = 600.0
"""A suite ends within so many by default, its preparations included; with --full, within four times as many."""

FLAGS: dict[str, dict[str, Any]] = {
    "--full": dict(action="store_true", help="many rounds: meaningful p95 and p99; four times the time"),
    "--rounds": dict(type=positive, help="rounds of a variant (default: 3 a chunk, 20 an op)"),
    "--seconds": dict(type=positive, help=f"the most a suite may take (default: {SECONDS:.0f})"),
    "--with-compile": dict(action="store_true", help="also time stock under torch.compile (minutes)"),
    "--compile-mode": dict(metavar="MODE", help="its mode (default: max-autotune on a GPU, default elsewhere)"),
    "--cameras": dict(metavar="N,N", help="counts of suite chunk (default: 1,2,3); of cpu and latency one, up to 4 (2)"),
    "--batch": dict(metavar="N,N", help="batch sizes of suite chunk (default: 1), of train (CPU: 1,2, GPU: 8)"),
    "--layers": dict(metavar="N,N", help="VLM layers of suite chunk (default: the configuration's)"),
    "--scaling": dict(action=argparse.BooleanOptionalAction, default=True, help="cpu suite: time by cameras, steps, ..."),
    "--steps": dict(type=positive, help="denoise steps"),
    "--size": dict(choices=("full", "tiny"), default="full", help="policy size (default: full)"),
    "--layout": dict(choices=("fp32", "mixed"), help="dtypes of the weights (CPU: fp32, GPU: mixed)"),
    "--device": dict(help="auto, cpu, cuda, cuda:N (default: auto)"),
    "--threads": dict(type=threads, help="CPU threads (cpu suite: 2)"),
}  # fmt: skip


def add_to(add: Any) -> None:
    """add  ``add_argument`` of argparse, or pytest's ``addoption``"""
    for name, spec in FLAGS.items():
        add(name, **spec)


def seconds(args: Any) -> float:
    """The most a suite may take."""
    return args.seconds or SECONDS * (4 if args.full else 1)


def handed_on(args: argparse.Namespace) -> list[str]:
    """The flags of ``args`` that are not at their defaults, for another process."""
    found = []
    for name, spec in FLAGS.items():
        value = getattr(args, name[2:].replace("-", "_"))
        if value not in (None, spec.get("default", False)):
            switch = name if value else f"--no-{name[2:]}"
            found.append(switch if isinstance(value, bool) else f"{name}={value}")
    return found


def counts(text: str | None, flag: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Whole numbers above 0 with commas between them. Raises CommandError."""
    if text is None:
        return default
    try:
        return tuple(positive(part.strip()) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        accepted = "accepted are whole numbers above 0 with commas between them, such as 1,2,3"
        raise CommandError(f"{flag} {text}: not counts of {flag[2:]}; {accepted}") from error
