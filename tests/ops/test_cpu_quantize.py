"""Products of 8-bit integers on a CPU: the quantisers around them at every instruction level, and oneDNN's sums."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import integer_products
from support.backends import at_every_level
from support.processors import play
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.availability import why_not_int8
from smolvla_fast.ops.cpu import int8, integer_ops, quantize
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.linear import linear as reference_linear
from smolvla_fast.ops.reference.quantize import (
    BYTES,
    IntegerRows,
    IntegerWeight,
    dequantize,
    quantize_activations,
    quantize_weight,
)

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
PRODUCTS = pytest.mark.skipif(why_not_int8(CPU) is not None, reason=str(why_not_int8(CPU)))
F32, BF16 = torch.float32, torch.bfloat16
SIZES = [(200, 768), (3, 1), (1, 15), (5, 16), (7, 33), (0, 8)]
EPS = 2.0**-23


def _x(rows: int, width: int, dtype: torch.dtype = F32) -> Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return (torch.randn(rows, width, generator=generator) * 3 + 1).to(dtype)


def _same(found: IntegerRows, want: IntegerRows) -> bool:
    # Scales by their bits: NaN equals NaN then.
    scales = (found.scale.view(torch.int32), want.scale.view(torch.int32))
    return torch.equal(found.data, want.data) and (
        torch.equal(*scales) or torch.equal(found.scale.nan_to_num(-1), want.scale.nan_to_num(-1))
    )


@pytest.mark.processor
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rows_have_the_bits_of_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x = _x(rows, width, dtype)
    want = quantize_activations(x)
    assert want.data.dtype is torch.uint8 and want.scale.dtype is F32
    assert all(_same(found, want) for found in at_every_level(lambda: quantize.quantize_rows(x)))
    # Half a step, and what fp32 loses on a number of 127 steps.
    assert ((dequantize(want) - x.float()).abs() <= want.scale[:, None] * (0.5 + 127 * EPS)).all()


def test_rows_of_every_kind() -> None:
    below = float(torch.nextafter(torch.tensor(BYTES.smallest), torch.tensor(0.0)))
    x = torch.zeros(9, 19)
    x[1, 3], x[2, 3], x[3, 5], x[4, :2] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.tensor([torch.inf, torch.nan]),
    )
    x[5, 18], x[6, 18], x[7, 0] = below, BYTES.smallest, -3.4e38  # the last in the tail behind whole vectors
    x[8] = torch.arange(19) - 9.0 + 0.5  # halves of a step: ties
    want = quantize_activations(x)
    assert want.scale[[0, 5]].eq(0).all() and want.scale[1:5].isnan().all() and want.scale[6:].gt(0).all()
    assert want.data[:6].eq(128).all() and want.data[6, 18] == 255 and want.data[7, 0] == 1
    assert all(_same(found, want) for found in at_every_level(lambda: quantize.quantize_rows(x)))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width"), SIZES[:-1])
def test_norms_give_the_rows_of_what_they_compute(rows: int, width: int, dtype: torch.dtype) -> None:
    x, generator = _x(rows, width, dtype), torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
    plain = quantize_activations(cpu.layer_norm(x.float(), weight, bias, 1e-6))
    for found in at_every_level(lambda: quantize.layer_norm_rows(x, weight, bias, 1e-6)):
        assert _same(found, plain)
    plain = quantize_activations(cpu.rms_norm(x.float(), weight, 1e-5))
    found = list(at_every_level(lambda: quantize.rms_norm_rows(x, weight, 1e-5)))
    assert all(_same(each, found[0]) for each in found)
    # The two kernels order their factors differently: rounding of fp32, which may turn a tie into the next step.
    assert (found[0].data.int() - plain.data.int()).abs().max() <= 1
    assert torch.allclose(found[0].scale, plain.scale, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_finish(rows: int, width: int, activation: str | None) -> None:
    sums, scale = _x(rows, width) * 4, torch.rand(rows, generator=torch.Generator().manual_seed(2)) + 0.5
    bias, residual = _x(1, width)[0], _x(rows, width).flip(0).contiguous()
    act = {None: lambda v: v, "silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}[
        activation
    ]

    def want(kind: torch.dtype) -> Tensor:
        return act(sums.to(kind) * scale[:, None].to(kind) + bias.to(kind)) + residual.to(kind)

    found = list(at_every_level(lambda: quantize.finish(sums.clone(), scale, bias, activation, residual)))
    assert all(torch.equal(found[0], each) for each in found)
    if rows:
        truth = want(torch.float64)
        error, eager = ((y.double() - truth).abs().max().item() for y in (found[0], want(F32)))
        assert error <= 2 * eager + EPS * truth.abs().max().item()  # the contract's bound
    hidden = quantize_activations(quantize.finish(sums.clone(), scale, bias, activation))
    up = _x(rows, width).neg()
    gated = quantize.finish(sums.clone(), scale, None, activation) * (up * scale[:, None])
    for found_rows, product in at_every_level(
        lambda: (
            quantize.finish_rows(sums.clone(), scale, bias, activation),
            quantize.finish_rows(sums.clone(), scale, None, activation, up.clone()),
        )
    ):
        assert _same(found_rows, hidden) and _same(product, quantize_activations(gated))


def test_activations_far_out_and_nan() -> None:
    far = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    one = torch.ones(1)
    for silu, gelu in at_every_level(
        lambda: tuple(quantize.finish(far.clone(), one, None, name) for name in ("silu", "gelu_tanh"))
    ):
        assert torch.equal(silu[0, 3:], far[0, 3:]) and torch.equal(gelu[0, 3:], far[0, 3:])
        # exp(-88) is 6e-39: below it the true value is a subnormal or zero times the argument.
        assert silu[0, 1:3].abs().max() < 1e-35 and silu[0, 0].abs() < 1e-7 and gelu[0, :3].abs().max() < 1e-7
    x = _x(3, 21)
    scale = torch.tensor([1.0, torch.nan, 1.0])
    for y, rows in at_every_level(
        lambda: (
            quantize.finish(x.clone(), scale, None, "silu"),
            quantize.finish_rows(x.clone(), scale, None, "gelu_tanh"),
        )
    ):
        assert y[1].isnan().all() and not y[[0, 2]].isnan().any()
        assert rows.scale.isnan().tolist() == [False, True, False]


def test_quantising_refuses_what_it_cannot_do() -> None:
    x, scale = _x(4, 32), torch.ones(4)
    with pytest.raises(TypeError, match=r"quantize_rows: x has dtype torch.float16; accepted are"):
        quantize.quantize_rows(x.half())
    with pytest.raises(ValueError, match="contiguous"):
        quantize.quantize_rows(x.t())
    with pytest.raises(ValueError, match="K at least 1"):
        quantize.quantize_rows(x[:, :0])
    with pytest.raises(ValueError, match="bias has shape"):
        quantize.layer_norm_rows(x, x[0], x[0, :3], 1e-6)
    with pytest.raises(ValueError, match="unknown activation 'relu'; accepted are"):
        quantize.finish(x.clone(), scale, None, "relu")
    with pytest.raises(ValueError, match="scale has shape"):
        quantize.finish(x.clone(), scale[:3])
    with pytest.raises(TypeError, match="residual has dtype"):
        quantize.finish(x.clone(), scale, residual=x.double())
    with pytest.raises(RuntimeError, match="wants a gradient"):
        quantize.quantize_rows(x.clone().requires_grad_())


# Products -------------------------------------------------------------------------------------------------------------

PRODUCT_SIZES = [(130, 768, 320), (50, 3072, 33), (1, 1, 1), (3, 7, 5), (2, 64, 1), (5, 65, 17)]


@pytest.mark.processor
@PRODUCTS
@pytest.mark.parametrize(("rows", "inputs", "outputs"), PRODUCT_SIZES)
@pytest.mark.parametrize("extreme", [False, True])
def test_sums_are_exact(rows: int, inputs: int, outputs: int, extreme: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    if extreme:  # pairs of these overflow 16 bits, where instructions before VNNI would add them
        data = torch.randint(0, 2, (rows, inputs), generator=generator, dtype=torch.uint8) * 255
        integers = torch.full((outputs, inputs), 127, dtype=torch.int8)
    else:
        data = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
        integers = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    weight = quantize_weight(torch.zeros(outputs, inputs))._replace(data=integers, scale=torch.ones(outputs))
    found = int8.int8_matmul(IntegerRows(data, torch.ones(rows)), int8.pack_integers(weight))
    want = (data.long() - 128) @ integers.long().t()
    before = data.long() @ integers.long().t()

    def rounding(sums: Tensor) -> Tensor:
        return torch.where(sums.abs() < 2**24, 0.0, sums.double().abs() * 2**-24)

    # Sums of 32 bits are rounded to fp32, exact below 2^24; with AMX also before 128 times the weights is taken off.
    assert ((found.double() - want).abs() <= rounding(before) + rounding(want)).all()


# Rows and outputs about the tiles' of each level, inputs about a vector's 16, single ones, more than one chunk of outputs.
OWN_SIZES = [
    (1, 1, 1),
    (3, 15, 4),
    (4, 16, 5),
    (9, 17, 9),
    (8, 33, 8),
    (5, 47, 21),
    (2, 5000, 130),
    (50, 72, 41),
]


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), OWN_SIZES)
def test_own_product_is_exact(rows: int, inputs: int, outputs: int, extreme: bool) -> None:
    """To the bit, at every level: the sums are integers, the scale is one rounding of fp32 more."""
    generator = torch.Generator().manual_seed(rows + inputs)
    data = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
    integers = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    if extreme:  # 128 · 128 in every place: two of them overflow 16 bits
        data, integers = torch.zeros_like(data), torch.full_like(integers, -128)
    scale = torch.rand(outputs, generator=generator) + 0.5
    want = ((data.long() - 128) @ integers.long().t()).float() * scale
    x, weight = IntegerRows(data, torch.ones(rows)), IntegerWeight(integers, scale)
    for found in at_every_level(lambda: quantize.int8_matmul(x, weight)):
        assert torch.equal(found, want)


def test_own_product_refuses() -> None:
    x, weight = IntegerRows(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2)), quantize_weight(_x(3, 8))
    with pytest.raises(ValueError, match=r"data has shape \[2, 8\]; accepted is \[2, 9\]"):
        quantize.int8_matmul(x, quantize_weight(_x(3, 9)))
    with pytest.raises(TypeError, match="weight has dtype torch.uint8, this kernel has torch.int8"):
        quantize.int8_matmul(x, weight._replace(data=weight.data.view(torch.uint8)))
    with pytest.raises(ValueError, match=r"accepted is \[O, K\], 0 < K < 2\^17"):
        quantize.int8_matmul(x, IntegerWeight(torch.zeros(1, 2**17, dtype=torch.int8), torch.ones(1)))
    with pytest.raises(ValueError, match="data is not contiguous"):
        quantize.int8_matmul(x._replace(data=x.data.t().contiguous().t()), weight)
    assert quantize.int8_matmul(IntegerRows(x.data[:0], x.scale[:0]), weight).shape == (0, 3)


@pytest.mark.parametrize("degrees", [3, None])
def test_heavy_tails_get_a_second_term(degrees: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A normal weight does not; with it, what a product loses is the activations' rounding alone."""
    integer_products.provide(monkeypatch)
    generator = torch.Generator().manual_seed(4)
    x, matrix = _x(64, 768), torch.randn(96, 768, generator=generator)
    if degrees is not None:
        matrix /= torch.randn(degrees, 96, 768, generator=generator).square().mean(0).sqrt()
    truth = x.double() @ matrix.double().t()

    def error(y: Tensor) -> float:
        return float((y.double() - truth).norm() / truth.norm())

    packed = int8.pack(matrix)
    rounded = error(dequantize(quantize_activations(x)).double() @ matrix.double().t())
    assert (packed.rest is not None) == (degrees is not None)
    one, two = error(integer_ops.linear(x, packed._replace(rest=None))), error(integer_ops.linear(x, packed))
    print(f"relative L2: {one:.2g} in one term, {two:.2g} as packed, {rounded:.2g} by the activations alone")
    if degrees is not None:
        assert packed.nbytes == 2 * packed._replace(rest=None).nbytes
        # The second term's own rounding is 1/127 of the first's, so it does not show.
        assert two < 1.01 * rounded and one > 2 * two
    else:
        assert two == one


