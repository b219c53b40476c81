"""linear_residual and norm_products with one barrier, wait or piece of arithmetic left out: each is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial

import pytest
import test_linear_residual as residual
import test_norm_products as products
import torch
from simt.left_out import LeftOut

RESIDUAL_BARRIERS = {"the barrier before the stores": (1, 2)}
PRODUCTS_BARRIERS = {"the barrier before the copies": (1, 2), "the barrier before the end": (3, 4)}
"""The arrive and the wait of each, counted from 1 as they stand in the source."""
OF_RESIDUAL = (
    ("k + step * kDepth + 8 * static_cast<int>(threadIdx.x % 8) < p.inputs;", "true"),
    ("(row / 4 * 2 + row % 2) % 8", "row % 8"),
    ("min(first + row + 32 * i, rows - 1)", "first"),
    ("rank * all_steps / kRanks,", "0"),
    ("first + stage >= steps", "first + stage >= all_steps"),
    ("next < steps", "next < all_steps"),
    ("(rows - rank + kRanks - 1) / kRanks", "kOwned"),
    ("rank * kOwned + group", "group"),
    ("lane / 4 + kRanks * group >= rows", "kRanks * group >= rows"),
    ("lane % 4 * 4;", "lane % 4 * 2"),
    ("from * kOwned + warp", "(kRanks - 1 - from) * kOwned + warp"),
    ("fp32 ? bits : bits << 16", "fp32 ? bits << 16 : bits"),
    ("y[half] + widen(residual[half], p.fp32_stream)", "y[half]"),
    ("to_float(rounded)", "stored"),
    ("stored * widen(norm_weight[half], p.fp32_norm)", "stored"),
    ("static_cast<int64_t>(col_tile) * p.rows + first_row + own", "first_row + own"),
    ("warp_sum(squares);", "squares"),
)
OF_PRODUCTS = (
    ("pieces % 2", "0"),
    ("min(row, rows - 1) * pitch", "row * pitch"),
    ("group ? 0 : kCols * inputs", "0"),
    ("cluster_rank() + ranks * warp", "ranks * warp"),
    ("head <= most", "head >= 0"),
    ("min(head, most)", "head"),
    ("step + share < steps", "step + share <= steps"),
    (
        "squares * (1.0f / static_cast<float>(inputs)) + p.eps",
        "squares * (1.0f / static_cast<float>(inputs))",
    ),
    ("(some[0] + some[1]) + (some[2] + some[3])", "some[0]"),
    ("__shfl_xor_sync(0xffffffffu, squares, 1);", "squares"),
    ("load_l2(squares_at + static_cast<int64_t>(4 * i) * p.rows);", "0.0f"),
    ("first[from][i];", "0.0f"),
    ("second[from][i];", "0.0f"),
    ("-1.44269504f * gate[i]", "1.44269504f * gate[i]"),
    ("a.x * c.x - b.x * s.x", "a.x * c.x + b.x * s.x"),
    ("second ? p.half : 0", "second ? 0 : 0"),
    ("batch * p.rope_batch_stride", "0 * p.rope_batch_stride"),
    ("batch * p.slot_batch_stride", "0 * p.slot_batch_stride"),
    ("at.which < 2", "at.which < 3"),
    ("at.which > 0 && p.fp32_slots", "p.fp32_slots"),
    ("min(at.first + pair, p.half - 1)", "at.first + pair"),
    (
        "min(static_cast<int>(blockIdx.x) * kPairs + pair, p.outputs - 1)",
        "static_cast<int>(blockIdx.x) * kPairs + pair",
    ),
)
KERNELS = {
    "linear_residual": LeftOut("linear_residual", OF_RESIDUAL, RESIDUAL_BARRIERS),
    "norm_products": LeftOut("norm_products", OF_PRODUCTS, PRODUCTS_BARRIERS),
}
RESIDUAL = [
    partial(residual.inputs, case, stream, settled)
    for case in ("column tiles", "more of K than is in flight", "two row tiles, more of K than is in flight")
    for stream, settled in ((torch.bfloat16, True), (torch.float32, False))
]
# Every group of K, a half of 16 behind the last, odd pairs, weights that are read early and not, and the wide tiles.
PRODUCTS = [
    partial(products.given, "norm_swiglu", "another width"),
    partial(products.given, "norm_swiglu", "part of a second tile", settled=False),
    partial(products.given, "norm_swiglu", products.MANY_PARTS),
    partial(products.given, "norm_qkv_rope", "samples, and a head of more than a tile", slots=torch.float32),
    partial(products.given, "norm_swiglu", "two row tiles"),
    partial(products.given, "norm_qkv_rope", "two row tiles"),
]


@pytest.fixture
def leave_out(kernel: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.c_int]:
    with KERNELS[kernel].serving(monkeypatch) as number:
        yield number


def faults(kernel: str) -> Iterator[str | None]:
    """What is not as it should be of a call, or None, one after the other."""
    of, calls = (residual, RESIDUAL) if kernel == "linear_residual" else (products, PRODUCTS)
    for given in calls:
        each = given()
        try:
            yield of.wrong(each)
        except RuntimeError as error:
            assert getattr(each, "op", kernel) in str(error)
            yield str(error)


@pytest.mark.parametrize(("kernel", "places"), [("linear_residual", 11), ("norm_products", 11)])
def test_all_are_found(kernel: str, places: int) -> None:
    assert len(KERNELS[kernel].places) == places, KERNELS[kernel].places


@pytest.mark.long
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_all_of_them(leave_out: ctypes.c_int, kernel: str) -> None:
    assert set(faults(kernel)) == {None}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kernel", "place"), [(name, place) for name, kernel in KERNELS.items() for place in kernel.numbers]
)
def test_nothing_can_be_left_out(leave_out: ctypes.c_int, kernel: str, place: str) -> None:
    """Every barrier and wait, the two barriers of a cluster as a whole, and the arithmetic: one call shows it."""
    leave_out.value = KERNELS[kernel].numbers[place]
    assert any(faults(kernel)), f"nothing shows {place}"
