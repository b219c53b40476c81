"""Tiles as candidates of a measurement: ranked, listed by a call, chosen for a call, named in a file."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import check, reference_module, run
from support.gemms import NAMES as GEMMS
from support.gemms import inputs_of, module
from support.guarded import DEVICE, guarded
from test_triton_fp8 import quantised

from smolvla_fast.kernels import attention_tuning, cost_model, tuning
from smolvla_fast.kernels.common import assume_capability, capability
from smolvla_fast.kernels.masked_attention_backward import attention_with_grad
from smolvla_fast.kernels.tiles import (
    AttentionTile,
    GemmTile,
    PlainTile,
    ProductTile,
    parse_tile,
    recording,
    tile_name,
    using,
)
from smolvla_fast.ops.select import reference_ops
from smolvla_fast.ops.torch.suffix import suffix_fold

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    # Of numpy under the interpreter.
    pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
F32, F16 = torch.float32, torch.float16
# Odd sizes: some tiles are smaller than these problems and some larger.
CASES = {
    "linear": dict(rows=17, inputs=40, outputs=35),
    "linear_residual": dict(rows=17, inputs=130, outputs=35),
    "norm_swiglu": dict(rows=17, inputs=65, outputs=35),
    "norm_qkv_rope": dict(B=1, T=17, M=33, H=1, K=1, D=36),
    "cross_kv": dict(B=1, P=17, K=5, D=8),
    "pixel_shuffle_linear": dict(N=2, side=8, width=9, factor=4, outputs=35),
    "patch_embed": dict(N=2, side=15, patch=5, width=33),
    "attention": dict(N=1, T=37, H=2, D=24),
    "masked_attention": dict(B=1, T=11, S=75, H=3, K=1, D=24),
    "masked_attention_backward": dict(B=1, T=7, S=35, H=3, K=1, D=24),
    "attention_residual": dict(B=1, T=17, S=75, H=3, K=1, D=24, O=35),
    "suffix_embed": dict(B=1, S=17, E=40, A=5, N=3),
    "euler_step": dict(B=1, S=2, E=300, A=20),
    "image_prep": dict(B=1, h=21, w=27, height=9, width=40, channels_last=1),
    "layer_norm": dict(rows=3, width=300),
}
FAMILIES = dict.fromkeys(GEMMS, "gemm") | {
    "attention": "attention", "masked_attention": "masked_attention",
    "masked_attention_backward": "attention_backward", "attention_residual": "attention_residual",
    "suffix_embed": "suffix_embed", "euler_step": "euler_step",
    "image_prep": "image", "layer_norm": "norm",
}  # fmt: skip


def launcher(op: str) -> Any:
    return getattr(module(op), op)


def table(wrap: Any = lambda launch: launch) -> SimpleNamespace:
    ops = {op: wrap(launcher(op)) for op in CASES}
    return SimpleNamespace(**ops, suffix_fold=suffix_fold, prepare_mask=lambda mask: mask)


def references(op: str) -> SimpleNamespace:
    helpers = {"suffix_fold": reference_ops().suffix_fold, "prepare_mask": reference_ops().prepare_mask}
    return SimpleNamespace(**{op: getattr(reference_module(op), op)}, **helpers)


@contextmanager
def launches(op: str) -> Iterator[list[dict[str, Any]]]:
    """Inside, the op's kernels do not run: the list gets the keyword arguments and the grid of each launch."""
    found: list[dict[str, Any]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **keywords: found.append({**keywords, "grid": grid})

    with pytest.MonkeyPatch.context() as patched:
        for name in [*vars(module(op))]:
            if name.endswith(("_fwd", "_backward_rows", "_backward_keys")):
                patched.setattr(module(op), name, Kernel())
        yield found


def launch(op: str, dtype: torch.dtype = F32) -> dict[str, Any]:
    """The first launch of a call of the op."""
    with launches(op) as found:
        run(table(), op, inputs_of(op, dtype, CASES[op]))
    return found[0]


def candidates(op: str, dtype: torch.dtype = F32) -> tuple[Any, ...]:
    with recording() as asked:
        launch(op, dtype)
    assert [question.family for question in asked] == [FAMILIES[op]] * (3 if op == "suffix_embed" else 1)
    return asked[0].tiles


# What a candidate computes


# In fp16 where the candidates are others than in fp32.
NARROW = ("linear_residual", "attention", "masked_attention", "masked_attention_backward")


HALVES = ((0, 3, 4), (1, 2, 5))
"""Places of an op's candidates. Both halves have tiles of few rows and many, and of every width."""


def turns() -> Iterator[Any]:
    """(op, places of its candidates, dtype). Half of the places each, in turn: the products share one loop over K, and
    what attention's tiles differ in, the backward's and the fused one's do.

    The other half, and fp16, are for `make test-full`.
    """
    for i, op in enumerate(CASES):
        for j, places in enumerate(HALVES):
            marks = [pytest.mark.long] * (j != i % 2)
            yield pytest.param(op, places, F32, marks=marks, id=f"{op}-{F32}-{min(places)}")
    for op in NARROW:
        yield pytest.param(op, range(6), F16, marks=pytest.mark.long, id=f"{op}-{F16}")


@pytest.mark.parametrize(("op", "places", "dtype"), list(turns()))
def test_every_candidate_keeps_the_contract(op: str, places: Sequence[int], dtype: torch.dtype) -> None:
    here = {F32: 80, F16: 90}[dtype] if DEVICE == "cpu" else capability(torch.device(DEVICE))
    with assume_capability(here):
        tiles = candidates(op, dtype)
        assert 2 <= len(tiles) <= 6
        for tile in (tiles[place] for place in places if place < len(tiles)):
            with using(tile):
                check(references(op), table(guarded), op, CASES[op], dtype)


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=triton_by.FP8) for op in ("linear_residual", "norm_swiglu")]
)
def test_candidates_beside_8_bit_weights(op: str) -> None:
    """Rows are quantised whatever the tile, so only the order of the sums differs."""
    inputs, _ = quantised(op, CASES[op])
    ops = SimpleNamespace(**{op: guarded(launcher(op))})
    with recording() as asked:
        best = run(ops, op, inputs)["y"]
    for tile in asked[0].tiles[1:3]:
        with using(tile):
            # In fp32, of at most 130 terms around 1. A row's own sum of squares may move a value that lies between two
            # e4m3 to the other one: an eighth of one term.
            torch.testing.assert_close(run(ops, op, inputs)["y"], best, rtol=1e-2, atol=1e-2)