@pytest.mark.processor
@PRODUCTS
@pytest.mark.parametrize(("rows", "inputs", "outputs"), PRODUCT_SIZES)
def test_linear_is_the_reference(rows: int, inputs: int, outputs: int) -> None:
    x, residual = _x(rows, inputs), _x(rows, outputs)
    matrix, bias = _x(outputs, inputs) / inputs, _x(1, outputs)[0]
    weight, packed = quantize_weight(matrix), int8.pack(matrix)
    want = reference_linear(x, weight, bias, None, residual)
    found = integer_ops.linear(x, packed, bias, None, residual)
    # Four roundings more (sum, scale, scale, addition) of numbers no larger than the largest sum of magnitudes.
    size = (
        dequantize(quantize_activations(x)).abs() @ dequantize(weight).abs().t() + bias.abs() + residual.abs()
    )
    assert ((found - want).abs() <= 4 * EPS * size).all()
    assert torch.equal(integer_ops.linear(quantize.quantize_rows(x), packed, bias, None, residual), found)
    hidden = integer_ops.linear(x, packed, bias, "gelu_tanh")
    whole = integer_ops.linear(x, packed, bias, "gelu_tanh", torch.zeros_like(residual))
    assert isinstance(hidden, IntegerRows) and _same(hidden, quantize_activations(whole))


