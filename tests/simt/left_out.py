"""A kernel's source once more: every statement that orders memory can be left out, every expression given be another one."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from simt import on_the_host
from simt.emulator import build
from support.backends import loaded

ORDERING = (
    r"(?:__syncthreads\(\)|cp_async_(?:commit|wait<.*?>)\(\)|cluster_(?:arrive_relaxed|wait)\(\)|await_earlier_launches\(\)"
    r"|publish_(?:copy|store)_barriers\(\)|await_(?:copies|stores)\([^)]*\));"
)
SWITCH = '\nextern "C" { __attribute__((visibility("default"))) int smolvla_left_out = 0; }\n'


class LeftOut:
    """Of csrc/cuda/<name>.cu.

    wrong    what stands once in the source, and what takes its place
    barriers of a cluster: of each its arrive and its wait, counted from 1, which are left out together as well
    places   of statements that order memory, in the order of the source
    numbers  of all that can be left out or changed: statements from 1, barriers of a cluster from 100, expressions from 200
    """

    def __init__(
        self,
        name: str,
        wrong: Sequence[tuple[str, str]],
        barriers: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        self.source, barriers = build.CSRC / "cuda" / f"{name}.cu", barriers or {}
        self.places: list[str] = []
        of_cluster = 0

        def asked(found: re.Match[str]) -> str:
            nonlocal of_cluster
            line = text[: found.start()].count("\n") + 1
            self.places.append(f"line {line} {found[0]}")
            numbers = [len(self.places)]
            if found[0].startswith("cluster_"):
                of_cluster += 1
                numbers += [100 + i for i, pair in enumerate(barriers.values()) if of_cluster in pair]
            return f"if ({' && '.join(f'smolvla_left_out != {number}' for number in numbers)}) {found[0]}"

        text = self.source.read_text()
        body = re.sub(ORDERING, asked, text)
        for number, (right, other) in enumerate(wrong, 200):
            assert body.count(right) == 1, right
            end = right[len(right.rstrip(",;")) :]
            variant = f"(smolvla_left_out == {number} ? ({other}) : ({right.removesuffix(end)})){end}"
            body = body.replace(right, variant)
        self.text = SWITCH + body
        self.numbers = {place: i + 1 for i, place in enumerate(self.places)}
        self.numbers |= {name: 100 + i for i, name in enumerate(barriers)}
        self.numbers |= {right: i for i, (right, _) in enumerate(wrong, 200)}

    @cached_property
    def library(self) -> Any:
        """All kernels of the library, this one switched. Skips the test where it cannot be built."""
        return loaded(lambda: build.switched(self.source.stem, self.text))

    @contextmanager
    def serving(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.c_int]:
        """Inside, the switched library serves; the number says what is left out."""
        module = self.library
        module.reset()
        module.configure(compute_capability=90)
        on_the_host.install(monkeypatch, module)
        number = ctypes.c_int.in_dll(ctypes.CDLL(str(Path(module.__file__))), "smolvla_left_out")
        yield number
        number.value = 0
