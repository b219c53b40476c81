"""Starts LeRobot's policy server, which imports no plugins, and patches every SmolVLA policy that a client loads.
With --fleet: many clients at a time on one policy, in batches, by Ray Serve.

Flags not listed here go to the server, such as --host=0.0.0.0 --port=8080 --fps=30
(lerobot/async_inference/configs.py). Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import errno
import os
import socket
from typing import Any

from .. import auto_patch
from ..measure.console import CommandError, Console
from ..model.precision import TIERS
from ..ops.select import BACKENDS
from . import serve_fleet

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
    serve_fleet.add_arguments(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    fleet = serve_fleet.given(args)
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
        serve_fleet.run(fleet, config, args.precision, args.backend, console=console)
    for name, wish in ((auto_patch.PRECISION, args.precision), (auto_patch.BACKEND, args.backend)):
        if wish is not None:
            os.environ[name] = wish
    auto_patch.patch_as_loaded(SmolVLAPolicy)
    policy_server.serve(config)
    return 0


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
