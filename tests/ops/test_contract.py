"""Every op of the backends ``torch`` and ``cpu`` under the contract, and what is true of single ops only."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from support.contract import HELPERS, OPS, check, inputs_in, reference_module, run
from support.processors import LEVELS_EMULATED

from smolvla_fast.ops import extension
from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.select import reference_ops, select
from smolvla_fast.ops.table import NAMES
from smolvla_fast.ops.torch import linear as aten_linear

pytestmark = pytest.mark.processor

CPU = torch.device("cpu")
# The references' largest cases take seconds in fp64 or bf16 on one core; their shapes are covered by the whole-chunk tests.
CASES = [
    (op, case) for op in OPS for case in reference_module(op).CASES if reference_module(op).cost(case, 4).flops < 1e9
]  # fmt: skip


@pytest.fixture(params=["torch", pytest.param("cpu", marks=pytest.mark.cpu_kernels)])
def backend(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param, CPU)
    if reason:
        pytest.skip(reason)
    return request.param


def test_every_op_has_a_reference() -> None:
    assert set(NAMES) >= HELPERS
    for op in OPS:
        module = reference_module(op)
        assert callable(getattr(module, op)) and module.CASES and module.cost(module.CASES[0], 2).flops > 0
        doc = getattr(module, op).__doc__
        assert "returns" in doc and "replaces" in doc and "[" in doc, (
            f"{op}: shapes and what it replaces, please"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "case"), CASES, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_contract(op: str, case: dict[str, int], dtype: torch.dtype, backend: str) -> None:
    check(reference_ops(), select(backend, CPU, stock_order=False), op, case, dtype)


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not extension.available("cpu"), reason="the kernels are not compiled")
@pytest.mark.parametrize("level", LEVELS_EMULATED, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_contract_at_every_level(op: str, dtype: torch.dtype, level: str) -> None:
    """The smallest case of each op, through the whole table; tests of single kernels have the sizes."""
    smallest = min(reference_module(op).CASES, key=lambda case: reference_module(op).cost(case, 4).flops)
    check(reference_ops(), select("cpu", CPU, stock_order=False), op, smallest, dtype)


@pytest.mark.parametrize(
    "op", ["linear", "linear_residual", "norm_swiglu", "norm_qkv_rope", "masked_attention"]
)
def test_contract_with_outliers(op: str, backend: str) -> None:
    """A few input channels fifty times larger, as in trained transformers."""
    reference, ops = reference_ops(), select(backend, CPU, stock_order=False)
    case = reference_module(op).CASES[-1]
    narrow, wide = inputs_in(op, case, torch.bfloat16, seed=4)
    for inputs in (narrow, wide):
        name = "q" if op == "masked_attention" else "x"
        inputs[name] = inputs[name].clone()
        inputs[name][..., ::7] *= 50
    truth, eager, ours = run(reference, op, wide), run(reference, op, narrow), run(ops, op, narrow)
    for name, want in truth.items():
        error, eager_error = ((x[name].double() - want).abs().max().item() for x in (ours, eager))
        assert error <= 2 * eager_error + torch.finfo(torch.bfloat16).eps * want.abs().max().item()


WITH_EPS = [
    (op, case)
    for op, case in CASES
    if {"eps", "norm"} & signature(getattr(reference_module(op), op)).parameters.keys()
]


@pytest.mark.parametrize(("op", "case"), WITH_EPS, ids=str)
def test_contract_where_eps_counts(op: str, case: dict[str, int], backend: str) -> None:
    """On rows of 1e-4 the result without eps is at least twice as large; few rows and many take other paths."""
    reference, ops = reference_ops(), select(backend, CPU, stock_order=False)
    narrow, wide = inputs_in(op, case, torch.float32, seed=5)
    name = "h" if op == "euler_step" else "x"
    narrow[name] = narrow[name] * 1e-4
    wide[name] = narrow[name].double()
    truth, ours = run(reference, op, wide), run(ops, op, narrow)
    for key, want in truth.items():
        # fp32 rounding and sums of up to 3072 terms: 1e-4 is far above both, far below a factor of two.
        assert (ours[key].double() - want).abs().max() <= 1e-4 * want.abs().max(), key


def test_a_row_that_sees_nothing_averages_all_values() -> None:
    """By torch; by kernels in test_masked_attention.py, as the next."""
    ops = select("torch", CPU, stock_order=False)
    inputs, _ = inputs_in(
        "masked_attention", reference_module("masked_attention").CASES[3], torch.float32, seed=0
    )
    inputs["mask"][0, 2] = False
    out = run(ops, "masked_attention", inputs)["y"]
    heads = inputs["v"][0].repeat_interleave(3, dim=1).mean(0).flatten()
    torch.testing.assert_close(out[0, 2], heads)


def test_masked_keys_have_no_influence() -> None:
    ops = select("torch", CPU, stock_order=False)
    inputs, _ = inputs_in(
        "masked_attention", reference_module("masked_attention").CASES[3], torch.float32, seed=0
    )
    before = run(ops, "masked_attention", inputs)["y"]
    hidden = ~inputs["mask"].any(1)
    assert hidden.any()
    for name in ("k", "v"):
        inputs[name][hidden] = 1e6
    assert torch.equal(run(ops, "masked_attention", inputs)["y"], before)


def test_rope_depends_on_distance_only() -> None:
    from smolvla_fast.ops.reference.rope import apply_rope, rope_tables

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 9, 2, 16, generator=generator) for _ in range(2))
    place = torch.arange(9)[None]

    def scores(shift: int) -> torch.Tensor:
        tables = rope_tables(place + shift, 16)
        return torch.einsum("bthd,bshd->bhts", apply_rope(q, *tables), apply_rope(k, *tables))

    # fp32 angles of position 100 are good to 1e-5; a wrong half or sign changes the scores themselves.
    torch.testing.assert_close(scores(0), scores(100), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores(0), torch.einsum("bthd,bshd->bhts", q, k), atol=1e-2)


@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_without_onednn(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, activation: Any) -> None:
    """The fallback to ``F.linear`` serves the same op, and is taken where oneDNN does not answer."""
    inputs, _ = inputs_in("linear", reference_module("linear").CASES[-1], dtype, seed=0)
    inputs = {**inputs, "activation": activation}
    wanted = reference_module("linear").linear(**inputs)
    fused = aten_linear.linear(**inputs)
    monkeypatch.setattr(aten_linear, "onednn_serves", lambda dtype: False)
    calls: list[None] = []
    stock = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: (calls.append(None), stock(*a))[1])
    assert torch.equal(aten_linear.linear(**inputs), wanted) and calls
    # oneDNN rounds the sum once where eager rounds after the product and again after the activation.
    torch.testing.assert_close(
        fused, wanted, atol=torch.finfo(dtype).eps * 8, rtol=torch.finfo(dtype).eps * 4
    )


def test_unknown_activation_is_named() -> None:
    inputs, _ = inputs_in("linear", reference_module("linear").CASES[-1], torch.float32, seed=0)
    with pytest.raises(ValueError, match="'relu'.*accepted are None, 'gelu_tanh' and 'silu'"):
        aten_linear.linear(**{**inputs, "activation": "relu"})