# What is asked and what is launched

FIELDS = {
    GemmTile: dict(rows="BLOCK_M", cols="BLOCK_N", depth="BLOCK_K", warps="num_warps", stages="num_stages"),
    AttentionTile: dict(rows="BLOCK_ROWS", keys="BLOCK_KEYS", num_warps="num_warps", num_stages="num_stages"),
    ProductTile: dict(rows="BLOCK_ROWS", cols="BLOCK_COLS", inner="BLOCK_HIDDEN", num_warps="num_warps"),
    PlainTile: dict(cols="BLOCK_COLS", num_warps="num_warps"),
}
MORE_FIELDS = {
    "linear": dict(group="GROUP_M"), "patch_embed": dict(group="GROUP_M"),
    "linear_residual": dict(split="SPLIT_K"), "pixel_shuffle_linear": dict(split="SPLIT_K"),
    "suffix_embed": dict(num_stages="num_stages"),
    "attention_residual": dict(rows="BLOCK_TOKENS", inner="BLOCK_KEYS", num_stages="num_stages"),
    "euler_step": dict(rows="BLOCK_ACTIONS"), "image_prep": dict(rows="BLOCK_ROWS"),
    "layer_norm": dict(rows="BLOCK_ROWS"),
}  # fmt: skip
"""What these kernels take beyond it."""


@pytest.mark.parametrize("op", CASES)
def test_a_chosen_tile_is_launched(op: str) -> None:
    tiles = candidates(op)
    fields = FIELDS[type(tiles[0])] | MORE_FIELDS.get(op, {})
    others = [tiles[-1]._replace(group=3)] if FAMILIES[op] == "gemm" else []
    for tile in (*tiles, *others):
        with using(tile):
            got = launch(op)
        assert {field: got[name] for field, name in fields.items()} == {f: getattr(tile, f) for f in fields}
    with using(tiles[0]):
        best = launch(op)
    assert launch(op) == best, "the first is what is taken, and nothing of the others is left"


