"""No barrier of denoise_persistent can be left out: without any one of them, the emulator finds an error. And where its
arithmetic is made wrong, the comparison with fp64 finds it.

The sources are joined into one file in which every statement that orders memory, and every variant of an expression, is
asked for by number, so that all variants are one compilation. A statement that could go without a test turning red would
be superfluous, or untested.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simt import on_the_host
from simt.emulator import build
from support import denoise_loop as reference
from support.backends import loaded
from test_denoise_persistent import CASES, HEADS_BOUND, SHARED, errors, heads_error, inputs, ours

CUDA = build.CSRC / "cuda"
INLINED = re.compile(r'#include "cuda/((?:denoise_|attention_|grid_barrier)[a-z_]*\.cuh)"\n')
ORDERING = re.compile(r"(?:__syncthreads\(\)|barrier\.(?:wait|arrive)\(\)|cp_async_wait_but\(.*?\));")
SWITCH = '\nextern "C" { __attribute__((visibility("default"))) int smolvla_left_out = 0; }\n'
# In the order in which they are tried: one is enough to show a missing barrier.
SHOWN_BY = ("tiny", "two row blocks", "all cross", "head of 64")

# What stands there, in all places where it does, and what would be wrong.
WRONG = (
    ("x.x * cos.x - y.x * sin.x", "x.x * cos.x + y.x * sin.x"),
    ("cross ? p.cross_sin : p.self_sin", "p.cross_sin"),
    ("layer.k == nullptr ? self.masked_keys : self.keys", "self.masked_keys"),
    ("h.x + y.x", "y.x"),
    ("h.x * read(norm, at, fp32)", "h.x"),
    ("layer.norm2", "layer.norm1"),
    ("p.layers[index + 1].norm1", "p.layers[0].norm1"),
    ("sum / static_cast<float>(p.sizes.width)", "sum / static_cast<float>(2 * p.sizes.width)"),
    ("inverse_rms(row);", "1.0f;"),
    ("silu(gate.x * scale)", "gate.x * scale"),
    ("total.x += part.x", "total.x += warp ? part.x : 0.0f"),
    ("row < rows && k < inputs", "row < rows"),
    ("unit % units * kUnit", "0"),
    ("1.0 + step * dt", "1.0 + (step + 1) * dt"),
    ("-1.0 / p.sizes.steps", "-1.0 / (p.sizes.steps + 1)"),
    ("p.strengths[step] * error", "-p.strengths[step] * error"),
    ("static_cast<int64_t>(step) * p.sizes.batch", "0"),
    ("row / p.sizes.suffix", "0"),
    ("read(p.action_out_bias, action, p.action_out_bias_fp32)", "0.0f"),
    ("read(p.mlp_out_bias, at, p.mlp_out_bias_fp32)", "0.0f"),
    ("h * read(p.end_norm, i, p.end_norm_fp32)", "h"),
)
# The low halves of fp32 factors.
SMALL = ("mma_32(sums.of[i][0], x[i][0], x[i][1], w_low);", "mma_32(sums.of[i][0], y[i][0], y[i][1], w);")


def joined() -> tuple[str, list[str]]:
    """The sources in one, and where each ordering statement stands; number i + 1 is left out on request."""
    seen: set[str] = set()
    places: list[str] = []

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        lines = []
        for number, line in enumerate((CUDA / name).read_text().splitlines(keepends=True), 1):
            code = line.split("//")[0]
            for found in ORDERING.findall(code):
                places.append(f"{name}:{number} {found}")
                line = line.replace(found, f"if (smolvla_left_out != {len(places)}) {found}", 1)
            lines.append(INLINED.sub(lambda m: text_of(m[1]), line).replace("#pragma once\n", ""))
        return "".join(lines)

    body = text_of("denoise_persistent.cu")
    for small in SMALL:
        places.append(small)
        assert small in body
        body = body.replace(small, f"if (smolvla_left_out != {len(places)}) {small}")
    for right, wrong in WRONG:
        places.append(right)
        end = ";" if right.endswith(";") else ""
        assert right in body, right
        right, wrong = right.removesuffix(";"), wrong.removesuffix(";")
        variant = f"(smolvla_left_out == {len(places)} ? ({wrong}) : ({right})){end}"
        body = body.replace(right + end, variant)
    # Under another name: masked_attention.cu has the same templates with all their barriers.
    return SWITCH + re.sub(r"\bAttentionTile\b", "SwitchedAttentionTile", body), places


SOURCE, PLACES = joined()
FIRST_SMALL = PLACES.index(SMALL[0]) + 1
FIRST_WRONG = FIRST_SMALL + len(SMALL)


@pytest.fixture(scope="module")
def switched() -> Any:
    return loaded(lambda: build.switched("denoise_persistent", SOURCE))


@pytest.fixture
def leave_out(switched: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.c_int]:
    """The number of the statement that is left out, 0 for none."""
    switched.reset()
    switched.configure(multiprocessors=4, shared_bytes_per_block=SHARED)
    on_the_host.install(monkeypatch, switched)
    number = ctypes.c_int.in_dll(ctypes.CDLL(str(Path(switched.__file__))), "smolvla_left_out")
    yield number
    number.value = 0


def test_all_are_found() -> None:
    named = "\n".join(PLACES)
    for file in ("grid_barrier", "denoise_block", "denoise_ends", "denoise_stream", "attention_tile"):
        assert f"{file}.cuh" in named
    assert FIRST_SMALL > 20


@pytest.mark.long
@pytest.mark.parametrize("name", SHOWN_BY)
def test_with_all_of_them(switched: Any, leave_out: ctypes.c_int, name: str) -> None:
    for seed in (0, 1, 2):
        switched.configure(seed=seed)
        assert not ours(inputs(CASES[name])).isnan().any()


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, FIRST_SMALL), ids=PLACES[: FIRST_SMALL - 1])
def test_without(switched: Any, leave_out: ctypes.c_int, number: int) -> None:
    leave_out.value = number
    for name in SHOWN_BY:
        try:
            ours(inputs(CASES[name]))
        except RuntimeError as error:
            print(f"{name}: {error}")
            assert "denoise_persistent" in str(error)
            return
    pytest.fail(f"nothing shows that {PLACES[number - 1]} is missing")


@pytest.mark.long
@pytest.mark.parametrize("number", range(FIRST_SMALL, FIRST_WRONG), ids=SMALL)
def test_low_halves_matter(switched: Any, leave_out: ctypes.c_int, number: int) -> None:
    assert heads_error() <= HEADS_BOUND
    leave_out.value = number
    assert heads_error() > HEADS_BOUND


@pytest.mark.long
@pytest.mark.parametrize("number", range(FIRST_WRONG, len(PLACES) + 1), ids=PLACES[FIRST_WRONG - 1 :])
def test_wrong_arithmetic(switched: Any, leave_out: ctypes.c_int, number: int) -> None:
    leave_out.value = number
    for name in SHOWN_BY:
        try:
            error, bound = errors(inputs(CASES[name]), reference.denoise_persistent)
        except (RuntimeError, AssertionError) as found:
            print(f"{name}: {found}")
            return
        if not error <= 2 * bound:
            return
    pytest.fail(f"nothing shows that {PLACES[number - 1]} is wrong")
