"""The compiled LayerNorm and RMSNorm.

Tolerance: the worst error may be twice eager torch's, plus one unit in the last place, for eager is sometimes exact.
"""

from __future__ import annotations

import pytest
import torch
from support.backends import at_every_level
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.layer_norm import layer_norm
from smolvla_fast.ops.reference.rms_norm import rms_norm

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
]
F32, BF16 = torch.float32, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def rows_of(rows: int, width: int, dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((rows, width), (width,), (width,))
    )
    return (3 * x + mean).to(dtype), 1 + 0.3 * weight, bias


def assert_no_worse(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    error, eager_error = ((y.double() - truth).abs().max() for y in (ours, eager))
    assert error <= 2 * eager_error + torch.finfo(ours.dtype).eps * truth.abs().max()


@DTYPES
@pytest.mark.parametrize(
    ("rows", "width"),
    [(50, 720), (177, 960), (50, 480), (1, 64), (7, 33), (3, 1), (2, 17), (5, 1000), (4, 16)],
)
def test_rms_norm(dtype: torch.dtype, rows: int, width: int) -> None:
    """Only the output is written."""
    x, weight, _ = rows_of(rows, width, dtype)
    weight = weight.to(dtype)
    whole = torch.full((x.numel() + 64,), torch.nan, dtype=dtype)
    out = whole[32:-32].view_as(x)
    assert cpu.rms_norm(x, weight, 1e-5, out=out) is out
    assert whole[:32].isnan().all() and whole[-32:].isnan().all(), "wrote outside its output"
    assert_no_worse(out, rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5))


@DTYPES
def test_rms_norm_of_leading_dimensions_and_no_rows(dtype: torch.dtype) -> None:
    x, weight, _ = rows_of(6, 40, dtype)
    folded = cpu.rms_norm(x.view(2, 3, 40), weight.to(dtype), 1e-5)
    assert folded.shape == (2, 3, 40)
    assert torch.equal(folded.view(6, 40), cpu.rms_norm(x, weight.to(dtype), 1e-5))
    assert cpu.rms_norm(x[:0], weight.to(dtype), 1e-5).shape == (0, 40)


@DTYPES
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight, bias = rows_of(4, 33, dtype)
    x[1, 32], x[2, 0] = torch.nan, torch.inf
    y = cpu.rms_norm(x, weight.to(dtype), 1e-5)
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()
    assert y[2, 0].isnan() and (y[2, 1:] == 0).all(), "a row of infinite norm is scaled to zero, as in torch"
    y = cpu.layer_norm(x, weight, bias, 1e-6)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


@DTYPES
def test_eps_decides_for_small_rows(dtype: torch.dtype) -> None:
    x, weight, _ = rows_of(2, 64, dtype)
    x, weight = x * 1e-3, weight.to(dtype)
    ours = [cpu.rms_norm(x, weight, eps) for eps in (1e-5, 1e-2)]
    for got, eps in zip(ours, (1e-5, 1e-2), strict=True):
        assert_no_worse(got, rms_norm(x, weight, eps), rms_norm(x.double(), weight.double(), eps))
    assert (ours[0].abs() > 2 * ours[1].abs()).float().mean() > 0.9


@pytest.mark.parametrize(("dtype", "out"), [(F32, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize(("rows", "width"), [(2048, 768), (3, 1), (1, 15), (5, 16), (7, 33)])
def test_layer_norm_has_equal_bits_at_every_level(
    rows: int, width: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    x, weight, bias = rows_of(rows, width, dtype, mean=20)  # which would drown a naive sum of squares
    first, *others = at_every_level(lambda: cpu.layer_norm(x, weight, bias, 1e-6, out))
    assert all(torch.equal(first, other) for other in others) and first.dtype is out
    # Eager rounds its result to the dtype of x; in fp32 -> bf16 that is a second rounding, which ours leaves out.
    eager = layer_norm(x, weight.to(dtype), bias.to(dtype), 1e-6, out)
    assert_no_worse(first, eager, layer_norm(x.double(), weight.double(), bias.double(), 1e-6))


def test_layer_norm_writes_where_it_is_told() -> None:
    x, (weight, bias) = torch.randn(5, 33), torch.randn(2, 33)
    out = torch.full((5, 33), float("nan"))
    assert cpu.layer_norm(x, weight, bias, 1e-6, out=out) is out
    assert torch.equal(out, cpu.layer_norm(x, weight, bias, 1e-6))
    with pytest.raises(TypeError, match="layer_norm: out"):
        cpu.layer_norm(x, weight, bias, 1e-6, out=out.bfloat16())
    with pytest.raises(ValueError, match="layer_norm: out"):
        cpu.layer_norm(x, weight, bias, 1e-6, out=x)


def test_compiled_layer_norm_refuses_what_it_cannot_do() -> None:
    x, weight, bias = rows_of(4, 32, F32)
    with pytest.raises(TypeError, match="float16.*accepted are"):
        cpu.layer_norm(x.half(), weight, bias, 1e-6)
    with pytest.raises(TypeError, match="bfloat16, the result torch.float32"):
        cpu.layer_norm(x.bfloat16(), weight, bias, 1e-6, F32)
    with pytest.raises(ValueError, match="bias has shape"):
        cpu.layer_norm(x, weight, bias[:3], 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.layer_norm(x.t(), weight[:4], bias[:4], 1e-6)
