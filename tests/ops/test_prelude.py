"""The ops of a chunk that belong to no layer, as Triton kernels: prefix_embed, rope_masks and suffix_fold."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import check, in_dtypes, inputs_in, reference_module, run, sizes, to_device
from support.guarded import DEVICE, guarded

from smolvla_fast.ops.reference.rope_masks import rope_masks
from smolvla_fast.ops.select import reference_ops
from smolvla_fast.ops.torch import suffix
from smolvla_fast.ops.triton import ops as triton_ops
from smolvla_fast.tune.check import allowance

pytestmark = pytest.mark.triton
OPS = SimpleNamespace(
    prefix_embed=guarded(triton_ops.prefix_embed),
    rope_masks=guarded(triton_ops.rope_masks),
)
# Under the interpreter products of bf16 are broken; here there are none.
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=triton_by.BF16)], ids=str
)

# prefix_embed

PREFIXES = [
    dict(C=2, B=1, T=64, L=48, M=96, R=32, V=512, ends=0),
    *reference_module("prefix_embed").CASES[1:],
    dict(C=1, B=3, T=2, L=3, M=300, R=37, V=5, ends=1),
    dict(C=0, B=2, T=0, L=16, M=40, R=3, V=9, ends=0),
]


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(PREFIXES, everywhere=PREFIXES[2:]))
def test_prefix_embed(case: dict[str, int], dtype: torch.dtype) -> None:
    """Absent cameras, shorter prompts, special tokens; no camera at all."""
    check(reference_ops(), OPS, "prefix_embed", case, dtype)


@DTYPES
def test_tokens_have_the_bits_of_eager_torch(dtype: torch.dtype) -> None:
    """One product of fp32 each; of the state, a sum, only the contract holds."""
    inputs = inputs_in("prefix_embed", PREFIXES[1], dtype, seed=1)[0]
    found, wanted = (run(ops, "prefix_embed", inputs) for ops in (OPS, reference_ops()))
    assert torch.equal(found["y0"][:, :-1], wanted["y0"][:, :-1])
    assert torch.equal(found["y1"], wanted["y1"]) and torch.equal(found["y2"], wanted["y2"])
    assert not wanted["y1"].all() and wanted["y2"].sum() == len(wanted["y2"])


def test_prefix_embed_up_to_a_length() -> None:
    inputs = {**inputs_in("prefix_embed", PREFIXES[1], torch.float32, seed=1)[0], "length": 60}
    found, wanted = (run(ops, "prefix_embed", inputs) for ops in (OPS, reference_ops()))
    assert found["y0"].shape == (2, 60, 33)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_prefix_embed_of_language_that_is_a_view() -> None:
    inputs = inputs_in("prefix_embed", PREFIXES[1], torch.float32, seed=1)[0]
    wanted = run(OPS, "prefix_embed", inputs)
    for name in ("tokens", "token_masks"):
        inputs[name] = inputs[name].t().contiguous().t()
    wide = torch.cat([inputs["state"], inputs["state"]], dim=1)
    inputs["state"] = wide[:, : inputs["state"].shape[1]]
    inputs["tokens"] = inputs["tokens"].to(torch.int32)
    found = triton_ops.prefix_embed(**to_device(inputs, DEVICE))
    assert not inputs["tokens"].is_contiguous() and not inputs["state"].is_contiguous()
    assert torch.equal(found[0].cpu(), wanted["y0"]) and torch.equal(found[1].cpu().float(), wanted["y1"])


def test_an_id_outside_the_table_shows() -> None:
    inputs = inputs_in("prefix_embed", PREFIXES[1], torch.float32, seed=1)[0]
    vocabulary = len(inputs["table"])
    inputs["tokens"][0, 0], inputs["tokens"][1, 1] = vocabulary, -1
    found = run(OPS, "prefix_embed", inputs)["y0"].isnan()
    language = found[:, -1 - inputs["tokens"].shape[1] : -1]
    assert language[0, 0].all() and language[1, 1].all() and found.any(-1).sum() == 2


def test_prefix_embed_refuses_what_it_cannot_do() -> None:
    given = to_device(inputs_in("prefix_embed", PREFIXES[1], torch.float32, seed=1)[0], DEVICE)
    refused = triton_ops.prefix_embed
    changes: dict[str, tuple[Any, str]] = {
        "image_tokens": (list(given["image_tokens"]), "image_tokens is a list; accepted is one tensor"),
        "table": (
            given["table"][:, :32],
            r"image_tokens has shape \[3, 2, 5, 33\]; accepted is \[3, 2, 5, 32\]",
        ),
        "image_masks": (
            given["image_masks"].long(),
            r"image_masks is torch.int64, \[3, 2\]; accepted is torch.bool",
        ),
        "token_masks": (
            given["token_masks"][:, :2],
            r"token_masks is torch.bool, \[2, 2\]; accepted is .* \[2, 7\]",
        ),
        "tokens": (given["tokens"].float(), "tokens is torch.float32; accepted are int64 and int32"),
        "state": (given["state"].double(), "state is torch.float64; accepted are float32, bfloat16, float16"),
        "dtype": (torch.float64, "the result is torch.float64; accepted are float32"),
    }
    for name, (value, reason) in changes.items():
        with pytest.raises(ValueError, match=reason):
            refused(**{**given, name: value})
    with pytest.raises(ValueError, match="image_tokens must be contiguous"):
        refused(
            **{**given, "image_tokens": given["image_tokens"].transpose(0, 1).contiguous().transpose(0, 1)}
        )


# rope_masks

PLACES = [
    *reference_module("rope_masks").CASES[1:],
    dict(B=1, P=64, S=7, D=64),
    dict(B=2, P=9, S=1, D=96),
    dict(B=1, P=1, S=9, D=2),
    pytest.param(reference_module("rope_masks").CASES[0], marks=pytest.mark.long),
]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", PLACES, ids=sizes)
def test_rope_masks(case: dict[str, int], seed: int) -> None:
    """Padding anywhere, blocks of any size; the tables within twice eager's error against fp64."""
    check(reference_ops(), OPS, "rope_masks", case, torch.float32, seed)


