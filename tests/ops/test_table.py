"""The table of ops is what the backends' modules export: a misspelt op is an error, what is missing has a reason."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.contract import ONE_BACKENDS, check

from smolvla_fast.ops.select import BACKENDS, backend_ops, reference_ops, table
from smolvla_fast.ops.table import BY_TORCH, NAMES, Ops, derive

CPU = torch.device("cpu")


def module(**functions: Any) -> ModuleType:
    found = ModuleType("smolvla_fast.ops.made.ops")
    vars(found).update(functions)
    return found


def linear(*args: Any) -> None: ...


def test_a_backend_serves_what_its_module_exports_and_the_table_below_the_rest() -> None:
    below = backend_ops("torch")
    ops = derive("made", module(linear=linear, _linear=linear, torch=torch, Ops=Ops), below)
    assert ops.backend == "made" and ops.linear is linear and ops.norm_swiglu is below.norm_swiglu
    assert ops.missing["norm_swiglu"] == BY_TORCH and "linear" not in ops.missing
    above = derive("upper", module(norm_swiglu=linear), ops)
    assert above.missing["linear"] == "the kernel of 'made' serves it"
    assert above.missing["attention"] == BY_TORCH, "nor has 'made' one"


@pytest.mark.parametrize("name", ["lineaer", "norm_qkv", "helper", "linear_residual_"])
def test_a_public_function_that_is_no_op_is_an_error(name: str) -> None:
    with pytest.raises(
        TypeError, match=f"ops.made.ops has {name}, which is no op; accepted are image_prep, "
    ):
        derive("made", module(**{name: linear}), reference_ops())


@pytest.mark.parametrize("name", ["reference", "torch", "cpu", "integers", "triton"])
def test_every_backend_exports_ops_alone(name: str) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    ops = backend_ops(name)
    assert ops.backend == {"integers": "cpu"}.get(name, name)
    assert all(getattr(ops, op) is not None for op in set(NAMES) - ONE_BACKENDS)
    assert not set(ops.missing) - set(NAMES)


def test_every_empty_cell_has_a_reason() -> None:
    rows = table(CPU)
    assert {(row.op, row.backend) for row in rows} == {(op, name) for op in NAMES for name in BACKENDS}
    assert all(bool(row.reason) != row.available for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_contract_sees_an_output_that_is_not_written(dtype: torch.dtype) -> None:
    """Memory that torch gives out unwritten is NaN there, on a CPU too: a row left out is not what lay there before."""

    def last_row_left_out(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        whole = reference_ops().linear_residual(x, weight, residual)
        out = torch.empty_like(whole)
        out[:-1] = whole[:-1]
        return out

    case = dict(rows=5, inputs=33, outputs=47)
    with pytest.raises(AssertionError, match="linear_residual.y left memory unwritten"):
        check(
            reference_ops(),
            SimpleNamespace(linear_residual=last_row_left_out),
            "linear_residual",
            case,
            dtype,
        )
    check(reference_ops(), reference_ops(), "linear_residual", case, dtype)
    assert not torch.are_deterministic_algorithms_enabled()
