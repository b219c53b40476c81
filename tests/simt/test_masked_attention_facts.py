"""What is true of attention alone, on the host emulator: who sees what, where it lies, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_inputs import DTYPES, PAIRED, SMALL, inputs, masked_attention

from smolvla_fast.ops.cuda import masked_attention as module

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("emulator")]


@PAIRED
def test_a_row_that_sees_nothing_averages_all_values(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Of all keys, in every warp, and of none that fills up the last piece."""
    values = inputs(SMALL, *pair)
    values["mask"][0, 2] = False
    out = masked_attention(**values)
    mean = values["v"][0].double().mean(0).repeat_interleave(3, dim=0).flatten()
    # Weights are exactly 1, sums fp32: what is left is the rounding of the result, half a unit of at most 1.
    torch.testing.assert_close(out[0, 2].double(), mean, rtol=0, atol=0.51 * torch.finfo(pair[0]).eps)
    assert (out[0, 2].double() - mean * 83 / 96).abs().max() > 0.01, "padding taken for keys would show"


@PAIRED
def test_masked_keys_have_no_influence(pair: tuple[torch.dtype, torch.dtype]) -> None:
    values = inputs(SMALL, *pair)
    before = masked_attention(**values)
    hidden = ~values["mask"].any(1)
    hidden[1] = False
    values["mask"][1, :, :66] = False  # the first two warps of this item see nothing
    want = masked_attention(**values)
    assert torch.equal(want[0], before[0]) and not torch.equal(want[1], before[1])
    hidden[1, :66] = True
    assert hidden.any(1).all()
    for name in ("k", "v"):
        values[name][hidden] = 1e6 if pair[1] is not torch.float16 else 6e4  # near the largest of fp16
    assert torch.equal(masked_attention(**values), want)


@DTYPES
def test_a_row_of_one_key_returns_its_value(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    seen = torch.randint(0, 83, (2, 7), generator=torch.Generator().manual_seed(0))
    values["mask"] = torch.nn.functional.one_hot(seen, 83).bool()
    want = values["v"][torch.arange(2)[:, None], seen].repeat_interleave(3, dim=2).flatten(2)
    assert torch.equal(masked_attention(**values), want)


@DTYPES
def test_each_item_of_a_batch_has_its_own_mask(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    values["mask"] = torch.rand(2, 7, 83, generator=torch.Generator().manual_seed(1)) < 0.5
    together = masked_attention(**values)
    for i in range(2):
        alone = masked_attention(**{name: value[i : i + 1] for name, value in values.items()})
        assert torch.equal(together[i], alone[0])


@PAIRED
def test_a_cache_is_read_where_it_lies(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Keys and values are the front of a longer cache of all layers, NaN behind; queries a part of a joint projection."""
    values = inputs(SMALL, *pair)
    want = masked_attention(**values)
    for name, extra in (("k", 8), ("v", 16)):
        cache = torch.full((2, 3, 100, 2, 24 + extra), torch.nan, dtype=pair[1])
        view = cache[:, 1, :83, :, :24]
        view.copy_(values[name])
        values[name] = view
    joint = torch.full((2, 7, 9, 26), torch.nan, dtype=pair[0])
    joint[:, :, 2:8, 2:] = values["q"]
    values["q"] = joint[:, :, 2:8, 2:]
    spread = torch.zeros(7, 2, 166, dtype=torch.bool)
    spread[:, :, ::2] = values["mask"].transpose(0, 1)
    values["mask"] = spread.transpose(0, 1)[:, :, ::2]
    assert not any(value.is_contiguous() for value in values.values())
    assert torch.equal(masked_attention(**values), want)


@PAIRED
def test_nan_stays_in_its_row(pair: tuple[torch.dtype, torch.dtype]) -> None:
    values = inputs(SMALL, *pair)
    values["mask"][0, 3] = True
    want = masked_attention(**values)
    values["q"][0, 3, 1, 5] = torch.nan
    out = masked_attention(**values).view(2, 7, 6, 24)
    assert out[0, 3, 1].isnan().all()
    out[0, 3, 1] = want.view(2, 7, 6, 24)[0, 3, 1]
    assert torch.equal(out.flatten(2), want)
    values = inputs(SMALL, *pair)
    values["k"][1, 82, 1, 23] = torch.nan  # seen by the last token alone
    out = masked_attention(**values).view(2, 7, 2, 3, 24)
    assert out[1, 6, 1].isnan().all() and out.isnan().sum() == 3 * 24


@DTYPES
def test_large_scores_neither_overflow_nor_lose_the_winner(dtype: torch.dtype) -> None:
    q, k = torch.zeros(1, 2, 1, 8, dtype=dtype), torch.zeros(1, 40, 1, 8, dtype=dtype)
    q[0, :, 0, 0] = torch.tensor([6e4, -6e4])
    k[0, [0, 35], 0, 0] = torch.tensor([-6e4, 6e4], dtype=dtype)
    v = torch.arange(320, dtype=torch.float32).view(1, 40, 1, 8).to(dtype)
    out = masked_attention(q, k, v, torch.ones(1, 2, 40, dtype=torch.bool))
    assert torch.equal(out.view(2, 8), v[0, [35, 0], 0])


def test_empty_batches_and_queries_give_empty_results() -> None:
    for shape in ((0, 4, 3, 8), (2, 0, 3, 8)):
        keys = torch.zeros(shape[0], 5, 3, 8, dtype=torch.bfloat16)
        mask = torch.ones(*shape[:2], 5, dtype=torch.bool)
        out = module.masked_attention(torch.zeros(shape, dtype=torch.bfloat16), keys, keys, mask)
        assert out.shape == (*shape[:2], 24)


def test_wrong_arguments_are_named() -> None:
    args = inputs(SMALL, torch.bfloat16)
    q, k, v, mask = (args[name] for name in ("q", "k", "v", "mask"))

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            module.masked_attention(**{**args, **changes})

    refused("q is float32, k bfloat16, v bfloat16; accepted is q in bfloat16 or float16", q=q.float())
    refused("q is bfloat16, k float16, v bfloat16", k=k.half())
    refused("q is bfloat16, k float32, v bfloat16", k=k.float())
    refused(r"accepted are \[B, T, H, D\]", q=q[0])
    refused("multiple of the KV heads", q=q[:, :, :5])
    refused("at least one key", k=k[:, :0])
    refused(
        "head size 20; accepted are multiples of 8 up to 128", q=q[..., :20], k=k[..., :20], v=v[..., :20]
    )
    refused(r"v has shape \[2, 82, 2, 24\]; accepted is \[2, 83, 2, 24\]", v=v[:, :82])
    refused(
        r"k has strides .*; accepted are elements of a head side by side",
        k=k.transpose(1, 3).contiguous().transpose(1, 3),
    )
    refused("k has strides .* at multiples of 16 bytes", k=torch.zeros(2, 83, 2, 28, dtype=k.dtype)[..., :24])
    refused(
        "v begins at an address that is no multiple of 16 bytes",
        v=torch.zeros(2, 83, 2, 32, dtype=k.dtype)[..., 4:28],
    )
    refused("q has strides .* at multiples of 4 bytes", q=torch.zeros(2, 7, 6, 25, dtype=q.dtype)[..., :24])
    refused(r"mask has shape \[7, 83\]; accepted is \[2, 7, 83\]", mask=mask[0])
    refused("mask is float32; accepted: bool", mask=mask.float())
    refused("v is on meta", v=v.to("meta"))