@pytest.mark.processor
@PRODUCTS
def test_a_row_that_is_not_finite_stays_alone() -> None:
    x, packed = _x(4, 40), int8.pack(_x(9, 40))
    x[1, 2], x[2, 7] = torch.nan, torch.inf
    y = integer_ops.linear(x, packed)
    assert y[1:3].isnan().all() and not y[[0, 3]].isnan().any()
    broken = _x(9, 40)
    broken[4, 0] = torch.inf
    assert integer_ops.linear(_x(4, 40), int8.pack(broken)).isnan().any(0).nonzero().tolist() == [[4]]


@pytest.mark.processor
@PRODUCTS
def test_smoothing_saves_digits_behind_a_loud_norm() -> None:
    """Three channels of the norm 50 times the others, and columns that take that back: without the scales moved from one to
    the other the quiet channels have two bits left."""
    x, width = _x(64, 256), 256
    generator = torch.Generator().manual_seed(3)
    norm, reader = torch.ones(width), torch.randn(96, width, generator=generator) / 16
    norm[[5, 77, 200]] = 50
    reader[:, [5, 77, 200]] /= 50
    truth = cpu.rms_norm(x, norm, 1e-5).double() @ reader.double().t()

    def error(weight: Tensor, packed: int8.Packed) -> float:
        y = integer_ops.linear(quantize.rms_norm_rows(x, weight, 1e-5), packed)
        return float((y.double() - truth).norm() / truth.norm())

    group = int8.pack_group(int8.pack, norm, None, [reader])
    plain, smooth = error(norm, int8.pack(reader)), error(group.weight, group.packed[0])
    print(f"relative L2: {plain:.3g} as they are, {smooth:.3g} smoothed")
    assert (
        smooth < 0.02 and smooth < plain / 5
    )  # 1/127 of the largest of a row is a step: 1% of a typical value
    for column, scale in (
        (0, 0.0),
        (1, torch.inf),
        (2, torch.nan),
    ):  # nothing that cannot be divided by comes of these
        reader[:, column] = scale
    assert int8.smoothing(norm, None, [reader]).isfinite().all()


