"""The CPU kernels at levels that this processor lacks: the same sources, with functions in the place of its instructions.

SIMDe has most of the functions, emulated.h the others. What is computed is what the processor would compute. This does not
test which level is chosen, what the compiler makes of it, or ops whose levels differ by the compiler's target alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int8_attention
from support.emulated_build import HERE, built


def library() -> Path:
    """Path of the emulated extension; skips the test where it cannot be built."""
    found = built() if HERE else "it is built on x86-64, not under Windows"
    return found if isinstance(found, Path) else pytest.skip(found)


@cache
def _module() -> ModuleType:
    # By another name than the extension's: pybind11 would give what is loaded under it.
    spec = importlib.util.spec_from_file_location("emulated._cpu", library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def instead() -> Iterator[None]:
    """Inside, it is the CPU extension."""
    module, load = _module(), extension._load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "_load", lambda kind: (module, "") if kind == "cpu" else load(kind))
        yield


@contextmanager
def integers_at(level: str) -> Iterator[None]:
    """Inside, kernels of integers run at this one of ``int8_attention.LEVELS``, emulated where another is in use here."""
    if level == int8_attention.level():
        yield
        return
    with instead():
        chosen = ctypes.CDLL(str(library()))
        chosen.set_integer_level(int8_attention.LEVELS.index(level))
        try:
            yield
        finally:
            chosen.set_integer_level(0)
