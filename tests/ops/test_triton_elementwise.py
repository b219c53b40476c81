"""layer_norm and suffix_embed as Triton kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import check, in_dtypes, inputs_in
from support.guarded import DEVICE, guarded

from smolvla_fast.kernels import layer_norm as norm_module
from smolvla_fast.kernels import suffix_embed as suffix_module
from smolvla_fast.kernels.tiles import PlainTile, using
from smolvla_fast.ops.reference.layer_norm import layer_norm as norm_reference
from smolvla_fast.ops.select import reference_ops
from smolvla_fast.ops.stream_offset import StreamOffset
from smolvla_fast.ops.torch.suffix import Folded, suffix_fold

pytestmark = pytest.mark.triton

layer_norm, suffix_embed = guarded(norm_module.layer_norm), guarded(suffix_module.suffix_embed)
OPS = SimpleNamespace(layer_norm=layer_norm, suffix_fold=suffix_fold, suffix_embed=suffix_embed)
# The interpreter truncates to bf16 where a GPU rounds, so bf16 is a device's to judge.
NARROW = [torch.float16, pytest.param(torch.bfloat16, marks=triton_by.BF16)]


# layer_norm

NORMS = tuple(
    dict(rows=rows, width=width) for rows, width in ((64, 768), (5, 48), (3, 31), (2, 1), (3, 1000))
)


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(NORMS, everywhere=NORMS[2:4]))
def test_layer_norm(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "layer_norm", case, dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_layer_norm_from_fp32_to_the_dtype_of_the_product(dtype: torch.dtype) -> None:
    values, wide = inputs_in("layer_norm", dict(rows=6, width=48), torch.float32, seed=0)
    values["weight"], values["bias"] = values["weight"].to(dtype), values["bias"].to(dtype)
    got = layer_norm(**values, dtype=dtype)
    wide.update(weight=values["weight"].double(), bias=values["bias"].double())
    truth = norm_reference(**wide)
    assert got.dtype is dtype
    # One rounding: half a unit of the value, and room for fp32's own error where that decides a tie.
    assert (
        (got.double() - truth).abs() <= 0.501 * torch.finfo(dtype).eps * truth.abs().clamp(min=2**-4)
    ).all()


def test_layer_norm_far_from_zero() -> None:
    """The variance is taken of centred values: mean(x²) - mean(x)² would have lost every digit here."""
    values, wide = inputs_in("layer_norm", dict(rows=4, width=100), torch.float32, seed=1)
    values["x"] += 4096.0
    truth = norm_reference(**{**wide, "x": values["x"].double()})
    # x is given to 4096·2⁻²⁴ = 2⁻¹², and the mean is found to a few of these; its spread is 4, the weights about 1.
    torch.testing.assert_close(layer_norm(**values).double(), truth, atol=4 * 2**-12 / 4, rtol=0)


@pytest.mark.parametrize(("rows", "number"), [(5, 4), (3, 8), (1, 2), (9, 1)])
def test_layer_norm_of_several_rows_a_program(rows: int, number: int) -> None:
    """The last program has rows too few, of which none may be read or written."""
    with using(PlainTile(number, 64, 4)):
        check(reference_ops(), OPS, "layer_norm", dict(rows=rows, width=48), torch.float32)


@pytest.mark.parametrize("number", [1, 4])
def test_layer_norm_adds_what_stands_beside_the_stream(number: int) -> None:
    """One vector, then a bias of the product ahead beside it; their sum is kept in fp32 for the norms behind."""
    dtype = torch.float16
    values, _ = inputs_in("layer_norm", dict(rows=6, width=48), torch.float32, seed=2)
    first, second = torch.linspace(-30, 30, 48).to(dtype), torch.linspace(2, -2, 48).to(dtype)
    offset = StreamOffset()
    offset.leave(first)
    for stream in (values["x"] + first.float(), values["x"] + first.float() + second.float()):
        with using(PlainTile(number, 64, 4)):
            got = layer_norm(**values, offset=offset)
        truth = norm_reference(stream.double(), *(values[name].double() for name in ("weight", "bias")), 1e-6)
        # fp32 numbers of some tens by weights around 1, centred and scaled by about a thirtieth.
        torch.testing.assert_close(got.double(), truth, atol=2**-19, rtol=2**-19)
        assert offset.bias is None
        offset.leave(second)
    assert offset.vector is not None and offset.vector.dtype is torch.float32
    assert torch.equal(offset.vector, first.float() + second.float())


def test_layer_norm_refuses_what_it_cannot_do() -> None:
    x, w = torch.zeros(3, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    refused = norm_module.layer_norm
    with pytest.raises(ValueError, match=r"x, of shape \[3, 4\], must be contiguous; call .contiguous"):
        refused(x[:, :4], w[:4], w[:4], 1e-6)
    with pytest.raises(ValueError, match=r"bias has shape \[7\]; accepted is \[8\]"):
        refused(x, w, w[:7], 1e-6)
    with pytest.raises(
        ValueError, match="the result is torch.float64; accepted are float32, bfloat16, float16"
    ):
        refused(x, w, w, 1e-6, torch.float64)
    with pytest.raises(ValueError, match=r"a vector of the offset has shape \[7\]; accepted is \[8\]"):
        refused(x, w, w, 1e-6, offset=StreamOffset(w[:7]))
    with pytest.raises(ValueError, match="accepted are at most 16384"):
        refused(torch.zeros(1, 20_000, device=DEVICE), *torch.zeros(2, 20_000, device=DEVICE), 1e-6)
    assert refused(x[:0], w, w, 1e-6).shape == (0, 8)


# suffix_embed

SUFFIXES = (
    dict(B=1, S=50, A=32, E=96, N=10),
    dict(B=2, S=7, A=5, E=48, N=3),
    dict(B=3, S=9, A=33, E=70, N=3),
    dict(B=1, S=1, A=1, E=1, N=3),
)


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(SUFFIXES, everywhere=SUFFIXES[2:]))
def test_suffix_embed(case: dict[str, int], dtype: torch.dtype) -> None:
    """Three steps of each case; every item of a batch and every step has a time of its own."""
    check(reference_ops(), OPS, "suffix_embed", case, dtype)


@pytest.mark.long
def test_suffix_embed_at_full_width() -> None:
    """The 720 columns of SmolVLA's expert, of a few tokens: their tiles do not differ."""
    check(reference_ops(), OPS, "suffix_embed", dict(B=1, S=5, A=32, E=720, N=3), torch.float32)


