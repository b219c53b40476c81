"""euler_step in CUDA C++ on the host emulator."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.contract import changed, check, inputs_in, leaves, widened
from support.guarded import guarded

from smolvla_fast.ops.cuda import euler_step as module
from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.reference.euler_step import CASES, Guidance
from smolvla_fast.ops.reference.euler_step import euler_step as reference
from smolvla_fast.ops.select import reference_ops

euler_step = guarded(module.euler_step)
SMALL = dict(B=2, S=7, E=48, A=5)
# A row per warp and action: 8 actions a block, 128 columns a turn. E of no multiple of 4 is read one by one.
SIZES = [
    SMALL,
    dict(B=1, S=4, E=720, A=32),
    dict(B=1, S=3, E=131, A=9),
    dict(B=1, S=2, E=1, A=1),
    dict(B=3, S=1, E=260, A=8),
    dict(B=1, S=2, E=960, A=17),
]


def inputs(
    case: dict[str, int] = SMALL, dtype: torch.dtype = torch.float32, **changed: Any
) -> dict[str, Any]:
    return {**inputs_in("euler_step", case, dtype, seed=0)[0], **changed}


def unguided(call: Any) -> Any:
    return lambda **given: call(**{**given, "guidance": None})


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_contract(case: dict[str, int], dtype: torch.dtype, guided: bool, emulator) -> None:
    ops, references = SimpleNamespace(euler_step=euler_step), reference_ops()
    if not guided:
        ops = SimpleNamespace(euler_step=unguided(euler_step))
        references = SimpleNamespace(euler_step=unguided(references.euler_step))
    check(references, ops, "euler_step", case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_sizes(case: dict[str, int], emulator) -> None:
    check(reference_ops(), SimpleNamespace(euler_step=euler_step), "euler_step", case, torch.bfloat16)


@pytest.mark.parametrize("case", SIZES[:4], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(case: dict[str, int], over_seeds) -> None:
    first, *others = over_seeds(lambda: euler_step(**inputs(case)))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("h, norm, weight", list(product(library.DTYPES, repeat=3)), ids=str)
def test_every_mix_of_dtypes(h: torch.dtype, norm: torch.dtype, weight: torch.dtype, emulator) -> None:
    """Against fp64 of the same numbers: with 48 terms and values of a few units, 1e-5 is a hundred roundings of fp32,
    and a hundredth of what reading one weight in another dtype would change."""
    given = inputs()
    kinds = {"h": h, "norm.weight": norm, "action_out.weight": weight, "action_out.bias": norm}
    given = changed(given, {name: leaves(given)[name].to(dtype) for name, dtype in kinds.items()})
    wide = widened(given)
    for got, want in zip(euler_step(**given), reference(**wide), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["h", "norm.weight", "action_out.weight"])
def test_bits_do_not_depend_on_alignment(name: str, emulator) -> None:
    given = inputs(dict(B=1, S=2, E=260, A=3))
    value = leaves(given)[name]
    whole = torch.full((value.numel() + 2,), torch.nan)
    shifted = whole[1:-1].view(value.shape)
    shifted.copy_(value)
    assert shifted.data_ptr() % 16 == 4
    for got, want in zip(euler_step(**changed(given, {name: shifted})), euler_step(**given), strict=True):
        assert torch.equal(got, want)


def test_eps_counts(emulator) -> None:
    """On rows of 1e-4 the result without eps is at least twice as large; 1e-4 is far above fp32 rounding."""
    given = inputs()
    given["h"] = given["h"] * 1e-4
    wide = widened(given)
    for got, want in zip(euler_step(**given), reference(**wide), strict=True):
        assert (got.double() - want).abs().max() <= 1e-4 * want.abs().max()


def test_guidance_and_euler_are_stocks_expression(emulator) -> None:
    """Rounding may differ by fused multiplications alone: a few units in the last place of values up to a few tens."""
    given = inputs()
    x, guidance = given["x"], given["guidance"]
    plain_x, plain_v = euler_step(**{**given, "guidance": None})
    new_x, v = euler_step(**given)
    error = (guidance.previous - (x - guidance.time * plain_v)) * guidance.weights
    want = plain_v - guidance.weight * error
    torch.testing.assert_close(v, want, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(plain_x, x + given["dt"] * plain_v, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(new_x, x + given["dt"] * v, atol=1e-6, rtol=1e-6)
    assert torch.equal(v[:, -1], plain_v[:, -1]), "the last token's weight is 0"
    assert not torch.equal(v, plain_v)


def test_guidance_of_any_strides(emulator) -> None:
    """One previous chunk for a batch, columns of a wider one, and weights that lie apart."""
    given = inputs()
    guidance: Guidance = given["guidance"]
    previous = guidance.previous[:1]
    wide = torch.full((1, 7, 9), torch.nan)
    wide[..., ::2] = previous
    weights = torch.full((1, 14, 1), torch.nan)
    weights[:, ::2] = guidance.weights
    want = euler_step(**{**given, "guidance": guidance._replace(previous=previous.repeat(2, 1, 1))})
    for other in (
        guidance._replace(previous=previous),
        guidance._replace(previous=wide[..., ::2], weights=weights[:, ::2]),
        guidance._replace(previous=previous.expand(2, -1, -1)),
        guidance._replace(previous=previous.transpose(1, 2).contiguous().transpose(1, 2)),
    ):
        for got, wanted in zip(euler_step(**{**given, "guidance": other}), want, strict=True):
            assert torch.equal(got, wanted)


def test_x_is_left_as_it_is_and_may_be_a_view(emulator) -> None:
    given = inputs()
    x = torch.full((2, 7, 10), torch.nan)[..., ::2]
    x.copy_(given["x"])
    want = euler_step(**given)
    for got, wanted in zip(euler_step(**{**given, "x": x}), want, strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(x, given["x"])


def test_what_it_cannot_do_is_named(emulator) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            module.euler_step(**inputs(**changes))

    given = inputs()
    h, x, guidance = given["h"], given["x"], given["guidance"]
    refused(r"h and x have shapes \[7, 48\] and \[2, 7, 5\]; accepted are \[B, S, E\]", h=h[0])
    refused("h is float64; accepted: float32, bfloat16, float16", h=h.double())
    refused(r"h has strides .*call .contiguous\(\)", h=h.transpose(1, 2).contiguous().transpose(1, 2))
    (norm, eps), (weight, bias) = given["norm"], given["action_out"]
    refused(r"norm.weight has shape \[47\]; accepted is \[48\]", norm=(norm[1:], eps))
    refused(r"action_out.weight has shape \[5, 47\]; accepted is \[5, 48\]", action_out=(weight[:, 1:], bias))
    refused(r"action_out.bias has shape \[4\]; accepted is \[5\]", action_out=(weight, bias[1:]))
    refused("x is bfloat16; accepted: float32", x=x.bfloat16())
    refused(r"x has shape \[2, 6, 5\]", x=x[:, 1:])
    refused("action_out.bias is on meta", action_out=(weight, bias.to("meta")))
    refused("width 0", h=h[..., :0], norm=(norm[:0], eps), action_out=(torch.zeros(5, 0), bias))
    refused(r"guidance.previous has shape \[2, 6, 5\]", guidance=guidance._replace(previous=x[:, 1:]))
    refused("guidance.previous is float64", guidance=guidance._replace(previous=x.double()))
    refused(r"guidance.weights has shape \[7\]", guidance=guidance._replace(weights=torch.ones(7)))
    refused(r"guidance.weight has shape \[1\]", guidance=guidance._replace(weight=torch.ones(1)))


def test_nothing_to_do(emulator) -> None:
    new_x, v = module.euler_step(**inputs(dict(B=0, S=7, E=48, A=5), guidance=None))
    assert new_x.shape == v.shape == (0, 7, 5)
