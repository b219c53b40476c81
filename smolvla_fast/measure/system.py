"""What stands above every figure: versions, processor, GPU, compiler, commit. Does not import LeRobot."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ops import processor
from .console import counted

PACKAGES = ("torch", "transformers", "lerobot", "triton", "numpy")


def versions() -> dict[str, str | None]:
    """Version by package name; None for what is not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "smolvla_fast": __version__,
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability (AMD: architecture) and memory of each GPU that torch calls "cuda"; [] without one."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": facts.name,
                "compute_capability": getattr(facts, "gcnArchName", f"{facts.major}.{facts.minor}"),
                "bytes": facts.total_memory,
            }
        )
    return found


def first_line(command: Sequence[str], match: str = "") -> str | None:
    """The first line of a program's output that holds ``match``; None where it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in done.stdout.splitlines() if match in line), None)


def compiler() -> str | None:
    """The C++ compiler that an installation would use, with its version."""
    for name in filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")):
        line = first_line([*name.split(), "--version"])
        if line:
            return line
    return None


def cuda_homes() -> list[str]:
    """Where nvcc is looked for after the PATH, best first."""
    # The same as in csrc/ninja_build.py, and the tests compare the two: the build must not import a package that
    # imports torch, and in a checkout csrc/ is no part of the package.
    return [
        home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home
    ]


def nvcc() -> str | None:
    """The version line of the CUDA compiler that an installation would use; None where it finds none that runs."""
    programs = (Path(home, "bin", "nvcc") for home in cuda_homes())
    found = shutil.which("nvcc") or next((str(path) for path in programs if path.exists()), None)
    return first_line([found, "--version"], "release") if found else None


def driver() -> str | None:
    """The NVIDIA driver's version."""
    return first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def commit() -> str | None:
    """The checkout's commit, with "+changes" where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    name = first_line(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if name is None:
        return None
    changed = first_line(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return name + ("+changes" if changed else "")


def machine() -> str:
    """The machine in one phrase: its GPU, or its processor and cores."""
    cards, cores = gpus(), os.cpu_count()
    if cards:
        return cards[0]["name"]
    return ", ".join([processor.name(), *([counted(cores, "core")] if cores else [])])


def load() -> float | None:
    """Processes that wanted a core in the last minute, on average; None where the system does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def busy(found: dict[str, Any]) -> str | None:
    """A warning where the machine had other work before the measurement began, or None."""
    if None in (found["load"], found["cores"]) or found["load"] <= 0.5 * found["cores"]:
        return None
    return (
        f"This machine was busy when the run began: load {found['load']:.1f} on {found['cores']} cores. "
        "Times are unsteady; run again on an idle machine."
    )


def facts() -> dict[str, Any]:
    """Everything a figure needs beside it, ready for JSON."""
    found = versions()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "cpu": processor.name(),
        "cpu_model": processor.model(),
        "cpu_features": processor.features(),
        "cpu_limit": processor.limit() or None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "driver": driver() if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "load": load(),
        "commit": commit(),
        **{f"{name}_version": version for name, version in found.items()},
    }


def headline(found: dict[str, Any]) -> str:
    """The facts in one line, for the head of a table."""
    parts = [
        found["machine"],
        counted(found["threads"], "thread"),
        f"torch {found['torch_version']}",
        f"lerobot {found['lerobot_version'] or 'not installed'}",
        f"smolvla_fast {found['smolvla_fast_version']}"
        + (f" ({found['commit']})" if found["commit"] else ""),
    ]
    return ", ".join(parts)
