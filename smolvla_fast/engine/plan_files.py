"""Where plans lie: JSON files in the user's cache folder, and those of measured machines that ship with the package.

A plan holds for one device, these versions, one policy's sizes and dtypes, one tier and one number of threads. Its file is
named after all that, holds it in full, and is used where it is equal, and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date, datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_dir

from ..model.dims import read_dims
from ..ops import extension, processor
from ..ops.plan import Plan

logger = logging.getLogger("smolvla_fast")

FOLDER = "SMOLVLA_FAST_CACHE_DIR"
SHIPPED = Path(__file__).parents[1] / "plans"
FORMAT = 1
LARGEST = 1 << 22
"""Bytes of a file that may still be a plan."""

_logged: set[str] = set()


def folder() -> Path:
    """The user's plans. Raises OSError where the system names no folder for caches."""
    given = os.environ.get(FOLDER)
    try:
        return Path(given).expanduser() / "plans" if given else Path(user_cache_dir("smolvla_fast")) / "plans"
    except Exception as error:  # each system has its own way to have no home
        raise OSError(f"this system names no cache folder ({error!r}); name one in {FOLDER}") from error


def _places() -> list[Path]:
    """Where plans may lie, the user's first."""
    try:
        return [folder(), SHIPPED]
    except OSError as error:
        _log_once(f"smolvla_fast: no plan of yours is used: {error}")
        return [SHIPPED]


def key_of(model: Any, tier: str, backend: str, device: torch.device) -> dict[str, Any]:
    """What a plan for this model (a ``VLAFlowMatching``) on this device has to be for. JSON values."""
    dtypes = {str(each.dtype).removeprefix("torch.") for each in model.parameters()}
    return {
        **machine(device),
        "sizes": asdict(read_dims(model)),
        "dtypes": sorted(dtypes),
        "tier": tier,
        "backend": backend,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The part of a key that is the same for every policy here."""
    return {"device": _device(device), "threads": torch.get_num_threads(), "versions": _versions()}


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        level = extension.load("cpu").levels()[-1] if extension.available("cpu") else None
        return {
            "type": "cpu",
            "name": processor.name(),
            "model": processor.model(),
            "features": processor.features(),
            "kernels": level,
        }
    found: dict[str, Any] = {"type": device.type}
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        found["name"] = facts.name
        found["architecture"] = getattr(facts, "gcnArchName", f"{facts.major}.{facts.minor}")
        found["multiprocessors"] = facts.multi_processor_count
        found["gigabytes"] = round(facts.total_memory / 2**30)
    return found


def _versions() -> dict[str, str | None]:
    from .. import __version__  # the package is being imported when this module is

    # The local part of torch's version says how it was built for GPUs; the two fields behind it say so too.
    found: dict[str, str | None] = {"torch": torch.__version__.partition("+")[0]}
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "smolvla_fast": __version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    return found


def name_of(key: dict[str, Any]) -> str:
    """The name of a plan's file: readable, and another for every key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    device = key["device"]
    readable = re.sub(r"[^A-Za-z0-9]+", "-", str(device.get("name") or device["type"])).strip("-")[:48]
    return f"{readable}-{key['tier']}-{digest}.json".lower()


def find(key: dict[str, Any]) -> Plan | None:
    """The user's plan for this key, else one that ships, else None. What is there and no plan is named in the log, once."""
    for place in _places():
        path = place / name_of(key)
        try:
            path.lstat()
            found = read(path)
            if found["key"] != key:
                raise ValueError("it is for another machine, policy or version")
            return Plan(found["choices"], str(path), found["measured"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:
            _log_once(
                f"smolvla_fast: the plan {path} is ignored: {error}; `smolvla-fast tune` measures a new one"
            )
    return None


def read(path: Path) -> dict[str, Any]:
    """A plan's file, checked: ``key``, ``choices``, ``measured`` and ``record``. Raises OSError, ValueError."""
    if not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST} bytes")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({type(error).__name__})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}")
    choices, measured = found.get("choices"), found.get("measured")
    texts = isinstance(choices, dict) and all(isinstance(each, str) for each in choices.values())
    if not (texts and isinstance(found.get("key"), dict) and isinstance(measured, str)):
        raise ValueError("key, choices or measured is missing in it, or of another type")
    date.fromisoformat(measured)
    return found


def save(key: dict[str, Any], plan: Plan, record: dict[str, Any]) -> Path:
    """Writes the plan for this key, whole or not at all. Raises OSError naming the folder and what to do.

    record  what was measured, for whoever wants to know
    """
    path = folder() / name_of(key)
    content = {"format": FORMAT, "key": key, "choices": dict(plan.choices), "measured": plan.measured}
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder: a rename replaces a file in one step only there.
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".plan-", delete=False) as file:
            aside = file.name
            json.dump({**content, "record": record}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        if aside is not None and os.path.exists(aside):
            os.unlink(aside)
        raise OSError(
            f"cannot write the plan to {path.parent}: {error.strerror or error}; make that folder writable, or name "
            f"another in {FOLDER}"
        ) from error
    return path


def age(plan: Plan) -> str:
    """How old a plan is, in words."""
    days = (datetime.now(timezone.utc).date() - date.fromisoformat(plan.measured)).days
    return "of today" if days <= 0 else f"{days} day{'s' * (days > 1)} old"


def described(plan: Plan) -> str:
    """A plan in one phrase, for ``status``."""
    count = len(plan.choices)
    return f"{count} choice{'s' * (count != 1)}, measured {plan.measured} ({age(plan)}), {plan.origin}"


def plans() -> Iterator[tuple[Path, dict[str, Any] | None, str]]:
    """Every file that lies where plans do: its contents, or None and the reason."""
    for place in _places():
        for path in sorted(place.glob("*.json")) if place.is_dir() else ():
            try:
                yield path, read(path), ""
            except (OSError, ValueError) as error:
                yield path, None, str(error)


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        logger.warning(text)
