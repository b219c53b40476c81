"""The compiled extensions: loaded when first asked for, and when one is missing, the reason.

``_cpu`` holds the CPU kernels, ``_cuda`` the CUDA C++ kernels. Both are optional: without them every op runs
in Triton or torch. What the installation compiled, and what not, stands in the package's ``_build.json``.
"""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

KINDS = ("cpu", "cuda")

_RECORD = Path(__file__).parents[1] / "_build.json"
_REBUILD = "install smolvla_fast again (`pip install .`, or `make venv` in a checkout)"


class ExtensionUnavailable(RuntimeError):
    """A compiled extension is missing; the message says why and what to do."""


def load(kind: str) -> ModuleType:
    """The extension module of a kind, "cpu" or "cuda". Raises ExtensionUnavailable with the reason."""
    module, reason = _load(kind)
    if module is None:
        raise ExtensionUnavailable(reason)
    return module


def available(kind: str) -> bool:
    """Whether ``load(kind)`` succeeds."""
    return _load(kind)[0] is not None


def why_missing(kind: str) -> str:
    """The reason why an extension is missing, or an empty string where it is there."""
    return _load(kind)[1]


@cache
def build_record() -> dict[str, dict[str, Any]]:
    """What the installation recorded, by kind: {"built": False, "reason"} or {"built": True, "compiler"...}.

    Empty where nothing was ever compiled, as in a bare checkout.
    """
    try:
        return json.loads(_RECORD.read_text())
    except (OSError, ValueError):
        return {}


@cache
def _load(kind: str) -> tuple[ModuleType | None, str]:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is no extension; accepted are {', '.join(map(repr, KINDS))}")
    name, record = f"smolvla_fast._{kind}", build_record().get(kind, {})
    # The record is asked before the file: after a failed rebuild an older binary may still lie there.
    if record.get("built") is False:
        return None, f"{name} was not compiled: {record['reason']}"
    # torch first: the extension then binds to torch's OpenMP runtime, and there is a single thread pool.
    importlib.import_module("torch")
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        if not record:
            return None, f"{name} was never compiled here; {_REBUILD}"
        return None, f"{name} was compiled but does not load: {error}; {_REBUILD} with this Python"