# Where it is served ---------------------------------------------------------------------------------------------------


def test_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "ours", lambda: False)
    gpu = why_not_int8(torch.device("cuda"))
    assert gpu is not None and "oneDNN's for CPUs, the policy is on cuda" in gpu
    with monkeypatch.context() as patch:
        play(patch, "Skylake-X")
        reason = str(why_not_int8(CPU))
        assert (
            "multiplies no 8-bit integers; accepted are AVX512-VNNI, AVX-VNNI, AMX-INT8, and dot product"
            in reason
        )
        with pytest.raises(RuntimeError, match="precision='int8' cannot serve.*multiplies no 8-bit integers"):
            backends.select("auto", CPU, False, "int8")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert "built without oneDNN's integer product" in str(why_not_int8(CPU))
    with monkeypatch.context() as patch:
        patch.setattr(extension, "why_missing", lambda kind: f"{kind} was not compiled: no compiler")
        assert why_not_int8(CPU) == "cpu was not compiled: no compiler"
    # A product that saturates is found out by asking for one, not by the processor's name alone.
    play(monkeypatch, "Cascade Lake")
    monkeypatch.setattr(int8, "int8_matmul", lambda x, weight: torch.full((2, 16), 1.0))
    int8._sums_are_exact.cache_clear()
    assert "saturate" in str(why_not_int8(CPU))
    int8._sums_are_exact.cache_clear()
