"""Products of 16-bit integers on a CPU, at every level that multiplies integers, emulated where this processor lacks it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from support import emulated
from support.processors import LEVELS, at_level
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.availability import why_not_int16
from smolvla_fast.ops.cpu import int8_attention, int16, integer_ops, quantize
from smolvla_fast.ops.cpu.image_prep import image_prep
from smolvla_fast.ops.reference.quantize import (
    SUMMED,
    WORDS,
    IntegerRows,
    IntegerWeight,
    dequantize,
    quantize_activations,
    quantize_weight,
)
from smolvla_fast.ops.reference.quantize import product as reference_product

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.processor,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
# Rows about a tile's six and a block's 24, inputs about a word's two and a sum's 192, outputs about a vector's, a tile's and
# a panel's 32, groups of panels behind 511 rows, one and several; sizes of one, and no rows.
SIZES = [
    (1, 1, 1), (3, 2, 31), (6, 191, 32), (7, 193, 33), (25, 384, 65), (50, 720, 47), (49, 33, 8), (2, 5, 17), (24, 577, 96),
    (513, 70, 161), (513, 1500, 70), (0, 8, 5),
]  # fmt: skip


@pytest.fixture(params=int8_attention.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with emulated.integers_at(request.param):
        yield request.param


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _integers(
    rows: int, inputs: int, outputs: int, extreme: bool = False
) -> tuple[IntegerRows, IntegerWeight]:
    if extreme:  # the largest sum that there is, in the last of 32 bits
        data = torch.full((rows, inputs), WORDS.largest, dtype=torch.int16)
        matrix = torch.full((outputs, inputs), -WORDS.largest, dtype=torch.int16)
        matrix[::2] *= -1
    else:
        data, matrix = (quantize_activations(_normal(n, inputs), WORDS).data for n in (rows, outputs))
    return IntegerRows(data, _normal(rows).abs() + 0.5), IntegerWeight(matrix, _normal(outputs).abs() + 0.5)


def _packed(weight: IntegerWeight) -> int16.Packed:
    return int16.pack_integers(weight)


def _rows(x: IntegerRows) -> IntegerRows:
    return x._replace(data=F.pad(x.data, (0, x.data.shape[-1] % 2)))


def _sums(x: IntegerRows, weight: IntegerWeight) -> Tensor:
    """Exact over each block of inputs, then added in fp32, first to last."""
    found = torch.zeros(len(x.data), len(weight.data))
    for a, b in zip(x.data.split(SUMMED, 1), weight.data.split(SUMMED, 1), strict=True):
        exact = a.double() @ b.double().t()  # to the last bit, up to 2^53
        assert (exact.abs() < 2**31).all()
        found = found + exact.float()
    return found * weight.scale * x.scale[:, None]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "x".join(map(str, sizes)))
def test_products_have_the_bits_of_their_definition(
    sizes: tuple[int, int, int], extreme: bool, level: str
) -> None:
    """To the bit at every level: so for any number of threads and of rows, too."""
    rows, inputs, outputs = sizes
    x, weight = _integers(rows, inputs, outputs, extreme)
    bias, residual = _normal(outputs), _normal(rows, outputs, seed=1)
    packed, given, sums = _packed(weight), _rows(x), _sums(x, weight)
    out = torch.full((rows, outputs), torch.nan)
    assert int16.linear(given, packed, out=out) is out and torch.equal(out, sums)
    assert torch.equal(int16.linear(given, packed, bias), sums + bias)
    for name in ("silu", "gelu_tanh"):
        # The same activation behind a product of bytes, which is held to fp64 in test_cpu_quantize.py.
        want = quantize.finish(sums.clone(), torch.ones(rows), bias, name)
        assert torch.equal(int16.linear(given, packed, bias, name, residual), want + residual)
    in_place = residual.clone()
    assert torch.equal(int16.linear(given, packed, residual=in_place, out=in_place), sums + residual)
    _, other = _integers(rows, inputs, outputs)
    gate, up = quantize.finish(sums.clone(), torch.ones(rows), None, "silu"), _sums(x, other)
    assert torch.equal(int16.linear(given, packed, activation="silu", up_weight=_packed(other)), gate * up)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        assert torch.equal(int16.linear(given, packed), sums)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", [(50, 720, 96), (3, 2560, 40), (200, 96, 70), (1, 1, 1)])
def test_errors_against_fp64(sizes: tuple[int, int, int]) -> None:
    """At most twice what rounding the operands costs, and less than half of what bf16 costs."""
    rows, inputs, outputs = sizes
    x, matrix = _normal(rows, inputs), _normal(outputs, inputs, seed=3)
    truth = x.double() @ matrix.double().t()

    def error(y: Tensor) -> float:
        return float((y.double() - truth).norm() / truth.norm())

    found = error(int16.linear(quantize.quantize_rows(x, torch.int16), int16.pack(matrix)))
    eager = error(reference_product(x.double(), quantize_weight(matrix, WORDS)))
    narrow = error((x.bfloat16() @ matrix.bfloat16().t()).float())
    print(f"relative L2: {found:.3g}, its operands in fp64 {eager:.3g}, bf16 {narrow:.3g}")
    # One number has its own luck: it is a product of two that were rounded to themselves.
    assert found <= 2 * eager + 2.0**-22 and (inputs == 1 or found < narrow / 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(50, 768), (3, 1), (1, 15), (5, 33), (0, 8)])
def test_rows_have_the_bits_of_the_reference(rows: int, width: int, dtype: torch.dtype, level: str) -> None:
    x = (_normal(rows, width) * 3 + 1).to(dtype)
    gain = _normal(width)
    with at_level(level):
        found = quantize.quantize_rows(x, torch.int16)
        normed = quantize.rms_norm_rows(x, gain, 1e-5, torch.int16)
        layer = quantize.layer_norm_rows(x, gain, gain, 1e-6, torch.int16)
    want = quantize_activations(x, WORDS)
    assert torch.equal(found.data, _rows(want).data) and torch.equal(found.scale, want.scale)
    # Half a step, and what fp32 loses on a number of 3344 steps.
    error = (dequantize(want) - x.float()).abs()
    assert (error <= want.scale[:, None] * (0.5 + 3344 * 2.0**-23)).all()
    eight = quantize.rms_norm_rows(x, gain, 1e-5), quantize.layer_norm_rows(x, gain, gain, 1e-6)
    for wide, narrow in zip((normed, layer), eight, strict=True):
        # Of the same largest number: three roundings of fp32, 2^-24 each, and eight times that.
        assert torch.allclose(wide.scale * (3344 / 127), narrow.scale, rtol=2.0**-20, atol=0)
        step = narrow.scale[:, None] * (0.5 + 127 * 2.0**-22) + wide.scale[:, None]
        assert ((dequantize(wide)[:, :width] - dequantize(narrow)).abs() <= step).all()


def test_rows_of_every_kind() -> None:
    x = torch.zeros(7, 19)
    below = float(torch.nextafter(torch.tensor(WORDS.smallest), torch.tensor(0.0)))
    x[1, 3], x[2, 3], x[3, :2] = torch.nan, torch.inf, torch.tensor([-torch.inf, torch.nan])
    x[4, 18], x[5, 18], x[6, 0] = below, WORDS.smallest, -3.4e38  # the last in the tail behind whole vectors
    want = quantize_activations(x, WORDS)
    assert want.scale[[0, 4]].eq(0).all() and want.scale[1:4].isnan().all() and want.scale[5:].gt(0).all()
    assert want.data[:5].eq(0).all() and want.data[5, 18] == 3344 and want.data[6, 0] == -3344
    for name in extension.load("cpu").levels():
        with at_level(name):
            found = quantize.quantize_rows(x, torch.int16)
        assert torch.equal(found.data, _rows(want).data)
        assert torch.equal(found.scale.nan_to_num(-1), want.scale.nan_to_num(-1))
    y = int16.linear(found, int16.pack(_normal(5, 19)))
    assert y[1:4].isnan().all() and not y[[0, 4, 5, 6]].isnan().any()
    broken = _normal(9, 40)
    broken[4, 0] = torch.inf
    y = int16.linear(quantize.quantize_rows(_normal(3, 40), torch.int16), int16.pack(broken))
    assert y.isnan().any(0).nonzero().tolist() == [[4]]


def test_ops_take_weights_of_integers_and_others() -> None:
    """By the table's functions, as a layer calls them: a norm, a product, a residual."""
    x, gain, residual = _normal(9, 64), _normal(64), _normal(9, 48)
    matrix, other = _normal(48, 64) / 8, _normal(48, 64, seed=5) / 8
    packed = int16.pack(matrix)
    truth = F.linear(x.double(), matrix.double()) + residual
    # A step is 1/3344 of a row's largest number, which is about 2.5 of its deviation: 2e-4 from each operand. fp32 has 1e-7.
    for weight, bound in ((packed, 5e-4), (matrix, 1e-6)):
        y = integer_ops.linear_residual(x, weight, residual)
        assert (y - truth).norm() <= bound * truth.norm()
    hidden = integer_ops.norm_swiglu(x, (gain, 1e-5), packed, int16.pack(other))
    assert hidden.data.dtype is torch.int16, "rows of what reads it, down_proj"
    wide = integer_ops.norm_swiglu(x, (gain, 1e-5), matrix, other)
    assert 0 < (dequantize(hidden) - wide).norm() <= 2e-3 * wide.norm()
    rows = integer_ops.layer_norm(x, gain, gain, 1e-6, torch.int16)
    assert rows.data.dtype is torch.int16
    with pytest.raises(AssertionError, match="rows of integers meet weights of integers"):
        integer_ops.linear(rows, matrix)


