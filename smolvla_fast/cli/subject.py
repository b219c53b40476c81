"""The policy and the observation that `demo` and `verify` work on, from the same arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends import BACKENDS
from ..precision import TIERS, resolve_tier
from .console import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_argument_group("policy")
    policy.add_argument(
        "--policy.path", dest="policy_path", metavar="FOLDER_OR_HUB_ID",
        help="a real checkpoint, such as lerobot/smolvla_base; without it, random weights are made offline",
    )  # fmt: skip
    policy.add_argument("--size", choices=("full", "tiny"), default="full", help="of the policy made offline")
    policy.add_argument(
        "--layout", choices=("auto", "fp32", "mixed"), default="auto",
        help="dtypes of the weights; auto: as the checkpoint loads, or for a made policy fp32 on a CPU and "
        "LeRobot's mixed bf16 layout on a GPU",
    )  # fmt: skip
    policy.add_argument("--cameras", type=positive, help="camera frames in the observation (made policy: 2)")
    policy.add_argument(
        "--steps", type=positive, help="denoise steps, `num_steps` of the policy's configuration"
    )
    policy.add_argument("--seed", type=int, default=0, help="of made weights, observation and noise")
    run = parser.add_argument_group("run")
    run.add_argument("--precision", default="auto", help=f"{', '.join(('auto', *TIERS))} (default: auto)")
    run.add_argument("--backend", default="auto", help=f"{', '.join(('auto', *BACKENDS))} (default: auto)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    run.add_argument("--threads", type=positive, help="CPU threads (default: torch's)")
    run.add_argument("--json", metavar="PATH", help="write the figures to this file")


def positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def check(args: argparse.Namespace) -> torch.device:
    """Refuses what cannot work before any weight is made; returns the device."""
    try:
        resolve_tier(args.precision, torch.float32)
    except ValueError as error:
        raise CommandError(f"--precision: {error}") from error
    if find_spec("lerobot") is None:
        raise CommandError(
            "lerobot is not installed, and it holds the SmolVLA that is compared; "
            'run `pip install "smolvla_fast[lerobot,cli]"`, or `make venv` in a checkout'
        )
    return resolve_device(args.device)


def resolve_device(name: str) -> torch.device:
    """The device that ``--device`` names; "auto" is the GPU where there is one. Raises CommandError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wish = re.fullmatch(r"cpu|cuda(?::([0-9]+))?", name)
    if wish is None:
        raise CommandError(f"--device {name}: not a device; accepted are auto, cpu, cuda, cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise CommandError(
            f"--device {name}: torch sees no CUDA GPU; use --device cpu, or see `smolvla-fast doctor`"
        )
    # Before torch.device, which fails at a number that is no GPU's in ways of its own.
    if wish[1] and int(wish[1]) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise CommandError(
            f"--device {name}: no such GPU; accepted here are {there}, which `smolvla-fast doctor` lists"
        )
    return torch.device(name)


def make_policy(args: argparse.Namespace, device: torch.device) -> Any:
    """The policy that the arguments name, in eval mode on the device."""
    if args.policy_path is not None:
        policy = _load(args.policy_path, device)
        if args.layout == "mixed":
            raise CommandError(
                "--layout mixed is for made policies; a checkpoint keeps the dtypes it loads with"
            )
        if args.layout == "fp32":
            policy.float()
    else:
        from ..testing import make_policy

        layout = ("mixed" if device.type == "cuda" else "fp32") if args.layout == "auto" else args.layout
        policy = make_policy(
            args.size, seed=args.seed, cameras=args.cameras or 2, layout=layout, device=device
        )
    if args.steps is not None:
        policy.config.num_steps = args.steps
    return policy


def _load(path: str, device: torch.device) -> Any:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    folder = Path(path).expanduser()
    if folder.exists():
        path = str(folder)
        if not (folder / "config.json").is_file():
            raise CommandError(
                f"--policy.path {path}: no config.json in it; give the folder of a saved SmolVLA policy"
            )
    elif path.startswith((".", "~", os.sep)) or path.count("/") != 1:
        raise CommandError(
            f"--policy.path {path}: no such folder; give the folder of a saved SmolVLA policy or a Hub id "
            "such as lerobot/smolvla_base"
        )
    try:
        return SmolVLAPolicy.from_pretrained(path).to(device).eval()
    except Exception as error:
        # The Hub, safetensors, draccus and transformers each raise errors of their own, with long traces.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CommandError(
            f"--policy.path {path}: cannot load it ({type(error).__name__}: {reason}); give the folder of a "
            "saved SmolVLA policy, or a Hub id if this machine can reach the Hub"
        ) from error


def unnormalized(path: str, config: Any) -> str | None:
    """What a checkpoint's own processors do not normalise although its configuration has a mode for it, as a message.

    raises  CommandError for files of processors that cannot be read
    """
    from ..smolvla.processor_smolvla import not_normalised, unnormalized_in

    path = str(Path(path).expanduser())
    try:
        faults = unnormalized_in(config, path)
    except (OSError, ValueError) as error:
        if not Path(path).is_dir() and isinstance(error, OSError):
            return None  # a Hub that cannot be reached says nothing of processors
        raise CommandError(f"--policy.path {path}: cannot read its processors: {error}") from error
    if not faults:
        return None
    return (
        f"--policy.path {path}: its processors leave a robot's values as they are, {not_normalised(faults)}; save them "
        "again with the statistics of the training data (make_pre_post_processors(config, folder, dataset_stats=...) and "
        "save_pretrained), or say IDENTITY in normalization_mapping of config.json and of the processors if that is meant"
    )


def make_observation(policy: Any, args: argparse.Namespace, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """One structured observation and its noise."""
    from .. import testing

    try:
        batch = testing.make_observation(policy, seed=seed, cameras=args.cameras)
    except ValueError as error:
        raise CommandError(f"--cameras: {error}") from error
    return batch, testing.make_noise(policy, seed=seed)


def describe(policy: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What was run, for the head of the figures."""
    dtypes = Counter[str]()
    for parameter in policy.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {
        "source": args.policy_path or f"{args.size} size, random weights, seed {args.seed}",
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "chunk_size": policy.config.chunk_size,
        "batch": 1,
    }
