"""Starts LeRobot's policy server, which imports no plugins, with SmolVLA policies patched as clients have them loaded.

Every flag not listed here goes to the server itself, such as --host=0.0.0.0 --port=8080 --fps=30
(lerobot/async_inference/configs.py). Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import os

from .. import loading
from ..backends import BACKENDS
from ..precision import TIERS
from .console import CommandError, Console

PASSES_ON = True
"""Flags that are not ours are LeRobot's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=("auto", *TIERS), help=f"the tier (default: {loading.PRECISION}, or auto)"
    )
    parser.add_argument(
        "--backend", choices=("auto", *BACKENDS), help=f"who computes (default: {loading.BACKEND}, or auto)"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        import draccus
        from lerobot.async_inference import policy_server
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    except ImportError as missing:
        raise CommandError(f"{missing}; `pip install 'lerobot[smolvla,async]'`") from missing
    for name, wish in ((loading.PRECISION, args.precision), (loading.BACKEND, args.backend)):
        if wish is not None:
            os.environ[name] = wish
    loading.patch_as_loaded(SmolVLAPolicy)
    config = draccus.parse(policy_server.PolicyServerConfig, args=args.passed_on)
    policy_server.serve(config)
    return 0