@pytest.mark.parametrize("case", PLACES[:4], ids=sizes)
def test_masks_and_positions_are_exact(case: dict[str, int]) -> None:
    """Bit by bit; of positions, by angles far enough from each other."""
    inputs = inputs_in("rope_masks", case, torch.float32, seed=2)[0]
    for found, wanted in zip(OPS.rope_masks(**inputs), rope_masks(**inputs), strict=True):
        assert torch.equal(found.mask, wanted.mask)
        angles = [torch.atan2(sin, cos)[..., 0] for sin, cos in (found.rope, wanted.rope)]
        apart = (angles[0] - angles[1]).remainder(2 * torch.pi)
        # Neighbours are 1 radian apart; fp32 gives angles of such positions to 1e-5.
        assert torch.minimum(apart, 2 * torch.pi - apart).max() < 1e-3


def test_a_prefix_without_a_valid_token() -> None:
    """Positions begin at -1, and nothing is seen."""
    pads, blocks = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    pads[1, 3] = True
    found, wanted = OPS.rope_masks(pads, blocks, 3, 8), rope_masks(pads, blocks, 3, 8)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.mask, theirs.mask)
        for table, other in zip(ours.rope, theirs.rope, strict=True):
            torch.testing.assert_close(table, other, atol=1e-6, rtol=0)  # a few units of angles below 8
    assert not found[0].mask[0].any() and found[0].mask[1].sum() == 1
    assert (found[0].rope[0][0, :, 0, 0] < 0).all()


def test_angles_of_long_prefixes() -> None:
    """Positions up to a thousand, where the nearest multiple of π/2 has to be taken off with care."""
    pads = torch.ones(1, 3, dtype=torch.bool)
    inputs = dict(pad_masks=pads, att_masks=pads, suffix=1000, head_dim=4)
    ours = OPS.rope_masks(**inputs)[2].rope
    eager, truth = (rope_masks(**inputs, dtype=dtype)[2].rope for dtype in (torch.float32, torch.float64))
    for found, plain, want in zip(ours, eager, truth, strict=True):
        assert (found - want).abs().max() <= 2 * (plain - want).abs().max() + allowance(
            want, torch.float32, 1
        )


def test_rope_masks_refuses_what_it_cannot_do() -> None:
    pads = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    refused = triton_ops.rope_masks
    with pytest.raises(
        ValueError, match=r"att_masks is torch.bool, \[2, 4\]; accepted is torch.bool, \[2, 5\]"
    ):
        refused(pads, pads[:, :4].contiguous(), 3, 8)
    with pytest.raises(ValueError, match="pad_masks is torch.int64"):
        refused(pads.long(), pads, 3, 8)
    with pytest.raises(ValueError, match="a head size of 7 has no halves; accepted are even sizes"):
        refused(pads, pads, 3, 7)
    assert refused(pads[:0], pads[:0], 3, 8)[1].mask.shape == (0, 3, 8)


# suffix_fold

FOLDS = (
    dict(B=1, S=1, A=32, E=96, N=10),
    dict(B=2, S=1, A=5, E=48, N=3),
    dict(B=3, S=1, A=33, E=70, N=7),
    dict(B=1, S=1, A=1, E=1, N=1),
)
fold = guarded(triton_ops.suffix_fold)


@pytest.mark.parametrize(("case", "dtype"), in_dtypes(FOLDS, everywhere=FOLDS[2:]))
def test_suffix_fold(case: dict[str, int], dtype: torch.dtype) -> None:
    """Both results against the same products in fp64; times come in fp64."""
    given, wide = inputs_in("suffix_embed", case, dtype, seed=0)
    names = ("times", "action_in", "time_in")
    given["times"] = wide["times"]
    ours, again = (fold(*(given[name] for name in names)) for _ in range(2))
    eager = suffix.suffix_fold(*(given[name] for name in names))
    (in_weight, in_bias), (weight, bias) = wide["action_in"], wide["time_in"]
    left, right = weight.split(case["E"], dim=1)
    truth = (left @ in_weight, (left @ in_bias + wide["times"] @ right.t() + bias)[:, :, None])
    for mine, second, plain, want in zip(ours, again, eager, truth, strict=True):
        assert mine.dtype is torch.float32 and mine.shape == want.shape and torch.equal(mine, second)
        allowed = 2 * (plain - want).abs().max() + allowance(want, torch.float32, 8 * case["E"])
        assert (mine - want).abs().max() <= allowed


def test_suffix_fold_refuses_what_it_cannot_do() -> None:
    given = to_device(inputs_in("suffix_embed", FOLDS[1], torch.float32, seed=0)[0], DEVICE)
    times, action_in, time_in = given["times"], given["action_in"], given["time_in"]
    refused = triton_ops.suffix_fold
    with pytest.raises(ValueError, match=r"time_in.weight has shape \[48, 95\]; accepted is \[48, 96\]"):
        refused(times, action_in, (time_in[0][:, :-1], time_in[1]))
    with pytest.raises(ValueError, match="time_in.weight must be contiguous"):
        refused(times, action_in, (torch.cat([time_in[0]] * 2, dim=1)[:, :96], time_in[1]))
    with pytest.raises(
        ValueError, match=r"times is torch.float32, \[3, 2, 47\]; accepted are floats, \[N, B, 48\]"
    ):
        refused(times[..., :-1].contiguous(), action_in, time_in)
