"""RMSNorm on a CPU against the reference in fp64, judged by eager torch's error in that dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.rms_norm import rms_norm

SIZES = [(50, 720), (177, 960), (50, 480), (1, 64), (7, 33), (3, 1), (2, 17), (5, 1000), (4, 16)]
pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not cpu.supported(), reason=extension.why_missing("cpu") or "built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, generator=generator)
    return (3 * x).to(dtype), (1 + 0.3 * weight).to(dtype)


def assert_no_worse_than_eager(ours: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    """Worst error at most twice eager's, plus one unit in the last place, for eager is sometimes exact."""
    truth, eager = rms_norm(x.double(), weight.double(), eps), rms_norm(x, weight, eps)
    ulp = torch.finfo(ours.dtype).eps * truth.abs().max()
    error, allowed = (ours.double() - truth).abs().max(), 2 * (eager.double() - truth).abs().max() + ulp
    assert error <= allowed, f"worst error {error:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize(("rows", "width"), SIZES)
@DTYPES
def test_error_is_no_more_than_eagers_and_only_the_output_is_written(
    dtype: torch.dtype, rows: int, width: int
) -> None:
    x, weight = inputs(rows, width, dtype)
    whole = torch.full((x.numel() + 64,), torch.nan, dtype=dtype)
    out = whole[32:-32].view_as(x)
    assert cpu.rms_norm(x, weight, 1e-5, out=out) is out
    assert whole[:32].isnan().all() and whole[-32:].isnan().all(), "wrote outside its output"
    assert_no_worse_than_eager(out, x, weight, 1e-5)
    assert torch.equal(cpu.rms_norm(x, weight, 1e-5), out)


@DTYPES
def test_leading_dimensions_are_kept(dtype: torch.dtype) -> None:
    x, weight = inputs(6, 40, dtype)
    folded = cpu.rms_norm(x.view(2, 3, 40), weight, 1e-5)
    assert folded.shape == (2, 3, 40) and torch.equal(folded.view(6, 40), cpu.rms_norm(x, weight, 1e-5))
    assert cpu.rms_norm(x[:0], weight, 1e-5).shape == (0, 40)


@DTYPES
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype) -> None:
    x, weight = inputs(4, 33, dtype)
    x[1, 32], x[2, 0] = torch.nan, torch.inf
    y = cpu.rms_norm(x, weight, 1e-5)
    assert y[1].isnan().all() and y[[0, 3]].isfinite().all()
    assert y[2, 0].isnan() and (y[2, 1:] == 0).all(), "a row of infinite norm is scaled to zero, as in torch"


@DTYPES
def test_eps_decides_for_small_rows(dtype: torch.dtype) -> None:
    x, weight = inputs(2, 64, dtype)
    x = x * 1e-3
    ours = [cpu.rms_norm(x, weight, eps) for eps in (1e-5, 1e-2)]
    for got, eps in zip(ours, (1e-5, 1e-2), strict=True):
        assert_no_worse_than_eager(got, x, weight, eps)
    assert (ours[0].abs() > 2 * ours[1].abs()).float().mean() > 0.9