def test_the_product_refuses() -> None:
    x, packed = quantize.quantize_rows(_normal(2, 8), torch.int16), int16.pack(_normal(3, 8))
    with pytest.raises(ValueError, match=r"data has shape \[2, 8\]; accepted is \[2, 10\]"):
        int16.linear(x, int16.pack(_normal(3, 9)))
    with pytest.raises(TypeError, match="data has dtype torch.uint8, this kernel has torch.int16"):
        int16.linear(quantize.quantize_rows(_normal(2, 8)), packed)
    with pytest.raises(ValueError, match="unknown activation 'relu'; accepted are"):
        int16.linear(x, packed, activation="relu")
    with pytest.raises(ValueError, match="up_weight goes with neither bias nor residual"):
        int16.linear(x, packed, _normal(3), up_weight=packed)
    other = int16.pack(_normal(3, 8))._replace(scale=torch.ones(2, 3)[0])
    with pytest.raises(ValueError, match="out overlaps another tensor"):
        int16.linear(x, packed, up_weight=other, out=other.scale.as_strided((2, 3), (3, 1)))
    with pytest.raises(ValueError, match="K at least 1"):
        int16.linear(x, packed._replace(shape=torch.Size((3, 0))))
    with pytest.raises(ValueError, match="data begins in the middle of a word"):
        int16.linear(x._replace(data=torch.zeros(17, dtype=torch.int16)[1:].view(2, 8)), packed)
    with pytest.raises(ValueError, match="out overlaps another tensor"):
        int16.linear(x, packed, bias=(buffer := torch.zeros(2, 3))[0], out=buffer)
    with pytest.raises(TypeError, match=r"dtype is torch.int32; accepted are torch.uint8, torch.int16"):
        quantize.quantize_rows(_normal(2, 8), torch.int32)