def test_a_grid_follows_its_tile() -> None:
    with using(GemmTile(16, 16, 16, 3, 8, 4, 2)):
        assert launch("linear_residual")["grid"] == (2 * 3, 3)
    with using(AttentionTile(16, 32, 4, 2)):
        assert launch("attention")["grid"] == (3, 2)
    with using(PlainTile(4, 16, 2)):
        assert launch("image_prep")["grid"] == (3, 3, 1)


@pytest.mark.parametrize("op", CASES)
def test_a_tile_of_another_type_is_not_for_it(op: str) -> None:
    before = launch(op)
    for tile in (
        GemmTile(32, 32, 32, 1, 8, 8, 3),
        AttentionTile(32, 32, 8, 1),
        ProductTile(32, 32, 32, 8, 1),
        PlainTile(2, 16, 8),
    ):
        if type(tile) is not type(candidates(op)[0]):
            with using(tile):
                assert launch(op) == before


def test_choices_of_several_types_hold_together_and_end() -> None:
    first, second, rows = (
        GemmTile(16, 16, 16, 1, 8, 4, 2),
        GemmTile(32, 32, 32, 1, 8, 4, 2),
        AttentionTile(32, 16, 8, 1),
    )
    best = launch("linear")
    with using(first), using(rows):
        assert launch("linear")["BLOCK_M"] == 16 and launch("attention")["BLOCK_KEYS"] == 16
        with pytest.raises(KeyError), using(second):
            assert launch("linear")["BLOCK_M"] == 32
            raise KeyError
        assert launch("linear")["BLOCK_M"] == 16
    assert launch("linear") == best


def test_threads_do_not_see_each_others_choice() -> None:
    tiles: list[GemmTile | None] = [GemmTile(16, 16, 16, 1, 8, 4, 2), GemmTile(32, 64, 32, 1, 8, 8, 3), None]
    inside, sizes, seen = threading.Barrier(len(tiles) + 1), (17, 40, 35, 80), {}

    def work(index: int) -> None:
        tile = tiles[index]
        with using(tile) if tile else nullcontext():
            inside.wait()  # all have chosen
            seen[index] = tuning.gemm_tile(*sizes)
            inside.wait()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tiles))]
    with using(GemmTile(64, 16, 16, 1, 8, 4, 2)), recording() as asked:
        for thread in threads:
            thread.start()
        inside.wait()
        inside.wait()
        for thread in threads:
            thread.join()
    assert asked == []
    assert seen == {0: tiles[0], 1: tiles[1], 2: cost_model.gemm_tiles(*sizes)[0]}


def test_a_call_is_asked_for_its_candidates() -> None:
    """In order, whatever is chosen, also of what a backward launches; an op without tiles asks nothing."""
    values = inputs_of("masked_attention", F32, CASES["masked_attention"])
    values["q"].requires_grad_()
    with (
        launches("masked_attention"), launches("masked_attention_backward"),
        recording() as outer, using(AttentionTile(32, 16, 8, 1)), recording() as asked,
    ):  # fmt: skip
        out = attention_with_grad(**values)
        out.backward(torch.ones_like(out))
    assert [each.family for each in asked] == ["masked_attention", "attention_backward"]
    assert outer == asked
    assert asked[0].tiles == candidates("masked_attention")
    with recording() as none:
        launch_flow_point()
    assert none == []


def launch_flow_point() -> None:
    from smolvla_fast.kernels.flow_loss import flow_point

    with launches("flow_loss"):
        flow_point(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1))


# What is refused

DOT = "powers of two from 16 to"