def test_actions_in_any_layout() -> None:
    """A caller's noise may be a view."""
    x = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE).transpose(1, 2)
    w = torch.linspace(-1, 1, 48 * 48, device=DEVICE).view(48, 48)
    folded = Folded(w[:, :5].contiguous(), w[:6].view(3, 2, 1, 48))
    want = suffix_embed(x.contiguous(), 1, folded, (w, w[0]))
    assert not x.is_contiguous() and torch.equal(suffix_embed(x, 1, folded, (w, w[0])), want)


def test_suffix_embed_refuses_what_it_cannot_do() -> None:
    x, w = torch.zeros(2, 7, 5, device=DEVICE), torch.zeros(48, 48, device=DEVICE)
    folded = Folded(w[:, :5].contiguous(), torch.zeros(3, 2, 1, 48, device=DEVICE))
    refused = suffix_module.suffix_embed
    with pytest.raises(ValueError, match="step is 3; accepted are 0 to 2, the steps that were folded"):
        refused(x, 3, folded, (w, w[0]))
    with pytest.raises(ValueError, match=r"folded.weight has shape \[48, 5\]; accepted is \[48, 4\]"):
        refused(x[..., :4].contiguous(), 0, folded, (w, w[0]))
    with pytest.raises(
        ValueError, match=r"folded.bias has shape \[3, 2, 1, 48\]; accepted is \[3, 1, 1, 48\]"
    ):
        refused(x[:1], 0, folded, (w, w[0]))
    with pytest.raises(ValueError, match="time_out.weight must be contiguous"):
        refused(x, 0, folded, (torch.zeros(48, 96, device=DEVICE)[:, :48], w[0]))
    with pytest.raises(ValueError, match=r"x has shape \[7, 5\]; accepted is \[B, S, A\]"):
        refused(x[0], 0, folded, (w, w[0]))