def test_refused_with_the_reason() -> None:
    assert "a CPU kernel, the policy is on cuda" in str(why_not_int16(torch.device("cuda")))


def test_another_default_dtype_or_device_of_torch_changes_nothing() -> None:
    x, packed = _normal(5, 40), int16.pack(_normal(7, 40))
    rows = quantize.quantize_rows(x, torch.int16)
    want, narrow = int16.linear(rows, packed), quantize_weight(_normal(7, 40))
    q, frames = _normal(1, 5, 2, 8), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    attended = int8_attention.attention(q, q, q)
    try:
        for dtype in (torch.bfloat16, torch.float64):
            torch.set_default_dtype(dtype)
            with torch.device("meta"):
                found = quantize.quantize_rows(x, torch.int16)
                assert torch.equal(found.scale, rows.scale) and torch.equal(int16.linear(found, packed), want)
                int16.why_slow.cache_clear()
                int16.why_slow()
                assert torch.equal(int8_attention.attention(q, q, q).error, attended.error)
                assert torch.equal(int8_attention.spread(q, q, q), attended.spread)
                assert image_prep(frames, 8, 8, torch.float32).is_cpu
                eight = quantize.quantize_rows(x)
                sums = quantize.int8_matmul(eight, narrow)
                assert sums.dtype is eight.scale.dtype is torch.float32 and sums.is_cpu
    finally:
        torch.set_default_dtype(torch.float32)
        int16.why_slow.cache_clear()