@pytest.mark.parametrize(
    ("tile", "match"),
    [
        (GemmTile(48, 32, 32, 1, 8, 4, 2), rf"gemm 48x32x32 split1.*: rows is 48; accepted are {DOT}"),
        (GemmTile(32, 8, 32, 1, 8, 4, 2), f"cols is 8; accepted are {DOT}"),
        (GemmTile(32, 32, 0, 1, 8, 4, 2), "depth is 0"),
        (GemmTile(32, 32, 32, 17, 8, 4, 2), "split is 17; accepted are whole numbers from 1 to 16"),
        (GemmTile(32, 32, 32, 0, 8, 4, 2), "split is 0"),
        (GemmTile(32, 32, 32, 1, 0, 4, 2), "group is 0"),
        (GemmTile(32, 32, 32, 1, 8, 3, 2), "warps is 3; accepted are powers of two from 1 to 16"),
        (GemmTile(32, 32, 32, 1, 8, 32, 2), "warps is 32"),
        (GemmTile(32, 32, 32, 1, 8, 4, 0), "stages is 0"),
        (GemmTile(32.0, 32, 32, 1, 8, 4, 2), "rows is 32.0"),
        (AttentionTile(64, -16, 4, 2), "keys is -16"),
        (AttentionTile(64, 64, True, 2), "warps is True"),
        (ProductTile(16, 16, 8, 4, 2), "inner is 8"),
        (PlainTile(3, 16, 4), "rows is 3; accepted are powers of two from 1 to"),
        (PlainTile(1, 1 << 15, 4), "cols is 32768"),
        ("gemm 64x64x64 split1 group8 warps4 stages3", "is no tile; accepted are GemmTile, AttentionTile"),
        ((16, 16, 4), "is no tile"),
        (None, "None is no tile"),
    ],
)
def test_numbers_that_no_kernel_takes_are_refused(tile: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match), using(tile):
        raise AssertionError("it was accepted")


@pytest.mark.parametrize(
    ("op", "tile", "match"),
    [
        ("linear", GemmTile(32, 32, 32, 2, 8, 4, 2), "gemm: .*split2.* shares K .* accepted is split1"),
        ("cross_kv", GemmTile(32, 32, 32, 2, 8, 4, 2), "accepted is split1"),
        ("linear_residual", GemmTile(16, 16, 32, 6, 8, 4, 2), "without a step along K; accepted is at most split5"),
        ("linear", GemmTile(128, 128, 128, 1, 8, 8, 8), "bytes of shared memory; accepted are at most 101376 on sm_86"),
        ("norm_swiglu", GemmTile(64, 128, 32, 1, 8, 8, 4), "bytes of shared memory; accepted"),
        ("linear", GemmTile(128, 128, 16, 1, 8, 1, 2), "16384 sums in registers; accepted are at most 4096 in 1 warps"),
        ("norm_swiglu", GemmTile(64, 128, 16, 1, 8, 2, 2), "keeps 16384 sums in registers; accepted are at most 8192"),
        ("attention", AttentionTile(16, 512, 8, 3), "attention: .* bytes of shared memory"),
        ("masked_attention", AttentionTile(16, 1024, 8, 1), "masked_attention: .* bytes of shared memory"),
        ("masked_attention_backward", AttentionTile(128, 128, 16, 3), "attention_backward: .* shared memory"),
        ("masked_attention", AttentionTile(128, 64, 2, 1), "sums in registers"),
        ("suffix_embed", ProductTile(64, 256, 256, 8, 4), "suffix_embed: .* bytes of shared memory"),
        ("suffix_embed", ProductTile(128, 64, 16, 2, 1), "sums in registers"),
        ("euler_step", PlainTile(64, 1024, 4), "euler_step: .* sums in registers"),
        ("image_prep", PlainTile(128, 512, 4), "image: .* sums in registers"),
        ("layer_norm", PlainTile(2, 256, 4), "norm: .* one row of 300; accepted are 1x512 to"),
        ("layer_norm", PlainTile(1, 16384, 2), "sums in registers"),
    ],
)  # fmt: skip
def test_a_tile_that_cannot_serve_the_call_is_refused(op: str, tile: Any, match: str) -> None:
    with assume_capability(86), using(tile), pytest.raises(ValueError, match=match):
        launch(op)


def test_an_8_bit_weight_takes_longer_steps() -> None:
    inputs, _ = quantised("linear", CASES["linear"])
    refused = pytest.raises(ValueError, match="steps of 16 along K; accepted are at least 32")
    with launches("linear"), using(GemmTile(16, 16, 16, 1, 8, 4, 2)), refused:
        run(table(), "linear", inputs)


