"""The compiled linear and SwiGLU against fp64, at every instruction level, emulated where this processor lacks it.

Tolerance: the worst error may be twice that of eager torch in the same dtypes. Both round the same quantities,
in another order; a factor of two separates that from a lost bit.
"""

from functools import lru_cache

import pytest
import torch
from support.processors import LEVELS_EMULATED, at_level

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference import linear as reference
from smolvla_fast.ops.reference.norm_swiglu import norm_swiglu
from smolvla_fast.ops.reference.rms_norm import rms_norm

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.processor,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
]
AT_LEVELS = pytest.mark.parametrize("level", LEVELS_EMULATED)
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
# dtypes of x, weight, y
MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (F32, BF16, F32), (F32, BF16, BF16)]
MIXED = pytest.mark.parametrize("dtypes", MIXES, ids=lambda mix: "-".join(str(d)[6:] for d in mix))
# rows, inputs, outputs: about the tile's rows, more than one block of them, odd inputs and outputs, single ones, and sums in
# parts of which the last fills no vector.
SHAPES = [
    (50, 720, 33),
    (1, 960, 7),
    (2, 795, 29),
    (12, 1100, 10),
    (5, 33, 47),
    (52, 33, 47),
    (55, 33, 47),
    (50, 2048, 47),
    (49, 31, 5),
    (51, 65, 81),
    (177, 2048, 6),
    (177, 40, 163),
    (97, 256, 2),
    (177, 1100, 17),
    (2, 1, 1),
    (3, 7, 2),
]
LONG_SUMS = [
    (97, 256, 2),
    (177, 960, 33),
    (177, 960, 7),
    (50, 960, 33),
    (50, 2048, 47),
    (50, 720, 32),
    (50, 960, 2),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def randn(*shape, dtype=F32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@lru_cache(maxsize=1)  # levels come one after the other
def make(shape, dtypes):
    """x, weight, up_weight, bias, residual, norm weight."""
    (rows, inputs, outputs), (x, weight, y) = shape, dtypes
    return (
        randn(rows, inputs, dtype=x),
        randn(outputs, inputs, dtype=weight, seed=1, scale=inputs**-0.5),
        randn(outputs, inputs, dtype=weight, seed=2, scale=inputs**-0.5),
        randn(outputs, dtype=weight, seed=3),
        randn(rows, outputs, dtype=y, seed=4),
        1 + randn(inputs, dtype=weight, seed=5, scale=0.3),
    )


def poisoned(shape, dtypes):
    return torch.full((shape[0], shape[2]), float("nan"), dtype=dtypes[2])


@lru_cache(maxsize=4)
def judge(function, dtypes, *tensors, sums=1):
    """(truth, allowed error), for all levels where function and tensors are the same objects.

    ``function`` in fp64 is the truth; eager runs it in the dtype of the weight, then rounds to the result's.

    sums  how many of them are multiplied: each carries its own walk of errors into the product
    """
    wide = [None if t is None else t.double() for t in tensors]
    eager = [None if t is None else t.to(dtypes[1]) for t in tensors]
    truth = function(*wide)
    allowed = 2 * (function(*eager).to(dtypes[2]).double() - truth).abs().max()
    if dtypes == (F32, F32, F32):
        # Among few outputs eager may be exact by luck, and MKL sums a vector's product in more chains than we do. Errors of
        # a chain walk at random: sqrt(K)/8 units in the last place, as in contract.py, of a product of size 1 (inputs are
        # normal, weights scaled by K**-0.5), which an activation or a product with another may shrink.
        largest = max(1.0, truth.abs().max())
        allowed = max(allowed, sums * tensors[0].shape[-1] ** 0.5 / 8 * torch.finfo(F32).eps * largest)
    # Eager is sometimes exact, and twice nothing is nothing: one unit in the last place more, as in contract.py.
    return truth, allowed + torch.finfo(dtypes[2]).eps * truth.abs().max()


def assert_as_exact_as_eager(got, function, dtypes, *tensors, sums=1):
    truth, allowed = judge(function, dtypes, *tensors, sums=sums)
    assert got.dtype == dtypes[2]
    assert (got.double() - truth).abs().max() <= allowed


WITH = {
    activation: lambda x, weight, b, r, a=activation: reference.linear(x, weight, b, a, r)
    for activation in (None, "gelu_tanh", "silu")
}


def gated(x, gate, up):
    return reference.linear(x, gate, None, "silu") * reference.linear(x, up)


def norm_gated(x, weight, gate, up):
    return norm_swiglu(x, (weight, 1e-5), gate, up)


@AT_LEVELS
@MIXED
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_error_against_fp64(shape, dtypes, level):
    x, weight, _, bias, residual, _ = make(shape, dtypes)
    with at_level(level):
        for extras in (
            (None, None, None),
            (bias, "gelu_tanh", None),
            (bias, "silu", residual),
            (None, None, residual),
        ):
            b, activation, r = extras
            y = cpu.linear(x, weight, b, activation, r, dtypes[2], out=poisoned(shape, dtypes))
            assert_as_exact_as_eager(y, WITH[activation], dtypes, x, weight, b, r)


@AT_LEVELS
@MIXED
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_swiglu_error_against_fp64(shape, dtypes, level):
    x, gate, up, _, _, norm_weight = make(shape, dtypes)
    with at_level(level):
        y = cpu.swiglu(x, gate, up, out=poisoned(shape, dtypes))
        normed = cpu.swiglu(x, gate, up, norm=(norm_weight, 1e-5), out=poisoned(shape, dtypes))
    assert_as_exact_as_eager(y, gated, dtypes, x, gate, up, sums=2)
    assert_as_exact_as_eager(normed, norm_gated, dtypes, x, norm_weight, gate, up, sums=2)


@AT_LEVELS
@MIXED
@pytest.mark.parametrize("shape", [(50, 720, 40), (66, 33, 47)], ids=str)
def test_norm_error_against_fp64(shape, dtypes, level):
    x, weight, _, _, _, norm_weight = make(shape, dtypes)
    x = x.clone()
    x[1] *= 1e-4  # there eps counts
    with at_level(level):
        y = cpu.linear(x, weight, norm=(norm_weight, 1e-5), out=poisoned(shape, dtypes))
    assert_as_exact_as_eager(
        y, lambda x, n, w: reference.linear(rms_norm(x, n, 1e-5), w), dtypes, x, norm_weight, weight
    )


@lru_cache(maxsize=1)
def beside_an_outlier(shape, seed):
    x, weight = randn(*shape[:2], seed=seed), randn(shape[2], shape[1], seed=seed + 9, scale=shape[1] ** -0.5)
    x[:, 5] *= 100
    return x, weight


@AT_LEVELS
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", LONG_SUMS, ids=lambda shape: "x".join(map(str, shape)))
def test_long_sums_beside_an_outlier_column(shape, seed, level):
    """Where sums are long chains of additions, one large input costs the rest their last bits."""
    x, weight = beside_an_outlier(shape, seed)
    with at_level(level):
        y = cpu.linear(x, weight, out=poisoned(shape, (F32,) * 3))
    assert_as_exact_as_eager(y, reference.linear, (F32,) * 3, x, weight)


@AT_LEVELS
@MIXED
def test_bits_do_not_depend_on_threads_or_runs_nor_on_rows_of_one_kernel(dtypes, level, threads):
    x, weight, up, bias, residual, norm_weight = make((177, 800, 99), dtypes)
    results = []
    with at_level(level):
        for count in (1, 2, 7, 2):
            threads(count)
            y = cpu.linear(x, weight, bias, "silu", residual, norm=(norm_weight, 1e-5))
            chunk = cpu.linear(x[90:140], weight, norm=(norm_weight, 1e-5), out_dtype=dtypes[2])
            results.append((y, cpu.swiglu(x, weight, up, out_dtype=dtypes[2]), chunk))
        whole = results[0][1]
        many, few, some, chunk, fewer, four, two = (
            cpu.swiglu(x[begin:end], weight, up, out_dtype=dtypes[2])
            for begin, end in ((20, 93), (90, 154), (90, 151), (90, 140), (90, 137), (90, 94), (92, 94))
        )
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
    assert torch.equal(many, whole[20:93]) and torch.equal(few, whole[90:154])
    assert torch.equal(some, whole[90:151]) and torch.equal(chunk[:48], whole[90:138])
    assert torch.equal(four[2:], two) and torch.equal(fewer[:4], four)
    # Fewer than 48 fp32 rows, and up to four that fill no panel, are summed in lanes at these two levels, in another order.
    if level not in ("baseline", "avx2") or dtypes != (F32, F32, F32):
        assert torch.equal(four, few[:4]) and torch.equal(chunk, whole[90:140])


@AT_LEVELS
@DTYPES
def test_nan_and_infinity_stay_in_their_rows(dtype, level):
    x, weight = randn(9, 50, dtype=dtype), randn(8, 50, dtype=dtype, seed=1)
    x[3, 49], x[5, 0] = float("nan"), float("inf")
    with at_level(level):
        for activation in (None, "silu", "gelu_tanh"):
            y = cpu.linear(x, weight, None, activation)
            assert y[3].isnan().all()
            assert not y[5].isfinite().all()
            assert y[[0, 1, 2, 4, 6, 7, 8]].isfinite().all()


@AT_LEVELS
@DTYPES
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_activations_over_their_whole_range(activation, dtype, level):
    values = [*torch.linspace(-200, 200, 4001).tolist(), 1e30, -1e30, 1e-30]
    x = torch.tensor(values, dtype=dtype)[:, None]
    one = torch.ones(1, 1, dtype=dtype)
    with at_level(level):
        y = cpu.linear(x, one, None, activation)
    truth = reference.linear(x.double(), one.double(), None, activation)
    # Some units in the last place; far to the left the result vanishes beside its argument, and 1e-7 beside 1.
    close = torch.finfo(dtype).eps * (1 if dtype == BF16 else 4) * truth.abs() + 1e-7
    assert ((y.double() - truth).abs() <= close).all()


def test_the_residual_may_be_written_in_place():
    x, weight, _, _, residual, _ = make((50, 720, 47), (BF16, BF16, F32))
    expected = cpu.linear(x, weight, residual=residual)
    stream = residual.clone()
    assert cpu.linear(x, weight, residual=stream, out=stream) is stream
    assert expected.dtype == F32 and torch.equal(stream, expected)


def test_leading_dimensions_and_empty_inputs():
    weight = randn(6, 8)
    assert torch.equal(cpu.linear(randn(12, 8), weight).view(3, 4, 6), cpu.linear(randn(3, 4, 8), weight))
    assert cpu.linear(torch.empty(2, 0, 8), weight).shape == (2, 0, 6)
    assert cpu.linear(randn(8), weight).shape == (6,)


def test_wrong_arguments_are_named():
    x, weight, up, bias, residual, norm_weight = make((4, 8, 6), (F32, F32, F32))

    def refused(error, match, x=x, weight=weight, **changes):
        with pytest.raises(error, match=match):
            cpu.linear(x, weight, **changes)

    refused(TypeError, "weight has dtype torch.float16; accepted are", weight=weight.half())
    refused(TypeError, "x has dtype torch.float16, weight has torch.float32", x=x.half())
    refused(TypeError, "the result can be that or torch.float32, not torch.bfloat16", out_dtype=BF16)
    refused(TypeError, "bias has dtype torch.bfloat16", bias=bias.bfloat16())
    refused(TypeError, "residual has dtype torch.float32, the result has torch.bfloat16", out_dtype=BF16,
            x=x.bfloat16(), weight=weight.bfloat16(), residual=residual)  # fmt: skip
    refused(ValueError, r"x has shape \[4, 7\]; accepted is \[4, 8\]", x=randn(4, 7))
    refused(ValueError, r"bias has shape \[5\]; accepted is \[6\]", bias=bias[:5])
    refused(ValueError, r"norm weight has shape \[7\]; accepted is \[8\]", norm=(norm_weight[:7], 1e-5))
    refused(ValueError, r"accepted is \[O, I\]", weight=weight[0])
    refused(ValueError, "weight is not contiguous", weight=randn(8, 6).t())
    refused(
        ValueError, "unknown activation 'relu'; accepted are None, 'silu', 'gelu_tanh'", activation="relu"
    )
    refused(ValueError, "residual is on meta", residual=residual.to("meta"))
    square = randn(8, 8)
    refused(ValueError, r"out overlaps another tensor", x=square, weight=randn(8, 8), out=square)
    refused(RuntimeError, "weight wants a gradient", weight=weight.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"swiglu: up_weight has shape \[5, 8\]; accepted is \[6, 8\]"):
        cpu.swiglu(x, weight, up[:5])
