"""A residual stream and what the norm behind it wants of it: the two ops together, with and without the hint."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import triton_by
from support.contract import inputs_in, nan_filled_memory, to_device, widened
from support.gemms import module
from support.guarded import DEVICE
from torch import Tensor

pytest.importorskip("triton")
from smolvla_fast.kernels.tiles import GemmTile, using
from smolvla_fast.ops.choice import choose
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.stages.layers import embed_suffix
from smolvla_fast.tune.check import allowance

pytestmark = pytest.mark.triton
F32, BF16 = torch.float32, torch.bfloat16
TRITON = choose(backend_ops("triton"), torch.device(DEVICE), "triton", None)
BF16_ONLY = pytest.mark.parametrize("dtype", [pytest.param(BF16, marks=triton_by.BF16)], ids=str)
# Rows and widths that fill no tile, one row, and several samples.
SIZES = [(2, 7, 40, 96), (1, 1, 33, 47), (1, 50, 240, 144)]


def inputs(size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Of ``linear_residual`` and of ``norm_swiglu`` behind it, the stream in fp32."""
    b, t, wide, width = size
    first = inputs_in("linear_residual", dict(rows=b * t, inputs=wide, outputs=width), dtype, 0)[0]
    then = inputs_in("norm_swiglu", dict(rows=b * t, inputs=width, outputs=35), dtype, 1)[0]
    first["x"], first["residual"] = first["x"].view(b, t, wide), first["residual"].float().view(b, t, width)
    first["residual"][..., ::11] *= 50  # outlier channels
    both = {**first, **{name: then[name] for name in ("norm", "gate_weight", "up_weight")}}
    return to_device(both, DEVICE)


def chain(ops: Any, given: dict[str, Any], hint: NextNorm | None = None) -> tuple[Tensor, Tensor]:
    """(the stream, the gated half behind it)"""
    some = {} if hint is None else {"next_norm": hint}
    y = ops.linear_residual(given["x"], given["weight"], given["residual"], **some)
    more = {} if hint is None else {"normed": hint}
    return y, ops.norm_swiglu(y, given["norm"], given["gate_weight"], given["up_weight"], **more)