# Names in a file

TEXTS = {
    GemmTile(64, 128, 64, 2, 8, 4, 3): "gemm 64x128x64 split2 group8 warps4 stages3",
    AttentionTile(64, 32, 8, 1): "attention 64x32 warps8 stages1",
    ProductTile(16, 32, 64, 4, 2): "product 16x32x64 warps4 stages2",
    PlainTile(1, 1024, 16): "plain 1x1024 warps16",
}


@pytest.mark.parametrize(("tile", "text"), TEXTS.items(), ids=TEXTS.values())
def test_a_tile_has_one_name(tile: Any, text: str) -> None:
    assert tile_name(tile) == text
    back = parse_tile(text)
    assert back == tile and type(back) is type(tile)


@pytest.mark.parametrize(
    "text",
    [
        "", "gemm", "gem 64x128x64 split2 group8 warps4 stages3", "gemm 64x128 split2 group8 warps4 stages3",
        "gemm 64x128x64 split2 group8 warps4 stages3 ", " gemm 64x128x64 split2 group8 warps4 stages3",
        "gemm 64x128x64 split2 group8 stages3 warps4", "gemm 064x128x64 split2 group8 warps4 stages3",
        "gemm 64x128x64 split-2 group8 warps4 stages3", "Gemm 64x128x64 split2 group8 warps4 stages3",
        "gemm 64x128x64 split2 group8 warps4 stages3\n", "gemm 63x128x64 split2 group8 warps4 stages3",
        "attention 64x32x16 warps8 stages1", "plain 64x32 warps8 stages1", "plain 1024 warps4", "plain ٤x٤ warps4",
        "plain 0x16 warps4", "attention 8x16 warps4 stages1", "plain " + "9" * 5000 + "x1 warps4", None, 7, ["plain"],
    ],
)  # fmt: skip
def test_other_text_is_no_tile(text: Any) -> None:
    with pytest.raises(ValueError, match="accepted (is text like 'gemm 16x16x16 split16|are )"):
        parse_tile(text)


# The candidates themselves

SIZES: dict[str, list[tuple[Any, ...]]] = {
    "gemm": [(50, 2048, 720), (2048, 768, 3072), (177, 960, 2560), (1, 32, 960), (1, 1, 1)],
    "row": [(768,), (1,), (31,), (16_384,)],
    "norm": [(2048, 768), (1, 1), (5, 31), (100_000, 16_384)],
    "euler_step": [(720, 32), (1, 1), (48, 5)],
    "image": [(512,), (1,), (47,)],
    "suffix_embed": [(50, 720, 32), (1, 1, 1), (400, 960, 64)],
    "attention": [(tokens, dim) for tokens in (1024, 1, 37) for dim in (16, 64, 128)],
    "masked_attention": [
        (heads, rows, keys, dim)
        for heads, rows, keys in ((5, 150, 227), (5, 531, 177), (40, 531, 241), (1, 1, 1), (320, 150, 400))
        for dim in (16, 64, 128)
    ],
    "attention_backward": [(16,), (64,), (128,)],
    "attention_residual": [
        (50, 720, 227, 5, 256, 4, 2),
        (50, 720, 177, 5, 256, 4, 4),
        (1, 1, 1, 1, 16, 1, 2),
    ],
}


@pytest.mark.parametrize("cc", cost_model.TARGETS)
@pytest.mark.parametrize("family", SIZES)
def test_candidates_are_few_and_fit(family: str, cc: int) -> None:
    """At most six, each once, the one that is taken first, and none that a call then refuses."""
    attends = "attention" in family
    room = attention_tuning if attends else tuning
    ranked, ask = getattr(room, f"{family}_tiles"), getattr(room, f"{family}_tile")
    with_cc = ("gemm", "norm", "suffix_embed", "attention_residual")
    for sizes in SIZES[family]:
        if attends and family not in with_cc:
            calls = [(*sizes, narrow, cc) for narrow in (False, True) if cc >= 80 or not narrow]
        else:
            calls = [(*sizes, cc) if family in with_cc else sizes]
        for one in calls:
            tiles = ranked(*one)
            assert 1 <= len(tiles) <= 6 and len(set(tiles)) == len(tiles)
            assert ask(*one) == tiles[0]
            for tile in tiles:
                with using(tile):
                    assert ask(*one) == tile
                assert parse_tile(tile_name(tile)) == tile
                if attends and family not in with_cc:
                    dim, narrow, _ = one[-3:]
                    needed = attention_tuning.attention_shared_bytes(
                        tile, dim, narrow, cc, family == "attention_backward"
                    )
                    assert needed <= cost_model.target(cc).shared_bytes, f"{one}: {tile}"


