"""What a plan was measured for: the machine, its software, the policy's shapes and dtypes, the tier, the wish."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import torch

from ..model.dims import read_pair_dims
from ..ops import extension, processor


def machine_key(device: torch.device) -> dict[str, Any]:
    """What of a device decides who is fastest on it. Of two equal GPUs it is the same."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        return {
            "type": device.type,
            "name": facts.name,
            "capability": getattr(facts, "gcnArchName", None) or f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "gibibytes": round(facts.total_memory / 2**30),  # drivers keep different shares for themselves
            "cuda_kernels": bool(extension.build_record().get("cuda", {}).get("built")),
        }
    found = {
        "type": device.type, "name": processor.name(), "model": processor.model(), "cores": os.cpu_count(),
    }  # fmt: skip
    if device.type != "cpu":
        return found
    level = extension.load("cpu").level() if extension.available("cpu") else None
    return {**found, "features": processor.features(), "level": level}


def here(device: torch.device) -> dict[str, Any]:
    """The part of a key that no policy changes."""
    from .. import __version__  # late: the package imports this before it knows its version

    return {
        "device": machine_key(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__.partition("+")[0],
            "smolvla_fast": __version__,
            **(_gpu_versions() if device.type == "cuda" else {}),
        },
    }


def _gpu_versions() -> dict[str, str | None]:
    """What of the software changes times on a GPU alone."""
    return {"cuda": torch.version.cuda, "hip": torch.version.hip, "triton": _triton()}


def key_of(model: Any, tier: str, backend: str, device: torch.device) -> dict[str, Any]:
    """All that a plan was measured for, as JSON values.

    model    a ``VLAFlowMatching``, or the ``SmolVLMWithExpertModel`` in it: chunks and single layers share a plan, and a
             layer does not know whose heads it serves
    tier     its name      backend  the wish, "auto" or a name
    """
    pair = getattr(model, "vlm_with_expert", model)
    return {**here(device), "shapes": shapes_of(pair), "tier": tier, "backend": backend}


def shapes_of(pair: Any) -> dict[str, Any]:
    """Dimensions of a pair, and every shape and dtype that a weight of it has."""
    weights = {
        f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
        for x in pair.parameters()
    }
    return {**asdict(read_pair_dims(pair)), "weights": sorted(weights)}


def _triton() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def text(key: Any) -> str:
    """A key, or a part of one, in the one way that it is written."""
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def differences(found: Any, asked: Any, name: str = "") -> list[str]:
    """What differs between two keys: "threads (2, here 4)"."""
    if isinstance(found, dict) and isinstance(asked, dict):
        return [
            each
            for part in sorted({*found, *asked}, key=str)
            for each in differences(found.get(part), asked.get(part), f"{name}.{part}" if name else str(part))
        ]
    return [] if text(found) == text(asked) else [f"{short(name)} ({short(found)}, here {short(asked)})"]


def short(value: Any) -> str:
    """A value of a file for a log: one line, not long."""
    said = "".join(letter if letter.isprintable() else "?" for letter in str(value))
    return said if len(said) <= 80 else said[:77] + "..."
