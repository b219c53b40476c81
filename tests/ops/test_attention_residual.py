"""Attention with its output projection in one launch: the contract, and the two ops that it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.contract import check, in_dtypes, inputs_in, reference_module, run, to_device
from support.guarded import DEVICE

pytest.importorskip("triton")
from smolvla_fast.kernels import attention_residual as kernel
from smolvla_fast.ops.choice import Choice, choose
from smolvla_fast.ops.reference.quantize import quantize_rows
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.tune.recorder import Recorder

pytestmark = pytest.mark.triton
OP = "attention_residual"
F32, F16 = torch.float32, torch.float16
SMALL = reference_module(OP).CASES[2]
CASES = [
    SMALL,
    reference_module(OP).CASES[3],  # one token, a query head for each KV head
    dict(B=2, T=17, S=75, H=6, K=2, D=24, O=100),  # nothing fills a tile
    dict(B=1, T=16, S=64, H=4, K=1, D=16, O=128),  # everything does
    dict(B=1, T=3, S=1, H=2, K=1, D=64, O=1),
]


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(CASES, everywhere=CASES[2::2]))
def test_contract(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), backend_ops("triton"), OP, case, dtype, device=DEVICE)


def given(dtype: torch.dtype = F16, **changes: Any) -> dict[str, Any]:
    return {**to_device(inputs_in(OP, CASES[2], dtype, 0)[0], DEVICE), **changes}


def fused(inputs: dict[str, Any]) -> torch.Tensor:
    return run(backend_ops("triton"), OP, inputs)["y"]


def test_a_wider_residual_is_added_to_the_unrounded_sum() -> None:
    inputs = given()
    wide = fused({**inputs, "residual": inputs["residual"].float()})
    assert wide.dtype is F32 and torch.equal(wide.half(), fused(inputs))


def test_views_of_a_cache_and_masks_of_any_strides() -> None:
    inputs = given()
    want = fused(inputs)
    b, s, kv, d = inputs["k"].shape
    cache = torch.full((b, s + 9, kv, 2, d), torch.nan, dtype=F16, device=DEVICE)
    cache[:, 4 : 4 + s] = torch.stack([inputs["k"], inputs["v"]], dim=3)
    mask = torch.zeros(s, b, inputs["mask"].shape[1], dtype=torch.bool, device=DEVICE)
    mask.copy_(inputs["mask"].permute(2, 0, 1))
    views = {"k": cache[:, 4 : 4 + s, :, 0], "v": cache[:, 4 : 4 + s, :, 1], "mask": mask.permute(1, 2, 0)}
    assert torch.equal(fused({**inputs, **views}), want)


def test_a_row_that_sees_nothing_weighs_all_keys_alike() -> None:
    inputs = given()
    inputs["mask"][0, 2] = False
    everything = {**inputs, "q": torch.zeros_like(inputs["q"]), "mask": torch.ones_like(inputs["mask"])}
    assert torch.equal(fused(inputs)[0, 2], fused(everything)[0, 2])


def test_the_two_ops_give_what_it_gives() -> None:
    """Rounded at the same places; the sums of the product are in another order, so a unit of the largest may differ."""
    inputs, ops = given(), backend_ops("triton")
    attended = ops.masked_attention(*(inputs[name] for name in ("q", "k", "v", "mask")))
    apart = ops.linear_residual(attended, inputs["weight"], inputs["residual"])
    unit = torch.finfo(F16).eps * apart.abs().max().item()
    torch.testing.assert_close(fused(inputs), apart, rtol=0, atol=unit)


@pytest.mark.parametrize("rows", [50, 64, 65])
@pytest.mark.parametrize("kv", [F32, F16])
def test_who_serves_by_default(rows: int, kv: torch.dtype) -> None:
    """Few rows in 16 bits. Else the two ops do, as others were chosen for them."""
    ops = choose(backend_ops("triton"), torch.device(DEVICE), "triton", None)
    inputs = to_device(inputs_in(OP, dict(B=1, T=rows, S=20, H=3, K=1, D=16, O=32), F16, 0)[0], DEVICE)
    inputs = {**inputs, "k": inputs["k"].to(kv), "v": inputs["v"].to(kv)}
    choice = ops.attention_residual
    assert isinstance(choice, Choice)
    run(ops, OP, inputs)
    few = rows <= 64 and kv is F16
    assert set(choice.served.values()) == {"triton" if few else "apart"}
    assert bool(ops.masked_attention.served) == bool(ops.linear_residual.served) == (not few)


def test_the_two_ops_are_measured_where_they_serve() -> None:
    """A tuning notes what a chunk asks for, inside of them too."""
    ops, recorder = (
        choose(backend_ops("triton"), torch.device(DEVICE), "triton", None),
        Recorder(torch.device(DEVICE)),
    )
    run(recorder.table(ops), OP, {**given(), "k": given()["k"].float(), "v": given()["v"].float()})
    noted = {key.partition(" ")[0] for key in recorder.found}
    assert noted == {"attention_residual", "masked_attention", "linear_residual"}


def test_quantised_weights_are_served_apart() -> None:
    ops = choose(backend_ops("triton"), torch.device(DEVICE), "triton", None)
    weight = quantize_rows(given()["weight"])
    assert ops.attention_residual.default(ops.attention_residual._shape_of(**given(weight=weight))) == "apart"
    with pytest.raises(ValueError, match="quantised; accepted is a plain one"):
        fused(given(weight=weight))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda i: {"weight": i["weight"][:, :-1]}, "weight has shape .* accepted is"),
        (lambda i: {"residual": i["residual"][:, 1:]}, "residual has shape"),
        (lambda i: {"k": i["k"][:, :0], "v": i["v"][:, :0]}, "at least one key"),
        (lambda i: {"mask": i["mask"].int()}, "mask is torch.int32"),
        (lambda i: {"q": i["q"].double()}, "q is torch.float64"),
    ],
)
def test_bad_input_is_named(changes: Any, words: str) -> None:
    inputs = given()
    with pytest.raises(ValueError, match=f"attention_residual: .*{words}"):
        kernel.attention_residual(**{**inputs, **changes(inputs)})


def test_too_many_kv_heads_are_refused() -> None:
    inputs = to_device(inputs_in(OP, dict(B=1, T=3, S=5, H=17, K=17, D=8, O=16), F16, 0)[0], DEVICE)
    with pytest.raises(ValueError, match="17 KV heads.*masked_attention and linear_residual serve them"):
        kernel.attention_residual(**inputs)
