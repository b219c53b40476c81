"""The compiled layer norm: beyond the contract, dtypes, levels, threads and what it refuses."""

from __future__ import annotations

import pytest
import torch

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.layer_norm import layer_norm

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
F32, BF16 = torch.float32, torch.bfloat16


def _inputs(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x = (
        torch.randn(rows, width, generator=generator) * 3 + 20
    )  # a mean that would drown a naive sum of squares
    weight, bias = (torch.randn(width, generator=generator) for _ in range(2))
    return x.to(dtype), weight, bias


@pytest.mark.parametrize(("dtype", "out"), [(F32, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize(("rows", "width"), [(2048, 768), (3, 1), (1, 15), (5, 16), (7, 33)])
def test_error_bits_and_threads(rows: int, width: int, dtype: torch.dtype, out: torch.dtype) -> None:
    x, weight, bias = _inputs(rows, width, dtype)
    truth = layer_norm(x.double(), weight.double(), bias.double(), 1e-6)
    # Eager rounds its result to the dtype of x; in fp32 -> bf16 that is a second rounding, which ours leaves out.
    eager = layer_norm(x, weight.to(dtype), bias.to(dtype), 1e-6, out)
    results = []
    for level in cpu.instruction_levels():
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with cpu.instruction_level(level):
                    results.append(cpu.layer_norm(x, weight, bias, 1e-6, out))
            finally:
                torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results) and results[0].dtype is out
    error, eager_error = ((y.double() - truth).abs().max().item() for y in (results[0], eager))
    assert error <= 2 * eager_error + torch.finfo(out).eps * truth.abs().max().item()


def test_nan_stays_in_its_row() -> None:
    x, weight, bias = _inputs(4, 32, F32)
    x[1, 3] = torch.nan
    y = cpu.layer_norm(x, weight, bias, 1e-6)
    assert y[1].isnan().all() and not y[[0, 2, 3]].isnan().any()


def test_refusals() -> None:
    x, weight, bias = _inputs(4, 32, F32)
    with pytest.raises(TypeError, match="float16.*accepted are"):
        cpu.layer_norm(x.half(), weight, bias, 1e-6)
    with pytest.raises(TypeError, match="bfloat16, the result torch.float32"):
        cpu.layer_norm(x.bfloat16(), weight, bias, 1e-6, F32)
    with pytest.raises(ValueError, match="bias has shape"):
        cpu.layer_norm(x, weight, bias[:3], 1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.layer_norm(x.t(), weight[:4], bias[:4], 1e-6)
