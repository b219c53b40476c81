"""The Triton kernels around matrix products: the contract of every op, then what the contract does not ask."""

from __future__ import annotations

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import changed, check, in_dtypes, inputs_in, leaves, reference_module, run, widened
from support.gemms import (
    ATEN,
    BF16,
    DTYPES,
    F16,
    F32,
    NAMES,
    OPS,
    TRITON,
    assert_no_worse,
    inputs_of,
    module,
)
from support.guarded import DEVICE

from smolvla_fast.ops.select import reference_ops

pytestmark = [
    pytest.mark.triton,
    # Of numpy, which computes the kernels under the interpreter.
    pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
# Beyond the references' cases. The first two, sizes of one and odd sizes, are run in every dtype; then one row, heads whose
# halves span two tiles, and SmolVLA's own widths with fewer columns: all of them take the interpreter seconds.
MORE = {
    "linear": (
        dict(rows=1, inputs=1, outputs=1),
        dict(rows=65, inputs=129, outputs=17),
        dict(rows=1, inputs=32, outputs=960),
        dict(rows=50, inputs=720, outputs=33),
    ),
    "linear_residual": (
        dict(rows=1, inputs=1, outputs=1),
        dict(rows=17, inputs=65, outputs=31),
        dict(rows=50, inputs=2048, outputs=48),
    ),
    "norm_swiglu": (
        dict(rows=1, inputs=1, outputs=1),
        dict(rows=17, inputs=65, outputs=31),
        dict(rows=50, inputs=720, outputs=48),
    ),
    "norm_qkv_rope": (
        dict(B=1, T=1, M=1, H=1, K=1, D=2),
        dict(B=2, T=3, M=33, H=4, K=2, D=6),
        dict(B=1, T=17, M=40, H=2, K=1, D=80),
        dict(B=1, T=50, M=720, H=1, K=1, D=64),
    ),
    "cross_kv": (
        dict(B=1, P=1, K=1, D=1),
        dict(B=3, P=5, K=3, D=6),
        dict(B=1, P=17, K=5, D=64),
    ),
    "pixel_shuffle_linear": (
        dict(N=1, side=1, width=1, factor=1, outputs=1),
        dict(N=2, side=6, width=5, factor=3, outputs=17),
        dict(N=1, side=8, width=192, factor=4, outputs=48),
    ),
    "patch_embed": (
        dict(N=1, side=1, patch=1, width=1),
        dict(N=2, side=15, patch=5, width=33),
        dict(N=1, side=64, patch=16, width=96),
    ),
}
# Of the references' own cases those that the interpreter runs in about a second; tests/gpu runs all of them.
CASES = {
    op: [
        case
        for case in reference_module(op).CASES + MORE[op]
        if reference_module(op).cost(case, 4).flops < 2e7
    ]
    for op in NAMES
}


def _slow(op, case, dtype):
    """SmolVLA's own widths are the last of each op: in fp32 one stands for all, its tiers are in compiled_kernels."""
    return dtype is F32 and case is MORE[op][-1] and op != "linear_residual"


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        pytest.param(
            op,
            *each.values,
            marks=[*each.marks, *[pytest.mark.long] * _slow(op, *each.values)],
            id=f"{op}-{each.id}",
        )
        for op in NAMES
        for each in in_dtypes(CASES[op], everywhere=MORE[op][:2])
    ],
)
def test_contract(op, case, dtype):
    check(reference_ops(), TRITON, op, case, dtype, device=DEVICE)


@pytest.mark.long
def test_contract_at_the_size_of_the_expert():
    """All 720 columns of ``o_proj``; the other ops at full size take the interpreter more than three seconds."""
    check(
        reference_ops(), TRITON, "linear_residual", dict(rows=50, inputs=960, outputs=720), F16, device=DEVICE
    )


@DTYPES
@pytest.mark.parametrize(
    ("op", "normalise_first"),
    [
        ("linear", None),
        ("linear_residual", None),
        *((op, first) for op in ("norm_swiglu", "norm_qkv_rope") for first in (True, False)),
    ],
)
def test_contract_with_outliers(op, dtype, normalise_first, monkeypatch):
    """A few input channels fifty times larger, as in trained transformers; with either place of 1/rms in 16 bits."""
    if normalise_first is not None:
        monkeypatch.setattr(module(op), "normalise_first", lambda dtype: normalise_first)
    narrow, wide = inputs_in(op, reference_module(op).CASES[-1], dtype, seed=4)
    for inputs in (narrow, wide):
        inputs["x"] = inputs["x"].clone()
        inputs["x"][..., ::7] *= 50
    truth, eager = (run(reference_ops(), op, inputs) for inputs in (wide, narrow))
    assert_no_worse(run(TRITON, op, narrow), eager, truth, dtype)


