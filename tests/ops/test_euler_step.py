"""euler_step as a Triton kernel and in CUDA C++ on the host emulator; on a CPU it is made of other ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import triton_by
from support.backends import CUDA, SEEDS, TRITON, device_of, with_dtypes
from support.contract import changed, check, in_dtypes, inputs_in, leaves, sizes, to_device, widened
from support.guarded import guarded
from torch import Tensor

from smolvla_fast.ops.reference.euler_step import Guidance
from smolvla_fast.ops.reference.euler_step import euler_step as reference
from smolvla_fast.ops.reference.guidance import guide
from smolvla_fast.ops.select import reference_ops

MODULES = {"triton": "smolvla_fast.kernels.euler_step", "cuda": "smolvla_fast.ops.cuda.euler_step"}
BOTH = pytest.mark.parametrize("backend", [TRITON, CUDA], indirect=True)
ON_CUDA = pytest.mark.parametrize("backend", [CUDA], indirect=True)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of numpy under the interpreter.
NUMPY = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def case(*values: int) -> dict[str, int]:
    return dict(zip("BSEA", values, strict=True))


SMALL = case(2, 7, 48, 5)
# CUDA: a row per warp and action, 8 actions a block, 128 columns a turn; E of no multiple of 4 is read one by one.
SIZES = {
    "triton": (case(1, 3, 720, 32), SMALL, case(3, 2, 300, 33), case(1, 1, 1, 1)),
    "cuda": (
        SMALL, case(1, 4, 720, 32), case(1, 3, 131, 9), case(1, 2, 1, 1), case(3, 1, 260, 8), case(1, 2, 960, 17)
    ),
}  # fmt: skip


def launcher(backend: str) -> Callable[..., Any]:
    return importlib.import_module(MODULES[backend]).euler_step


@pytest.fixture
def euler_step(backend: str) -> Callable[..., Any]:
    """With its results between guards of NaN, and NaN where nothing is written."""
    return guarded(launcher(backend), device_of(backend))


def inputs(given: dict[str, int] = SMALL, **changes: Any) -> dict[str, Any]:
    return {**inputs_in("euler_step", given, torch.float32, seed=0)[0], **changes}


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def near(got: tuple[Tensor, Tensor], given: dict[str, Any], **tolerance: float) -> None:
    """To the reference in fp64."""
    for mine, want in zip(got, reference(**widened(given)), strict=True):
        torch.testing.assert_close(mine.double(), want, **tolerance)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize(
    ("backend", "dtype", "given"),
    [
        pytest.param(*each.values, given, marks=each.marks, id=f"{each.id}-{sizes(given)}")
        for each in with_dtypes(([CUDA], DTYPES)) for given in SIZES["cuda"]
    ] + [
        pytest.param(*TRITON.values, *each.values[::-1], marks=[*TRITON.marks, *each.marks], id=f"triton-{each.id}")
        for each in in_dtypes(SIZES["triton"], everywhere=SIZES["triton"][2:])
    ],
    indirect=["backend"],
)  # fmt: skip
def test_contract(given: dict[str, int], dtype: torch.dtype, guided: bool, euler_step: Any) -> None:
    def table(function: Any) -> Any:
        plain = lambda **inputs: function(**{**inputs, "guidance": None})  # noqa: E731
        return SimpleNamespace(euler_step=function if guided else plain)

    check(table(reference_ops().euler_step), table(euler_step), "euler_step", given, dtype)


@ON_CUDA
@pytest.mark.parametrize("given", SIZES["cuda"][:4], ids=sizes)
def test_bits_do_not_depend_on_the_order_of_threads(
    given: dict[str, int], euler_step: Any, emulator: Any
) -> None:
    results = []
    for seed in SEEDS:
        emulator.configure(seed=seed)
        results.append(euler_step(**inputs(given)))
    assert all(same(other, results[0]) for other in results)


@ON_CUDA
@pytest.mark.parametrize("h, norm, weight", list(product(DTYPES, repeat=3)), ids=str)
def test_every_mix_of_dtypes(h: torch.dtype, norm: torch.dtype, weight: torch.dtype, euler_step: Any) -> None:
    """Against fp64 of the same numbers: with 48 terms and values of a few units, 1e-5 is a hundred roundings of fp32,
    and a hundredth of what reading one weight in another dtype would change."""
    given = inputs()
    kinds = {"h": h, "norm.weight": norm, "action_out.weight": weight, "action_out.bias": norm}
    given = changed(given, {name: leaves(given)[name].to(dtype) for name, dtype in kinds.items()})
    near(euler_step(**given), given, atol=1e-5, rtol=1e-5)


@ON_CUDA
@pytest.mark.parametrize("name", ["h", "norm.weight", "action_out.weight"])
def test_bits_do_not_depend_on_alignment(name: str, euler_step: Any) -> None:
    given = inputs(case(1, 2, 260, 3))
    value = leaves(given)[name]
    shifted = torch.full((value.numel() + 2,), torch.nan)[1:-1].view(value.shape)
    shifted.copy_(value)
    assert shifted.data_ptr() % 16 == 4
    assert same(euler_step(**changed(given, {name: shifted})), euler_step(**given))


@BOTH
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_eps_decides_for_small_rows(eps: float, euler_step: Any) -> None:
    given = changed(inputs(guidance=None), {"norm.eps": eps})
    given["h"] = given["h"] * 1e-3
    # fp32 sums of 48 products around 1: sqrt(48) roundings at the worst likely.
    near(euler_step(**given), given, atol=24 * torch.finfo(torch.float32).eps, rtol=0)


@BOTH
def test_guidance_and_euler_are_stocks_expression(backend: str, euler_step: Any) -> None:
    given = inputs()
    x, before = given["x"], given["x"].clone()
    plain_x, plain_v = euler_step(**{**given, "guidance": None})
    new_x, v = euler_step(**given)
    want_v = guide(plain_v, x, *given["guidance"])
    for got, want in (
        (v, want_v), (plain_x, x + given["dt"] * plain_v), (new_x, x + given["dt"] * want_v)
    ):  # fmt: skip
        if backend == "triton" and triton_by.INTERPRETED:
            assert torch.equal(got, want), "the same operations in the same order have the same bits"
        else:  # a fused multiply-add skips a rounding of values up to a few tens
            torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-6)
    assert torch.equal(v[:, -1], plain_v[:, -1]), "the last token's weight is 0"
    assert torch.equal(x, before) and not torch.equal(v, plain_v)


@pytest.mark.parametrize("backend", [TRITON], indirect=True)
def test_guidance_is_data(backend: str) -> None:
    """Its weight may lie on the host or on the device, and is read in every launch."""
    launch, given = launcher(backend), to_device(inputs(), device_of(backend))
    host = launch(**{**given, "guidance": given["guidance"]._replace(weight=torch.tensor(2.5))})[1]
    strength = torch.tensor(2.5, device=device_of(backend))
    there = {**given, "guidance": given["guidance"]._replace(weight=strength)}
    assert torch.equal(launch(**there)[1], host)
    strength.zero_()
    unguided = launch(**{**given, "guidance": None})[1]
    assert torch.equal(launch(**there)[1], unguided) and not torch.equal(unguided, host)


@BOTH
def test_guidance_and_actions_of_any_strides(backend: str, euler_step: Any) -> None:
    """One previous chunk for a batch, columns of a wider one, weights that lie apart; x is left as it is."""
    given = inputs()
    guidance: Guidance = given["guidance"]
    previous = guidance.previous[:1]
    wide, weights = torch.full((1, 7, 9), torch.nan), torch.full((1, 14, 1), torch.nan)
    wide[..., ::2], weights[:, ::2] = previous, guidance.weights
    want = euler_step(**{**given, "guidance": guidance._replace(previous=previous.repeat(2, 1, 1))})
    others = [
        guidance._replace(previous=previous),
        guidance._replace(previous=previous.expand(2, -1, -1)),
        guidance._replace(previous=previous.transpose(1, 2).contiguous().transpose(1, 2)),
    ]
    if backend == "cuda":
        others.append(guidance._replace(previous=wide[..., ::2], weights=weights[:, ::2]))
    assert all(same(euler_step(**{**given, "guidance": other}), want) for other in others)
    x = torch.full((2, 7, 10), torch.nan)[..., ::2]
    x.copy_(given["x"])
    assert same(euler_step(**{**given, "x": x}), euler_step(**given)) and torch.equal(x, given["x"])


@NUMPY
@BOTH
def test_nan_stays_in_its_token(euler_step: Any) -> None:
    given = inputs()
    want = euler_step(**given)
    given["h"][1, 4, 47] = torch.nan
    got = euler_step(**given)
    for mine, clean in zip(got, want, strict=True):
        assert mine[1, 4].isnan().all()
        mine[1, 4] = clean[1, 4]
    assert same(got, want)


@BOTH
def test_what_it_cannot_do_is_named(backend: str) -> None:
    def refused(match: str, **changes: Any) -> None:
        values = inputs(**changes)
        with pytest.raises(ValueError, match=match):
            launcher(backend)(**(values if backend == "cuda" else to_device(values, device_of(backend))))

    given = inputs()
    h, x, guidance = given["h"], given["x"], given["guidance"]
    (norm, eps), (weight, bias) = given["norm"], given["action_out"]
    refused(r"h and x have shapes \[7, 48\].*; accepted are \[B, S, E\]", h=h[0])
    refused(r"action_out.weight has shape \[5, 47\]; accepted is \[5, 48\]",
            action_out=(weight[:, 1:].contiguous(), bias))  # fmt: skip
    refused("x is .*float16; accepted.* (torch.)?float32", x=x.half())
    refused(r"call .contiguous\(\)", h=h.transpose(1, 2).contiguous().transpose(1, 2))
    refused(r"guidance.previous .*\[2, 6, 5\]", guidance=guidance._replace(previous=x[:, 1:].contiguous()))
    refused(r"guidance.weight ", guidance=guidance._replace(weight=torch.ones(1).double()))
    if backend == "cuda":
        refused("h is float64; accepted: float32, bfloat16, float16", h=h.double())
        refused(r"norm.weight has shape \[47\]; accepted is \[48\]", norm=(norm[1:], eps))
        refused(r"action_out.bias has shape \[4\]; accepted is \[5\]", action_out=(weight, bias[1:]))
        refused(r"x has shape \[2, 6, 5\]", x=x[:, 1:])
        refused("action_out.bias is on meta", action_out=(weight, bias.to("meta")))
        refused("width 0", h=h[..., :0], norm=(norm[:0], eps), action_out=(torch.zeros(5, 0), bias))
        refused("guidance.previous is float64", guidance=guidance._replace(previous=x.double()))
        refused(r"guidance.weights has shape \[7\]", guidance=guidance._replace(weights=torch.ones(7)))
        new_x, v = launcher(backend)(**inputs(case(0, 7, 48, 5), guidance=None))
        assert new_x.shape == v.shape == (0, 7, 5)
