"""8-bit weights in every kernel that multiplies by one, against the same product emulated in torch and in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import triton_by
from support.contract import changed, inputs_in, leaves, reference_module, run, to_device

from smolvla_fast.ops.reference.quantize import E4M3, dequantize, product, quantize_rows
from smolvla_fast.ops.select import reference_ops, select

pytest.importorskip("triton")
pytestmark = [pytest.mark.triton, *triton_by.FP8]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = ("linear", "linear_residual", "norm_swiglu", "norm_qkv_rope", "pixel_shuffle_linear")


def quantised(op: str, case: dict[str, int], seed: int = 0, outlier: float = 1.0) -> tuple[Any, Any]:
    """Inputs with 8-bit weights, and in fp64 with what those stand for."""
    narrow, wide = inputs_in(op, case, torch.float32, seed)
    for inputs in (narrow, wide):
        inputs["x"] = inputs["x"].clone()
        inputs["x"][..., ::7] *= outlier
    rounded = {
        name: quantize_rows(value, torch.float32)
        for name, value in leaves(narrow).items()
        if name.startswith("weights.") or ((name.endswith("_weight") or name == "weight") and value.ndim == 2)
    }
    meant = {name: dequantize(value, torch.float64) for name, value in rounded.items()}
    return changed(narrow, rounded), changed(wide, meant)


def there(value: Any) -> Any:
    """Quantised weights keep their dtype field."""
    return to_device(value, DEVICE)


@pytest.mark.long
@pytest.mark.parametrize("outlier", [1.0, 50.0])
@pytest.mark.parametrize("op", OPS)
def test_error_is_that_of_quantising(op: str, outlier: float) -> None:
    """Twice what the emulation loses against fp64, and to the emulation itself as near as fp32 sums are."""
    reference, ops = reference_ops(), select("triton", torch.device(DEVICE), False)
    for case in reference_module(op).CASES[-2:]:
        if reference_module(op).cost(case, 4).flops > 2e8:
            continue  # the interpreter takes too long
        narrow, wide = quantised(op, case, outlier=outlier)
        truth, eager = run(reference, op, wide), run(reference, op, narrow)
        ours = {name: value.cpu() for name, value in run(ops, op, there(narrow)).items()}
        for name, want in truth.items():
            error, lost = ((x[name].double() - want).abs().max() for x in (ours, eager))
            assert 0 < error <= 2 * lost, (op, case, name)
            # A value at the middle between two e4m3 may go either way in sums of another order: one step of an
            # eighth of one term in K. Anything wrong in the scales is off by as much as the result.
            assert (ours[name] - eager[name]).norm() <= 1e-2 * eager[name].norm(), (op, case, name)


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_in_its_row(op: str) -> None:
    case = reference_module(op).CASES[-1]
    narrow, _ = quantised(op, case)
    clean = run(select("triton", torch.device(DEVICE), False), op, there(narrow))
    x = narrow["x"]
    (x.view(-1, x.shape[-1]))[0, 3] = torch.nan
    of_narrow = run(select("triton", torch.device(DEVICE), False), op, there(narrow))
    name = "y" if "y" in clean else "q"
    rows = (value.reshape(-1, value.shape[-1]) for value in (clean[name], of_narrow[name]))
    before, after = rows
    assert after[0].isnan().all() and torch.equal(before[-1], after[-1])


def test_quantised_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [-7.0, 3.5], [1e-20, 2e-20]])
    data, scale, dtype = quantize_rows(x)
    assert data.dtype is E4M3 and dtype is torch.bfloat16
    assert torch.equal(scale, torch.tensor([1.0, 7 / 448, 2e-20 / 448]))
    assert torch.equal(data.float(), torch.tensor([[0.0, 0.0], [-448.0, 224.0], [224.0, 448.0]]))
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(50, 300, generator=generator)
    back = dequantize(quantize_rows(big))
    assert ((back - big).abs() <= big.abs() / 16 + big.abs().amax(1, keepdim=True) / 448 / 512).all()
    weight = torch.randn(20, 300, generator=generator)
    lost = (product(big, quantize_rows(weight)) - big @ weight.t()).norm() / (big @ weight.t()).norm()
    assert 1e-3 < lost < 0.05  # two roundings of three bits each
