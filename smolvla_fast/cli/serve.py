"""Starts LeRobot's policy server, which imports no plugins, and patches every SmolVLA policy that a client loads.
With --fleet: many clients at a time on one policy, in batches, by Ray Serve.

Flags not listed here go to the server, such as --host=0.0.0.0 --port=8080 --fps=30
(lerobot/async_inference/configs.py). Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import signal
import socket
from contextlib import suppress
from typing import Any, NoReturn

from .. import auto_patch
from ..measure.console import CommandError, Console
from ..model.precision import TIERS
from ..ops.select import BACKENDS
from .subject import check_checkpoint, positive, seed, up_to

PASSES_ON = True
"""Unknown flags are the server's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=("auto", *TIERS), help=f"the tier (default: {auto_patch.PRECISION}, or auto)"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        help=f"who computes (default: {auto_patch.BACKEND}, or auto)",
    )
    fleet = parser.add_argument_group("many clients")
    fleet.add_argument("--fleet", action="store_true", help="serve many clients; needs --policy.path")
    for flag, kind, text in FLEET:
        fleet.add_argument(flag, type=kind, help=text)


FLEET = (
    ("--policy.path", str, "what all clients are served and have to ask for: a folder or a Hub id"),
    ("--replicas", positive, "copies of the policy, one a GPU (default: 1)"),
    ("--max-batch", positive, "observations in one batch at most (default: 8)"),
    ("--batch-wait-ms", up_to(1000), "how long an observation waits for others (default: 3)"),
    ("--ray-address", str, "of a Ray cluster that this machine is in (default: a Ray of its own)"),
    ("--metrics-port", positive, "of its own Ray's metrics (default: a free one)"),
    ("--seed", seed, "of every client's noise (default: each client's is drawn)"),
)
"""Flags that mean nothing without --fleet."""


def run(args: argparse.Namespace, console: Console) -> int:
    flags = {flag: getattr(args, flag[2:].replace("-", "_")) for flag, *_ in FLEET}
    given = [flag for flag, value in flags.items() if value is not None]
    if given and not args.fleet:
        raise CommandError(f"{given[0]} is for many clients; add --fleet, or leave it out")
    if args.fleet:
        if flags["--policy.path"] is None:
            raise CommandError("--fleet: no --policy.path; give the one policy that all clients are served")
        check_checkpoint(flags["--policy.path"])
    try:
        import draccus
        from lerobot.async_inference import policy_server
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    except ImportError as missing:
        raise CommandError(f"{missing}; `pip install 'lerobot[smolvla,async]'`") from missing
    try:
        config = draccus.parse(
            policy_server.PolicyServerConfig, args=args.passed_on, prog="smolvla-fast serve"
        )
    except Exception as error:  # draccus, YAML and the server's own checks each raise their own
        cause = error.__cause__ or error if "instantiate" in str(error) else error
        if isinstance(cause, ZeroDivisionError):  # of LeRobot's 1 / fps
            cause = ValueError("fps must be above 0, got 0")
        raise CommandError(
            f"{' '.join(args.passed_on)}: {' '.join(str(cause).split())}; accepted are --host=NAME, --port=1 to 65535, "
            "--fps=a whole number above 0, --inference_latency and --obs_queue_timeout=seconds"
        ) from error
    check_address(config.host, config.port)
    if args.fleet:
        run_fleet(config, flags, args.precision, args.backend, console)
    for name, wish in ((auto_patch.PRECISION, args.precision), (auto_patch.BACKEND, args.backend)):
        if wish is not None:
            os.environ[name] = wish
    auto_patch.patch_as_loaded(SmolVLAPolicy)
    policy_server.serve(config)
    return 0


def run_fleet(
    config: Any, flags: dict[str, Any], precision: str | None, backend: str | None, console: Console
) -> NoReturn:
    try:
        from lerobot.configs.policies import PreTrainedConfig

        from ..fleet.cluster import CannotDeploy, connected, deployed
        from ..fleet.front import Front, listen
    except ImportError as missing:
        raise CommandError(f'{missing}; `pip install "smolvla_fast[fleet]"`') from missing
    path, count, most = flags["--policy.path"], flags["--replicas"] or 1, flags["--max-batch"] or 8
    address = f"{config.host}:{config.port}"
    try:
        with (
            connected(flags["--ray-address"], flags["--metrics-port"]) as metrics,
            deployed(
                path, count, most, (flags["--batch-wait-ms"] or 3) / 1000, precision, backend
            ) as replicas,
        ):
            console.line(
                f"{path}: {replicas.report.remote().result()}; replicas: {count}; metrics: {metrics}"
            )
            front = Front(replicas, path, PreTrainedConfig.from_pretrained(path), config, flags["--seed"])
            # Not asyncio.run, which closes the loop: gRPC's own thread then still calls it.
            loop = asyncio.new_event_loop()
            task = loop.create_task(listen(front, address, lambda _: console.line(f"ready: {address}")))
            for stop in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(stop, task.cancel)
            with suppress(asyncio.CancelledError):
                loop.run_until_complete(task)
            raise KeyboardInterrupt
    except CannotDeploy as error:
        raise CommandError(" ".join(str(error).split())) from error


def check_address(host: str, port: int) -> None:
    """CommandError for an address that cannot be listened on. gRPC shares a port with another gRPC server silently."""
    refused: list[OSError] = []
    places: list[Any] = []
    try:
        places = socket.getaddrinfo(str(host).strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise CommandError(
            f"--host={host}: no such address ({error}); give another, such as localhost"
        ) from error
    for family, kind, protocol, _, address in places:
        try:
            with socket.socket(family, kind, protocol) as probe:
                # As servers do, so that a port in TIME_WAIT is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except OSError as error:
            refused.append(error)
    # One of two addresses may be refused: a machine may have no IPv6.
    if len(refused) == len(places) or any(error.errno == errno.EADDRINUSE for error in refused):
        raise CommandError(
            f"--host={host} --port={port}: cannot listen there ({refused[0].strerror}); give another --port or --host"
        )
