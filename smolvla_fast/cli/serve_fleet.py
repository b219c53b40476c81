"""``serve --fleet``: its flags, and the server that Ray Serve computes for."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..measure.console import CommandError, Console
from . import checkpoint
from .subject import positive, seed, up_to

FLAGS = (
    ("--policy.path", str, "what all clients are served and have to ask for: a folder or a Hub id"),
    ("--replicas", positive, "copies of the policy, one a GPU (default: 1)"),
    ("--max-batch", positive, "observations in one batch at most (default: 8)"),
    ("--batch-wait-ms", up_to(1000), "how long an observation waits for others (default: 3)"),
    ("--ray-address", str, "of a Ray cluster that this machine is in (default: a Ray of its own)"),
    ("--metrics-port", positive, "of its own Ray's metrics (default: a free one)"),
    ("--seed", seed, "of every client's noise (default: each client's is drawn)"),
)
"""Flags that mean nothing without --fleet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("many clients")
    group.add_argument("--fleet", action="store_true", help="serve many clients; needs --policy.path")
    for flag, kind, text in FLAGS:
        group.add_argument(flag, type=kind, help=text)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Those of ``FLAGS`` that were given. Raises CommandError where they cannot be served with."""
    found = {flag: vars(args)[flag[2:].replace("-", "_")] for flag, *_ in FLAGS}
    flags = {flag: value for flag, value in found.items() if value is not None}
    if flags and not args.fleet:
        raise CommandError(f"{next(iter(flags))} is for many clients; add --fleet, or leave it out")
    if {"--ray-address", "--metrics-port"} <= flags.keys():
        raise CommandError("--metrics-port is of a Ray of its own; leave it out, or --ray-address")
    if args.fleet:
        if "--policy.path" not in flags:
            raise CommandError("--fleet: no --policy.path; give the one policy that all clients are served")
        checkpoint.check(flags["--policy.path"])
    return flags


def run(flags: dict[str, Any], config: Any, *how: str | None, console: Console) -> NoReturn:
    """Serves until it is interrupted.

    flags  from ``given``      config  LeRobot's of its server      how  precision and backend, as ``Replica`` takes them
    """
    from lerobot.configs.policies import PreTrainedConfig

    from ..fleet.cluster import connected, deployed
    from ..fleet.front import Front, serve

    path, count, address = flags["--policy.path"], flags.get("--replicas", 1), f"{config.host}:{config.port}"
    batch = flags.get("--max-batch", 8), flags.get("--batch-wait-ms", 3) / 1000
    ray = connected(flags.get("--ray-address"), flags.get("--metrics-port"))
    with ray as metrics, deployed(path, count, *batch, *how) as replicas:
        console.line(f"{path}: {replicas.report.remote().result()}; replicas: {count}; metrics: {metrics}")
        front = Front(replicas, path, PreTrainedConfig.from_pretrained(path), config, flags.get("--seed"))
        serve(front, address, lambda _: console.line(f"ready: {address}"))
    raise KeyboardInterrupt
