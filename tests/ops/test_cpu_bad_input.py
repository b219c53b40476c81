"""Odd strides, NaN, subnormals and no samples through every op of the backends ``torch`` and ``cpu``: as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.contract import OPS, changed, inputs_in, leaves, reference_module, run
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.select import reference_ops, select

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# What the action chunk's rows pass through, and more than ``CPU_KERNEL_ROWS`` of ops/defaults.py, which take another path.
CASES = [(op, reference_module(op).CASES[-1]) for op in OPS]
CASES += [(op, {**case, key: 70}) for op, case in CASES for key in ("rows", "T") if key in case]
AT_CASES = pytest.mark.parametrize(("op", "case"), CASES, ids=str)
WRITTEN = ("slots.k", "slots.v")


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.cpu_kernels)])
def ops(request: pytest.FixtureRequest) -> Any:
    reason = why_not(request.param, CPU)
    if reason:
        pytest.skip(reason)
    return select(request.param, CPU, stock_order=False)


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of at least one dimension, and read, not written."""
    return {
        name: value
        for name, value in leaves(inputs).items()
        if isinstance(value, Tensor) and value.dim() and name not in WRITTEN
    }


def spread(x: Tensor) -> Tensor:
    """Every second element of a larger tensor, NaN (True, 1) in between: no dimension has the stride it should have."""
    filler = torch.nan if x.is_floating_point() else 1
    whole = torch.full([size + 1 for size in x.shape[:-1]] + [2 * x.shape[-1] + 3], filler, dtype=x.dtype)
    view = whole[(*(slice(0, size) for size in x.shape[:-1]), slice(1, 2 * x.shape[-1] + 1, 2))]
    view.copy_(x)
    return view


@pytest.mark.processor
@AT_CASES
@DTYPES
def test_strides_do_not_matter(op: str, case: dict[str, int], dtype: torch.dtype, ops: Any) -> None:
    inputs, _ = inputs_in(op, case, dtype, seed=0)
    want = run(ops, op, inputs)
    for name, value in tensors(inputs).items():
        for key, got in run(ops, op, changed(inputs, {name: spread(value)})).items():
            # Libraries choose another kernel for other strides, which adds up in another order: some units in the last
            # place of sums of at most 200 terms. What is read at a wrong place is wrong in the first.
            close = 8 * torch.finfo(dtype).eps * want[key].abs().max()
            assert ((got - want[key]).abs() <= close).all(), f"{op}.{key} with {name} spread out"


@pytest.mark.processor
@AT_CASES
@DTYPES
def test_nan_goes_where_it_goes_in_the_reference(
    op: str, case: dict[str, int], dtype: torch.dtype, ops: Any
) -> None:
    """Where it goes in fp64, and nowhere else but where stock's own call of the dtype has it too.

    With AMX, oneDNN's bf16 product reads on into the next row where a row's length is no multiple of 32, and multiplies
    what it finds there by zero: a NaN there shows a row too early, in stock as in backend torch.
    """
    inputs, wide = inputs_in(op, case, dtype, seed=1)
    for name, value in tensors(inputs).items():
        # torch's backend adds its mask to the scores, for filling takes it several times as long: NaN in a hidden key shows.
        adds = ops.backend == "torch" and op == "masked_attention" and name == "k"
        if adds or not value.is_floating_point():
            continue
        poisoned = value.clone()
        poisoned.view(-1)[value.numel() // 2] = torch.nan
        truth = run(reference_ops(), op, changed(wide, {name: poisoned.double()}))
        stock, got = (run(table, op, changed(inputs, {name: poisoned})) for table in (reference_ops(), ops))
        for key, want in truth.items():
            least, most = want.isnan(), want.isnan() | stock[key].isnan()
            here = got[key].isnan()
            assert (least <= here).all() and (here <= most).all(), f"{op}.{key} with NaN in {name}"


@pytest.mark.processor
@AT_CASES
def test_subnormals_are_numbers(op: str, case: dict[str, int], ops: Any) -> None:
    """The first input, all its values subnormal; the processor's modes to flush them are nobody's to turn on."""
    inputs, wide = inputs_in(op, case, torch.float32, seed=2)
    if op == "rope_masks":  # of masks
        return
    name = next(
        name for name, value in tensors(inputs).items() if value.is_floating_point() or op == "image_prep"
    )
    if not inputs[name].is_floating_point():
        inputs[name] = torch.rand(1, 3, case["h"], case["w"])
    inputs[name] = inputs[name] * 5e-40
    wide[name] = inputs[name].double()
    assert (inputs[name] != 0).any() and inputs[name].abs().max() < 1.2e-38
    truth, eager, got = (
        run(table, op, x) for table, x in ((reference_ops(), wide), (reference_ops(), inputs), (ops, inputs))
    )
    for key, want in truth.items():
        error, eager_error = ((x[key].double() - want).abs().max().item() for x in (got, eager))
        # As in the contract, plus half the smallest subnormal for each of at most 1000 terms.
        allowed = 8 * torch.finfo(torch.float32).eps * want.abs().max().item() + 500 * 2.0**-149
        assert error <= 2 * eager_error + allowed, (
            f"{op}.{key}: {error:.3g} against eager's {eager_error:.3g}"
        )


@pytest.mark.parametrize("op", ["image_prep", "layer_norm", "linear", "linear_residual", "norm_swiglu"])
@DTYPES
def test_no_samples(op: str, dtype: torch.dtype, ops: Any) -> None:
    inputs, _ = inputs_in(op, reference_module(op).CASES[-1], dtype, seed=0)
    none = {
        name: value[:0] if name in ("x", "frames", "residual") and isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    got, want = (run(table, op, none)["y"] for table in (ops, reference_ops()))
    assert got.shape == want.shape and got.shape[0] == 0 and got.dtype is want.dtype


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels are not compiled")
@pytest.mark.parametrize(
    "level", extension.load("cpu").levels()[:-1] if extension.available("cpu") else [], indirect=True
)
@AT_CASES
def test_nan_at_the_levels_below(op: str, case: dict[str, int], level: str) -> None:
    """The tests above ran the highest level."""
    table = select("cpu", CPU, stock_order=False)
    test_nan_goes_where_it_goes_in_the_reference(op, case, torch.float32, table)
    test_strides_do_not_matter(op, case, torch.float32, table)