@BF16_ONLY
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_contract(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """At most twice eager's error, as if there were no hint; every number of what is prepared is written."""
    given = inputs(size, dtype)
    hint = NextNorm.of(given["norm"], given["gate_weight"])
    assert hint is not None
    with nan_filled_memory(DEVICE):
        y, ours = chain(TRITON, given, hint)
    assert hint.rows is not None and hint.squares is not None
    plain_y, plain = chain(TRITON, given)
    assert torch.equal(y, plain_y)
    assert torch.equal(hint.rows, (y * given["norm"][0].float()).to(dtype))
    rows = y.double().square().sum(-1).flatten()
    torch.testing.assert_close(hint.squares.double().sum(0), rows, rtol=1e-6, atol=0)  # sums in fp32
    truth = chain(reference_ops(), widened(to_device(given, "cpu")))[1]
    # Of eager, too, the stream stays in fp32, as stages hold it: its reference would round it to the weight's dtype.
    eager = backend_ops("torch").norm_swiglu(y, given["norm"], given["gate_weight"], given["up_weight"])
    errors = [(each.cpu().double() - truth).abs().max().item() for each in (ours, eager, plain)]
    assert errors[0] <= 2 * errors[1] + allowance(truth, dtype, size[3])


@BF16_ONLY
@pytest.mark.parametrize("slots", [True, False])
def test_queries_and_cache_of_prepared_rows(slots: bool, dtype: torch.dtype) -> None:
    """Within the rounding of a result, of the same op without them: sums of squares in another order move 1/rms by it."""
    case = dict(B=2, T=7, M=40, H=3, K=1, D=16)
    given = to_device(inputs_in("norm_qkv_rope", case, dtype, 0)[0], DEVICE)
    given["x"] = given["x"].float()
    if not slots:
        given |= {"weights": (given["weights"][0], None, None), "slots": None}
    norm = given["norm"]
    hint = NextNorm(norm[0], dtype, (given["x"] * norm[0].float()).to(dtype))
    hint.squares = given["x"].view(-1, 4, 10).square().sum(-1).T.contiguous()
    written = [torch.full_like(each, torch.nan) for each in given["slots"] or ()]
    again = [each.clone() for each in written]
    ours = TRITON.norm_qkv_rope(**{**given, "slots": tuple(written) or None}, normed=hint)
    plain = TRITON.norm_qkv_rope(**{**given, "slots": tuple(again) or None})
    # Two units of the result, and as much of what is nearly 0 as sums in fp32 leave.
    for got, want in zip([ours, *written], [plain, *again], strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@BF16_ONLY
def test_attention_prepares_as_well(dtype: torch.dtype) -> None:
    """Samples whose tokens fill no tile: what stands behind the last token is the next sample's."""
    case = dict(B=3, T=17, S=20, H=3, K=1, D=16, O=40)
    given = to_device(inputs_in("attention_residual", case, dtype, 0)[0], DEVICE)
    given["residual"] = given["residual"].float()
    hint = NextNorm(torch.rand(40, generator=torch.Generator().manual_seed(1)).to(DEVICE), dtype)
    with nan_filled_memory(DEVICE):
        y = backend_ops("triton").attention_residual(**given, next_norm=hint)
    assert hint.rows is not None and hint.squares is not None
    assert torch.equal(hint.rows, (y * hint.weight).to(dtype))
    rows = y.double().square().sum(-1).flatten()
    torch.testing.assert_close(hint.squares.double().sum(0), rows, rtol=1e-6, atol=0)  # sums in fp32


@BF16_ONLY
@pytest.mark.parametrize(("batch", "tokens", "width"), [(2, 7, 96), (1, 50, 176), (1, 1, 24)])
def test_the_suffix_prepares_for_the_first_layer(
    batch: int, tokens: int, width: int, dtype: torch.dtype
) -> None:
    """In as many parts of the width as there are, and in one: what the hint holds is of what is stored."""
    case = dict(B=batch, S=tokens, A=5, E=width, N=3)
    given = to_device(inputs_in("suffix_embed", case, F32, 0)[0], DEVICE)
    weight = torch.rand(width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    layer: Any = SimpleNamespace(norm1=(weight, 1e-5), q=weight[None])
    folded = TRITON.suffix_fold(given["times"], given["action_in"], given["time_in"])
    with nan_filled_memory(DEVICE):
        y, hint = embed_suffix(TRITON, layer, given["x"], 1, folded, given["time_out"])
    assert hint is not None and hint.rows is not None and hint.squares is not None
    assert torch.equal(y, TRITON.suffix_embed(given["x"], 1, folded, given["time_out"]))
    assert torch.equal(hint.rows, (y * weight.float()).to(dtype))
    rows = y.double().square().sum(-1).flatten()
    torch.testing.assert_close(hint.squares.double().sum(0), rows, rtol=1e-6, atol=0)  # sums in fp32
    assert (
        embed_suffix(
            reference_ops(),
            layer,
            given["x"],
            1,
            (given["times"], given["action_in"], given["time_in"]),
            given["time_out"],
        )[1]
        is None
    )


@BF16_ONLY
@pytest.mark.parametrize("split", [1, 3])
def test_tiles_and_splits(split: int, dtype: torch.dtype) -> None:
    given = inputs((1, 19, 130, 70), dtype)
    hint = NextNorm.of(given["norm"], given["gate_weight"])
    with using(GemmTile(16, 32, 32, split, 8, 4, 2)):
        y = module("linear_residual").linear_residual(
            given["x"], given["weight"], given["residual"], next_norm=hint
        )
    assert hint is not None and hint.rows is not None and hint.squares is not None
    assert hint.squares.shape == (3, 19) and torch.equal(hint.rows, (y * given["norm"][0].float()).to(dtype))


def test_what_has_no_use_of_it_prepares_nothing() -> None:
    for dtype in (F32, torch.float16):
        given = inputs(SIZES[0], dtype)
        assert NextNorm.of(given["norm"], given["gate_weight"]) is None
    assert (
        not reference_ops().prepares_norms
        and not backend_ops("torch").prepares_norms
        and TRITON.prepares_norms
    )


def test_a_candidate_of_torch_serves_without() -> None:
    """Of many rows in fp32 torch's product is the default: it is given no hint, and fills none in."""
    given = inputs((1, 70, 40, 96), F32)
    hint = NextNorm(given["norm"][0], BF16)
    y, _ = chain(TRITON, given, hint)
    assert hint.rows is None and y.shape == (1, 70, 96)


@BF16_ONLY
def test_prepared_rows_of_another_stream_are_refused(dtype: torch.dtype) -> None:
    given = inputs(SIZES[0], dtype)
    hint = NextNorm.of(given["norm"], given["gate_weight"])
    y, _ = chain(TRITON, given, hint)
    with pytest.raises(ValueError, match=r"prepared rows have shape .* accepted is"):
        module("norm_swiglu").norm_swiglu(
            y[:1], given["norm"], given["gate_weight"], given["up_weight"], normed=hint
        )


@BF16_ONLY
def test_rows_for_another_norm_are_refused(dtype: torch.dtype) -> None:
    given = inputs(SIZES[0], dtype)
    hint = NextNorm(torch.ones_like(given["norm"][0]), dtype)
    with pytest.raises(ValueError, match="prepared for another norm"):
        chain(TRITON, given, hint)
