"""The compiled rotation against the reference, to the bit, at every instruction level; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.contract import inputs_in
from support.processors import LEVELS
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import ops as compiled
from smolvla_fast.ops.cpu.rope import rope, rotate
from smolvla_fast.ops.reference.rope import apply_rope, rope_tables

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
AT_LEVELS = pytest.mark.parametrize("level", LEVELS, indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Batch, tokens, heads, head size: real ones, heads that fill no vector, single ones.
SHAPES = [(1, 177, 15, 64), (2, 50, 5, 64), (3, 7, 3, 6), (1, 1, 1, 2), (2, 5, 4, 46)]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _, head_dim = shape
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    # Other positions in every sample: a table read at another sample's place shows.
    positions = torch.arange(tokens)[None] + 3 + 11 * torch.arange(batch)[:, None]
    return (x, *rope_tables(positions, head_dim))


@pytest.mark.processor
@AT_LEVELS
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_of_the_reference(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    x, sin, cos = make(shape, dtype)
    want = apply_rope(x, sin, cos)
    assert torch.equal(rope(x, sin, cos), want)
    in_place = x.clone()
    assert rope(in_place, sin, cos, in_place) is in_place and torch.equal(in_place, want)
    # A slot of a cache: NaN before and behind it, in every dimension.
    cache = torch.full([size + 2 for size in shape], torch.nan, dtype=dtype)
    slot = cache[1:-1, 1:-1, 1:-1, 1:-1]
    assert rope(x, sin, cos, slot) is slot and torch.equal(slot, want)
    assert int(cache.isnan().sum()) == cache.numel() - x.numel(), "wrote outside its slot"


@DTYPES
def test_one_table_for_all_samples(dtype: torch.dtype) -> None:
    x, sin, cos = make((3, 7, 2, 8), dtype)
    assert torch.equal(rope(x, sin[:1], cos[:1]), apply_rope(x, sin[:1], cos[:1]))


@AT_LEVELS
def test_nan_infinity_and_subnormals_as_the_reference(level: str) -> None:
    x, sin, cos = make((1, 4, 2, 8), torch.float32)
    x[0, 0, 0, 1], x[0, 1, 1, 6], x[0, 2] = torch.nan, torch.inf, 1e-39
    for each in (x, x.bfloat16()):
        got, want = rope(each, sin, cos), apply_rope(each, sin, cos)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
        assert (got[0, 2] != 0).any(), "subnormals stay numbers"


def test_bits_do_not_depend_on_threads() -> None:
    x, sin, cos = make((2, 177, 15, 64), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(rope(x, sin, cos))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_cache_of_another_dtype_is_converted_into() -> None:
    x, sin, cos = make((1, 5, 2, 8), torch.bfloat16)
    wide = torch.empty(x.shape)
    assert rotate(x, sin, cos, out=wide) is wide
    assert torch.equal(wide, apply_rope(x, sin, cos).float())


def test_no_tokens() -> None:
    x, sin, cos = make((2, 5, 3, 8), torch.float32)
    assert rope(x[:, :0], sin[:, :0], cos[:, :0]).shape == (2, 0, 3, 8)


def test_what_it_cannot_do_is_named() -> None:
    x, sin, cos = make((2, 5, 3, 8), torch.float32)
    with pytest.raises(
        TypeError, match="x has dtype torch.float16; accepted are torch.float32, torch.bfloat16"
    ):
        rope(x.half(), sin, cos)
    with pytest.raises(ValueError, match=r"shape \[2, 5, 3, 7\]; accepted is \[B, T, H, D\], D even"):
        rope(x[..., :7].contiguous(), sin, cos)
    with pytest.raises(ValueError, match="x is not contiguous"):
        rope(x.transpose(1, 2), sin, cos)
    with pytest.raises(ValueError, match=r"cos has shape \[2, 5, 1, 3\]; accepted is \[2, 5, 1, 4\]"):
        rope(x, sin, cos[..., :3].contiguous())
    with pytest.raises(ValueError, match=r"cos has shape \[2, 5, 1, 4\]; accepted is \[1, 5, 1, 4\]"):
        rope(x, sin[:1], cos)
    with pytest.raises(TypeError, match="sin has dtype torch.float64, a table has torch.float32"):
        rope(x, sin.double(), cos)
    with pytest.raises(ValueError, match=r"out has strides .*; the last must be 1"):
        rope(x, sin, cos, torch.empty(2, 5, 8, 3).transpose(2, 3))
    with pytest.raises(ValueError, match=r"out overlaps another tensor"):
        rope(x[:1], sin[:1], cos[:1], x.view(-1)[1:121].view(1, 5, 3, 8))
    with pytest.raises(ValueError, match="out is on meta"):
        rope(x, sin, cos, x.to("meta"))
    with pytest.raises(RuntimeError, match="x wants a gradient"):
        rope(x.clone().requires_grad_(), sin, cos)


@DTYPES
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [7, 70])
def test_keys_and_values_reach_their_slots(tokens: int, batch: int, dtype: torch.dtype) -> None:
    """Behind the prefix of a cache: of one sample a slot is one piece of memory, of two it is not; few rows and many."""
    case = dict(B=batch, T=tokens, M=48, H=3, K=1, D=16)
    inputs, _ = inputs_in("norm_qkv_rope", case, dtype, seed=3)
    fresh = tuple(torch.full_like(slot, torch.nan) for slot in inputs["slots"])
    want = compiled.norm_qkv_rope(**{**inputs, "slots": fresh})
    caches = [torch.full((batch, 5 + tokens, 1, 16), torch.nan, dtype=dtype) for _ in fresh]
    got = compiled.norm_qkv_rope(**{**inputs, "slots": tuple(cache[:, 5:] for cache in caches)})
    assert torch.equal(got, want)
    for slot, cache in zip(fresh, caches, strict=True):
        assert torch.equal(cache[:, 5:], slot) and cache[:, :5].isnan().all()