@pytest.mark.parametrize("scale", [1e4, 1e-6], ids=["beyond 65504", "subnormal"])
@pytest.mark.parametrize("op", ["norm_swiglu", "norm_qkv_rope"])
def test_fp16_weights_take_the_range_of_an_fp32_residual_stream(op, scale):
    inputs = inputs_of(op, F16)
    inputs["x"] = inputs["x"].float() * scale
    inputs = changed(inputs, {"norm.eps": 1e-16})  # so that it does not decide the small rows
    wide = widened(inputs)
    assert (inputs["x"] * inputs["norm"][0]).abs().max() > 65504 or scale < 1
    assert_no_worse(run(TRITON, op, inputs), run(ATEN, op, inputs), run(reference_ops(), op, wide), F16)


def mixed(op):
    """An fp32 residual stream or image with 16-bit weights, and 16-bit keys with fp32 weights."""
    dtype = F16 if triton_by.INTERPRETED else BF16
    inputs = inputs_of(op, dtype)
    wider = {"cross_kv": ("k_weight", "v_weight"), "patch_embed": ("pixels", "position")}.get(op, ("x",))
    if op == "linear_residual":
        wider = ("residual",)
    if op == "norm_qkv_rope":
        wider = ("x", "slots.k", "slots.v")
    return changed(inputs, {name: leaves(inputs)[name].float() for name in wider}), dtype


@OPS
def test_mixed_dtypes_as_the_torch_backend_has_them(op):
    inputs, dtype = mixed(op)
    ours, eager = run(TRITON, op, inputs), run(ATEN, op, inputs)
    wide = widened(inputs)
    assert_no_worse(ours, eager, run(reference_ops(), op, wide), dtype)
    assert {n: v.dtype for n, v in ours.items()} == {n: v.dtype for n, v in eager.items()}


def epilogues():
    """Every pair of an activation, a dtype and a residual, and each of them with a bias and without.

    The rest of the product is for `make test-full`.
    """
    for a, activation in enumerate((None, "gelu_tanh", "silu")):
        for d, dtype in enumerate((F32, F16, BF16)):
            for r, residual in enumerate(("no residual", "residual", "fp32 residual")):
                for bias in (True, False):
                    one_of_each = r == (a + d) % 3 and bias == (a != d)
                    marks = [
                        *(triton_by.BF16 if dtype is BF16 else []),
                        *[pytest.mark.long] * (not one_of_each),
                    ]
                    identity = f"{activation}-{dtype}-{residual}-{'bias' if bias else 'no bias'}"
                    yield pytest.param(activation, dtype, residual, bias, marks=marks, id=identity)


@pytest.mark.parametrize(("activation", "dtype", "residual", "bias"), list(epilogues()))
def test_linear_with_all_epilogues(activation, dtype, residual, bias):
    inputs = inputs_of("linear", dtype, activation=activation)
    inputs["x"] = inputs["x"] * 3  # far enough for both ends of an activation
    if not bias:
        inputs["bias"] = None
    of_result = F32 if residual == "fp32 residual" else dtype
    if residual != "no residual":
        inputs["residual"] = torch.randn(5, 47, generator=torch.Generator().manual_seed(9)).to(of_result)
    wide = widened(inputs)
    ours, eager = run(TRITON, "linear", inputs), run(ATEN, "linear", inputs)
    assert ours["y"].dtype is of_result
    assert_no_worse(ours, eager, run(reference_ops(), "linear", wide), dtype)


def test_activations_end_where_their_arguments_do():
    x = torch.tensor([[-1e30], [-200.0], [200.0], [1e30]])
    one = torch.ones(1, 1)
    for activation in ("silu", "gelu_tanh"):
        y = TRITON.linear(x, one, None, activation)
        assert torch.equal(y, torch.tensor([[0.0], [0.0], [200.0], [1e30]])), activation