def test_candidates_of_smolvla_are_several() -> None:
    """On an H100, in each of its calls: there is something to measure."""
    calls = {
        "gemm": (50, 2048, 720), "row": (768,), "norm": (2048, 768), "euler_step": (720, 32), "image": (512,),
        "suffix_embed": (50, 720, 32),
        "attention": (1024, 64, True), "masked_attention": (5, 150, 227, 64, True), "attention_backward": (64, True),
        "attention_residual": (50, 720, 227, 5, 256, 4, 2),
    }  # fmt: skip
    for family, sizes in calls.items():
        own = () if family in ("row", "euler_step", "image") else (90,)
        room = attention_tuning if "attention" in family else tuning
        assert len(getattr(room, f"{family}_tiles")(*sizes, *own)) >= 3, family


def test_the_first_candidates_are_the_tiles_of_before() -> None:
    """Pinned, on an H100: ranking the others does not change what is taken where nothing was measured."""
    took = [
        tuning.gemm_tile(50, 2048, 720, 90, split=True, residual=True),
        tuning.gemm_tile(2048, 768, 768, 90),
        attention_tuning.masked_attention_tile(5, 150, 227, 64, True, 90),
        attention_tuning.attention_tile(1024, 64, True, 90),
        attention_tuning.attention_backward_tile(64, True, 90),
        tuning.suffix_embed_tile(50, 720, 32, 90),
        tuning.euler_step_tile(720, 32),
        tuning.image_tile(512),
        tuning.row_tile(768),
        tuning.norm_tile(2048, 768, 90),
    ]
    assert [*map(tile_name, took)] == [
        "gemm 32x32x128 split2 group8 warps8 stages4",
        "gemm 128x128x64 split1 group8 warps8 stages4",
        "attention 16x256 warps4 stages1",
        "attention 128x64 warps8 stages3",
        "attention 32x32 warps4 stages2",
        "product 16x64x64 warps8 stages1",
        "plain 8x512 warps8",
        "plain 8x64 warps4",
        "plain 1x1024 warps4",
        "plain 8x1024 warps16",
    ]


# What compilers make of the candidates

COMPILE = """
import sys
from unittest.mock import patch
from triton.runtime.jit import JITFunction
from benchmarks.compiled import aot
from smolvla_fast.kernels import tiles
from smolvla_fast.kernels.common import assume_capability

for op in sys.argv[1:]:
    for target, place in (("80", 1), ("90", -1)):
        _, case, _ = aot.tasks([op], [target])[0]
        _, _, inputs = next(aot.calls(op, case))
        nothing = patch.object(JITFunction, "run", lambda *_, **__: None)
        with tiles.recording() as asked, assume_capability(int(target)), nothing:
            aot.call(op, inputs)
        tile = asked[0].tiles[place]
        with tiles.using(tile), aot.compiling(int(target)) as compiled:
            aot.call(op, inputs)
        for name, kernel in compiled:
            print(op, target, tiles.tile_name(tile), name, aot.beyond(op, target, kernel), sep="; ")
"""


@pytest.mark.long
@pytest.mark.slow
def test_candidates_compile() -> None:
    """The second of each op for sm_80, the last for sm_90, at SmolVLA's sizes in bf16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *CASES], cwd=ROOT, text=True, capture_output=True,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    lines = [line.split("; ") for line in done.stdout.splitlines()]
    assert {(line[0], line[1]) for line in lines} == {(op, cc) for op in CASES for cc in ("80", "90")}
    assert [line for line in lines if line[-1] != "[]"] == []
