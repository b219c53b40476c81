"""The policy and observation of `demo`, `tune` and `verify`, from the same arguments."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..measure.console import CommandError, Console
from ..model.precision import TIERS, resolve_tier
from ..ops.select import BACKENDS, select
from ..patching.settings import disabled
from ..smolvla.hub import CONFIG_NAME
from . import checkpoint


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
    policy.add_argument("--cameras", type=up_to(32), help="camera frames in the observation (made policy: 2)")
    policy.add_argument(
        "--steps", type=positive, help="denoise steps, `num_steps` of the policy's configuration"
    )
    policy.add_argument("--seed", type=seed, default=0, help="of made weights, observation and noise")
    run = parser.add_argument_group("run")
    run.add_argument("--precision", default="auto", help=f"{', '.join(('auto', *TIERS))} (default: auto)")
    run.add_argument("--backend", default="auto", help=f"{', '.join(('auto', *BACKENDS))} (default: auto)")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    run.add_argument("--threads", type=threads, help="CPU threads (default: torch's)")
    run.add_argument("--json", metavar="PATH", help="write the figures to this file")


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune", choices=("cached", "off"), default="cached",
        help="who computes what: by the plan of this machine where there is one, or by the defaults",
    )  # fmt: skip


def positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


def up_to(most: int) -> Callable[[str], int]:
    """Reads a whole number from 1 to ``most``."""

    def read(text: str) -> int:
        value = positive(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most}")
        return value

    return read


def threads(text: str) -> int:
    # With far more threads than cores, OpenMP fails to start them and ends the process.
    return up_to(4 * (os.cpu_count() or 1))(text)


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**32 - 1")
    return value


def why_not_lerobots() -> str | None:
    """Why LeRobot's class cannot be used; None where it can."""
    if find_spec("lerobot") is None:
        return "LeRobot is not installed"
    try:
        import lerobot.policies.smolvla.modeling_smolvla  # noqa: F401
    except Exception as error:  # a release without it, or a broken installation
        return f"LeRobot's SmolVLA cannot be imported ({type(error).__name__}: {error})"
    return None


def check(args: argparse.Namespace, precisions: Sequence[str] = ()) -> torch.device:
    """Refuses arguments that cannot work before any weight is made. Returns the device.

    precisions  several tiers in place of --precision's one
    """
    names = precisions or [args.precision]
    try:
        tiers = [resolve_tier(name, torch.float32) for name in names]
    except ValueError as error:
        raise CommandError(f"--precision: {error}") from error
    device = resolve_device(args.device)
    for name, tier in zip(names, tiers, strict=True) if not disabled() else ():
        try:
            select(args.backend, device, tier.stock_order, tier.quantized)
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"--precision {name} --backend {args.backend}: {error}") from error
    if args.policy_path is not None:
        if args.layout == "mixed":
            raise CommandError(
                "--layout mixed is for made policies; a checkpoint keeps the dtypes it loads with"
            )
        checkpoint.check(args.policy_path)
    return device


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
    # Checked before torch.device, whose errors name no GPUs.
    if wish[1] and int(wish[1]) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise CommandError(
            f"--device {name}: no such GPU; accepted here are {there}, which `smolvla-fast doctor` lists"
        )
    return torch.device(name)


def make_policy(args: argparse.Namespace, device: torch.device) -> Any:
    """The policy of the arguments, in eval mode on the device: of LeRobot's class where that is installed."""
    if args.policy_path is not None:
        if why_not_lerobots():
            from ..smolvla import SmolVLAPolicy
        else:
            from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy  # type: ignore[no-redef]
        policy = checkpoint.load(args.policy_path, device, SmolVLAPolicy)
        if args.layout == "fp32":
            policy.float()
    else:
        from ..testing.policies import make_policy

        layout = ("mixed" if device.type == "cuda" else "fp32") if args.layout == "auto" else args.layout
        policy = make_policy(
            args.size, origin="ours" if why_not_lerobots() else "lerobot", seed=args.seed, cameras=args.cameras or 2,
            layout=layout, device=device,
        )  # fmt: skip
    if args.steps is not None:
        policy.config.num_steps = args.steps
    return policy


def make_observation(policy: Any, args: argparse.Namespace, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A drawn observation (``testing.make_observation``) and its noise."""
    from ..testing import policies

    try:
        batch = policies.make_observation(policy, seed=seed, cameras=args.cameras)
    except Exception as error:  # a configuration may declare sizes that no frame or state can have
        if args.cameras is not None and str(error).startswith("cameras="):
            raise CommandError(f"--cameras {args.cameras}: {error}") from error
        raise CommandError(
            f"no observation can be made for input_features={policy.config.input_features} of {CONFIG_NAME}: {error}"
        ) from error
    return batch, policies.make_noise(policy, seed=seed)


def stock_fails(error: Exception) -> CommandError:
    """The CommandError for an error of stock's, which raises its own for each configuration that it refuses."""
    return CommandError(
        f"stock itself computes no chunk for this policy ({type(error).__name__}: {error}); see its {CONFIG_NAME}"
    )


def count_dtypes(policy: Any) -> Counter[str]:
    """How many parameters have which dtype."""
    dtypes = Counter[str]()
    for parameter in policy.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return dtypes


def describe(policy: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The policy that was run, for the head of the figures."""
    dtypes = count_dtypes(policy)
    return {
        "source": args.policy_path or f"{args.size} size, random weights, seed {args.seed}",
        "whose": "smolvla_fast" if why_not_lerobots() else "lerobot",
        "parameters": sum(dtypes.values()),
        "dtypes": dict(dtypes),
        "chunk_size": policy.config.chunk_size,
        "batch": 1,
    }


def say_whose(policy: dict[str, Any], console: Console) -> None:
    """Prints what "stock" is where it is not LeRobot's. ``policy`` is from ``describe``."""
    if policy["whose"] != "lerobot":
        console.line(
            f"{why_not_lerobots()}: stock is smolvla_fast's own SmolVLA in plain PyTorch. To compare with "
            "LeRobot's, run `pip install 'smolvla_fast[lerobot]'`"
        )
