"""Prefix, suffix and cross attention of every backend against fp64, and what is true of attention alone.

Tolerance: the worst error may be twice that of eager torch in the same dtypes. Both round the same quantities, in another
order; a factor of two separates that from a lost bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import triton_by
from support.backends import CUDA, TRITON, at_every_level, cpu_at, device_of, with_dtypes
from support.contract import inputs_in, widened
from support.guarded import DEVICE, guarded
from support.processors import LEVELS_EMULATED
from torch import Tensor

from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.masked_attention import CASES as REAL
from smolvla_fast.ops.reference.masked_attention import masked_attention as reference
from smolvla_fast.ops.reference.masks import block_mask

pytestmark = [
    # Of numpy, which computes Triton's kernels under the interpreter.
    pytest.mark.filterwarnings("ignore:.*(All-NaN slice|invalid value) encountered:RuntimeWarning"),
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Queries, then keys and values; bf16 with fp32 is LeRobot's default layout, whose cross KV is fp32.
PAIRS = {
    "cpu": ((F32, F32), (BF16, BF16)),
    "triton": ((F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)),
    "cuda": ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)),
}
CPU = cpu_at(LEVELS_EMULATED)
GRID = with_dtypes((CPU, PAIRS["cpu"]), ([TRITON], PAIRS["triton"]), ([CUDA], PAIRS["cuda"]))
ON_CUDA = pytest.mark.parametrize(
    ("backend", "pair"), with_dtypes(([CUDA], PAIRS["cuda"])), indirect=["backend"]
)


def case(*sizes: int) -> dict[str, int]:
    return dict(zip("BTSHKD", sizes, strict=True))


SMALL = case(2, 7, 83, 6, 2, 24)
# One query, few keys, sizes off every tile, heads that fill no vector or several panels, grouped and not. Of CUDA's kernel
# rows of 16 and keys of 8, 16, 32 and 256 are where a tile, a load, a piece and a round end. SmolVLA's own sizes, the first
# three of Triton's, take the interpreter twice as long in 32 bits as in 16; its prefix of 177 takes 10 s: a device runs it.
CASES = {
    "cpu": (
        *REAL, case(1, 1, 3, 1, 1, 24), case(2, 7, 65, 4, 4, 40), case(1, 13, 127, 6, 2, 80), case(1, 9, 31, 3, 1, 128),
        case(1, 5, 17, 2, 1, 7), case(1, 3, 34, 2, 2, 200), case(1, 4, 1100, 2, 1, 64),
    ),
    "triton": (
        case(1, 67, 67, 15, 5, 64), case(1, 50, 227, 15, 5, 64), case(1, 50, 177, 15, 5, 64), case(2, 21, 21, 6, 2, 24),
        case(2, 7, 19, 3, 1, 16), case(3, 1, 33, 4, 4, 8), case(1, 3, 1, 2, 2, 40), case(1, 5, 300, 5, 1, 128),
        case(2, 9, 70, 8, 2, 96), case(1, 2, 17, 3, 3, 1),
    ),
    "cuda": (
        *REAL, case(1, 7, 41, 15, 5, 64), case(1, 6, 227, 6, 2, 64), case(1, 3, 300, 5, 1, 64), case(3, 1, 33, 4, 4, 8),
        case(1, 3, 1, 2, 2, 40), case(1, 5, 150, 5, 1, 128), case(2, 9, 30, 8, 2, 96), case(1, 16, 32, 2, 2, 32),
    ),
}  # fmt: skip


# One query, one key, heads of one number: in every dtype.
ONES = (case(3, 1, 33, 4, 4, 8), case(1, 3, 1, 2, 2, 40), case(1, 2, 17, 3, 3, 1))


def larger_product(backend: str, pair: Any) -> bool:
    """Kernels for GPUs in fp16, beside those in bf16: ``triton_by.FP16``."""
    return backend != "cpu" and pair[0] is F16 and bool(triton_by.FP16)


BACKENDS_AND_DTYPES = pytest.mark.parametrize(
    ("backend", "pair"),
    [
        pytest.param(
            *each.values,
            marks=[*each.marks, *[pytest.mark.long] * larger_product(each.values[0][0], each.values[1])],
            id=each.id,
        )
        for each in GRID
    ],
    indirect=["backend"],
)


def grid_of_cases() -> list[Any]:
    found = []
    for each in GRID:
        (name, _), pair = each.values
        for sizes in CASES[name]:
            if pair[0] is not pair[1] and sizes in (*REAL, *CASES["triton"][:3]):
                continue
            slow = name == "triton" and pair[0] is F32 and sizes in CASES[name][:3] and DEVICE == "cpu"
            slow |= larger_product(name, pair) and sizes not in ONES
            marks = [*each.marks, *[pytest.mark.long] * slow]
            identity = f"{each.id} {'x'.join(map(str, sizes.values()))}"
            found.append(pytest.param(*each.values, sizes, marks=marks, id=identity))
    return found


def module(backend: str) -> Any:
    places = {"triton": "smolvla_fast.kernels", "cuda": "smolvla_fast.ops.cuda"}
    return importlib.import_module(f"{places[backend]}.masked_attention")


@pytest.fixture
def attend(backend: str) -> Callable[..., Tensor]:
    """``attend(q, k, v, mask)`` with its result between guards of NaN, and NaN where nothing is written."""
    if backend == "cpu":
        return guarded(lambda q, k, v, mask: cpu.attention(q, k, v, mask).flatten(2), "cpu")
    return guarded(module(backend).masked_attention, device_of(backend))


def inputs(sizes: dict[str, int], pair: Any, seed: int = 0) -> dict[str, Any]:
    """Queries in the first dtype of the pair; keys and values in the second, fp32 ones with more bits than the first has."""
    dtype, cache = pair
    values = inputs_in("masked_attention", sizes, dtype, seed)[0]
    for name in ("k", "v") if cache is not dtype else ():
        generator = torch.Generator().manual_seed(seed + ord(name))
        values[name] = torch.randn(values[name].shape, generator=generator)
    return values


def assert_as_exact_as_eager(out: Tensor, values: dict[str, Any], slack: float = 0.0) -> None:
    """Where dtypes are mixed, eager computes in fp32 and its result is rounded to the dtype of q, as ours."""
    truth, dtype = reference(**widened(values)), values["q"].dtype
    eager = reference(**values).to(dtype)
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (out, eager))
    assert out.dtype is dtype and not out.isnan().any()
    assert error <= 2 * eager_error + slack * torch.finfo(dtype).eps * truth.abs().max().item()


@pytest.mark.parametrize(("backend", "pair", "sizes"), grid_of_cases(), indirect=["backend"])
def test_error_against_fp64(backend: str, pair: Any, sizes: dict[str, int], attend: Any) -> None:
    values = inputs(sizes, pair)
    out = attend(**values)
    # Eager is sometimes exact, and twice nothing is nothing: for Triton one unit in the last place, as in contract.py.
    assert_as_exact_as_eager(out, values, slack=1 if backend == "triton" else 0)
    if pair[0] is not pair[1]:
        truth = reference(**widened(values))
        # Half a unit is the rounding of the result. Keys, values and weights are good to 2^-17 of themselves, scores of
        # about ten to ten times that, and weights are averaged over values.
        allowed = 0.5 * torch.finfo(pair[0]).eps * truth.abs() + 2**-14 * values["v"].abs().max()
        assert ((out.double() - truth).abs() <= allowed).all()
    if backend == "cpu":  # as the vision tower calls it
        values["mask"] = torch.ones_like(values["mask"])
        assert_as_exact_as_eager(cpu.attention(values["q"], values["k"], values["v"]).flatten(2), values)


@ON_CUDA
def test_error_with_outliers(pair: Any, attend: Any) -> None:
    """A few channels of the queries fifty times larger, as in trained transformers."""
    values = inputs(SMALL, pair, seed=4)
    values["q"][..., ::7] *= 50
    assert_as_exact_as_eager(attend(**values), values)


@ON_CUDA
@pytest.mark.parametrize(("tokens", "prefix"), [(7, 40), (17, 1), (9, 0), (1, 31), (20, 250)])
def test_masks_of_a_denoise_step(tokens: int, prefix: int, pair: Any, attend: Any) -> None:
    """The valid keys of the prefix, then each token's own causally."""
    values = inputs(case(2, tokens, prefix + tokens, 3, 1, 16), pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(3)) < 0.6
    ones = torch.ones(2, tokens, dtype=torch.bool)
    values["mask"] = torch.cat([seen[:, None].expand(2, tokens, prefix), block_mask(ones, ones)], dim=2)
    assert_as_exact_as_eager(attend(**values), values)


@pytest.mark.parametrize(
    ("backend", "pair", "prefix"),
    [
        pytest.param(
            *each.values,
            prefix,
            # Triton's in one pair of dtypes: each is a kernel to compile.
            marks=[
                *each.marks,
                *[pytest.mark.long] * (each.id[:6] == "triton" and pair[0] is not F32 and prefix != 83),
            ],
            id=f"{each.id}-{prefix}",
        )
        for each in GRID
        for pair in each.values[1:]
        for prefix in (1, 32, 83, 260)
    ],
    indirect=["backend"],
)
def test_one_row_of_the_mask_serves_all_queries(prefix: int, pair: Any, backend: str, attend: Any) -> None:
    """The pad mask of the prefix in cross attention, expanded over the queries: the bits of a copy for each."""
    values = inputs(case(2, 7, prefix, 6, 2, 24), pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(2)) < 0.7
    values["mask"] = seen[:, None].expand(2, 7, prefix)
    assert values["mask"].stride(1) == 0
    out = attend(**values)
    assert_as_exact_as_eager(out, values, slack=1 if backend == "triton" else 0)
    assert torch.equal(out, attend(**{**values, "mask": values["mask"].contiguous()}))


@BACKENDS_AND_DTYPES
def test_lerobots_blocks(pair: Any, backend: str, attend: Any) -> None:
    """Images and language see each other, padding is seen by none and sees none, the state sees all that is valid."""
    values = inputs(case(2, 21, 21, 6, 2, 24), pair)
    valid, blocks = torch.ones(2, 21, dtype=torch.bool), torch.zeros(2, 21, dtype=torch.bool)
    valid[0, 12:20], blocks[:, 20] = False, True
    values["mask"] = block_mask(valid, blocks)
    assert not values["mask"][0, 15].any() and values["mask"][1, 20].all() and not values["mask"][1, 3, 20]
    assert_as_exact_as_eager(attend(**values), values, slack=1 if backend == "triton" else 0)


@BACKENDS_AND_DTYPES
def test_a_row_that_sees_nothing_averages_all_values(pair: Any, backend: str, attend: Any) -> None:
    """Of all keys, in every warp or block, and of none that fills up the last piece."""
    values = inputs(SMALL, pair)
    values["mask"][0, 2] = False
    out = attend(**values)
    mean = values["v"][0].double().mean(0).repeat_interleave(3, dim=0).flatten()
    # Keys weigh exactly 1, sums are fp32: the rounding of the result, half a unit of at most 1. In fp32, and where Triton
    # rounds weights of one 83rd, a few more.
    units = 2 if backend == "triton" or pair[0] is F32 else 0.51
    torch.testing.assert_close(out[0, 2].double(), mean, rtol=0, atol=units * torch.finfo(pair[0]).eps)
    for padded in (96, 128):
        assert (out[0, 2].double() - mean * 83 / padded).abs().max() > 0.01, (
            "padding taken for keys would show"
        )


@BACKENDS_AND_DTYPES
def test_masked_keys_have_no_influence(pair: Any, attend: Any) -> None:
    values = inputs(SMALL, pair)
    before = attend(**values)
    hidden = ~values["mask"].any(1)
    hidden[1] = False
    values["mask"][1, :, :66] = False  # the first blocks, or warps, of this item see nothing
    want = attend(**values)
    assert torch.equal(want[0], before[0]) and not torch.equal(want[1], before[1])
    hidden[1, :66] = True
    assert hidden.any(1).all()
    for name in ("k", "v"):
        values[name][hidden] = 1e6 if pair[1] is not F16 else 6e4  # near the largest of fp16
    assert torch.equal(attend(**values), want)


@BACKENDS_AND_DTYPES
def test_a_row_of_one_key_returns_its_value(pair: Any, attend: Any, backend: str) -> None:
    values = inputs(SMALL, pair)
    seen = torch.randint(0, 83, (2, 7), generator=torch.Generator().manual_seed(0))
    values["mask"] = torch.nn.functional.one_hot(seen, 83).bool()
    values["v"] = values["v"].to(pair[0]).to(pair[1])  # then nothing is left to round
    want = values["v"][torch.arange(2)[:, None], seen].repeat_interleave(3, dim=2).flatten(2)
    # Two tf32 parts of a number have 22 of the 24 bits that it has in fp32, and are rounded down.
    lost = 2**-21 if backend == "triton" and pair[0] is F32 else 0
    torch.testing.assert_close(attend(**values), want.to(pair[0]), rtol=lost, atol=0)


@BACKENDS_AND_DTYPES
def test_each_item_of_a_batch_has_its_own_mask(pair: Any, attend: Any) -> None:
    values = inputs(SMALL, pair)
    values["mask"] = torch.rand(2, 7, 83, generator=torch.Generator().manual_seed(1)) < 0.5
    together = attend(**values)
    for i in range(2):
        alone = attend(**{name: value[i : i + 1] for name, value in values.items()})
        assert torch.equal(together[i], alone[0])


@BACKENDS_AND_DTYPES
def test_a_cache_is_read_where_it_lies(pair: Any, backend: str, attend: Any) -> None:
    """Keys and values are the front of a longer cache of all layers, NaN behind; queries a part of a joint projection."""
    values, device = inputs(SMALL, pair), device_of(backend)
    want = attend(**values)
    for name, extra in (("k", 8), ("v", 16)):
        cache = torch.full((2, 3, 100, 2, 24 + extra), torch.nan, dtype=pair[1], device=device)
        cache[:, 1, :83, :, :24] = values[name]
        values[name] = cache[:, 1, :83, :, :24]
    joint = torch.full((2, 7, 9, 26), torch.nan, dtype=pair[0], device=device)
    joint[:, :, 2:8, 2:] = values["q"]
    values["q"] = joint[:, :, 2:8, 2:]
    spread = torch.zeros(7, 2, 166, dtype=torch.bool, device=device)
    spread[:, :, ::2] = values["mask"].transpose(0, 1)
    values["mask"] = spread.transpose(0, 1)[:, :, ::2]
    assert not any(value.is_contiguous() for value in values.values())
    assert torch.equal(attend(**values), want)


@BACKENDS_AND_DTYPES
def test_nan_comes_out_where_it_went_in(pair: Any, backend: str, attend: Any) -> None:
    """As in the reference, and every other bit stays."""
    values = inputs(SMALL, pair)
    values["mask"][0, 3] = True
    clean = attend(**values)
    # Token 3, head 4; a key that the last token of its item alone sees; a value of the KV head.
    places = {"q": (0, 3, 4, 5), "k": (1, 82, 1, 23), "v": (0, 18, 1, 5)}
    for name in {"triton": "q", "cuda": "qk", "cpu": "qkv"}[backend]:
        poisoned = {**values, name: values[name].clone()}
        poisoned[name][places[name]] = torch.nan
        got, want = attend(**poisoned), reference(**poisoned).isnan()
        assert want.any() and not want.all() and torch.equal(got.isnan(), want), name
        assert torch.equal(got[~want], clean[~want]), name


@BACKENDS_AND_DTYPES
def test_large_scores_neither_overflow_nor_lose_the_winner(pair: Any, attend: Any) -> None:
    large = 6e4 if F16 in pair else 1e15
    q, k, v = (torch.zeros_like(inputs(SMALL, pair)[name]) for name in "qkv")
    q[:, ::2, :, 0], q[:, 1::2, :, 0] = large, -large
    k[:, 0, :, 0], k[:, 70, :, 0] = -large, large
    v = torch.arange(v.numel(), dtype=F32).view(v.shape).to(pair[0]).to(pair[1])
    out = attend(q, k, v, torch.ones(2, 7, 83, dtype=torch.bool))
    winners = v[:, [70, 0, 70, 0, 70, 0, 70]].repeat_interleave(3, dim=2)
    assert torch.equal(out, winners.flatten(2).to(pair[0]))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.cpu_kernels
def test_bits_do_not_depend_on_threads_or_runs(dtype: torch.dtype) -> None:
    values = inputs(case(2, 50, 227, 6, 2, 64), (dtype, dtype))
    counts = (1, 2, 3, 7, 1, 2)
    results = list(at_every_level(lambda: cpu.attention(**values), counts))
    for at in range(0, len(results), len(counts)):
        assert all(torch.equal(result, results[at]) for result in results[at : at + len(counts)])


@pytest.mark.simt
@pytest.mark.parametrize("pair", PAIRS["cuda"], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(pair: Any, over_seeds: Any) -> None:
    values = inputs(case(1, 7, 270, 3, 1, 64), pair)
    first, *others = over_seeds(lambda: guarded(module("cuda").masked_attention, "cpu")(**values))
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("backend", [CPU[0], TRITON, CUDA], indirect=True)
def test_empty_batches_and_queries_give_empty_results(backend: str) -> None:
    call = cpu.attention if backend == "cpu" else module(backend).masked_attention
    for shape in ((0, 4, 3, 8), (2, 0, 3, 8)):
        zeros = dict(dtype=BF16, device=device_of(backend))
        keys = torch.zeros(shape[0], 5, 3, 8, **zeros)
        mask = torch.ones(*shape[:2], 5, dtype=torch.bool, device=device_of(backend))
        assert call(torch.zeros(shape, **zeros), keys, keys, mask).flatten(2).shape == (*shape[:2], 24)


@pytest.mark.cpu_kernels
def test_overlap_is_judged_by_the_memory_that_views_reach() -> None:
    q, k = torch.randn(1, 7, 2, 8), torch.randn(1, 19, 2, 8)
    memory = torch.ones(4096, dtype=torch.uint8)
    # Expanded over seven queries, the mask still owns 19 bytes; the output right behind it is free.
    mask = memory[:19].view(torch.bool)[None, None].expand(1, 7, 19)
    out = memory[64 : 64 + q.nbytes].view(F32).view(q.shape)
    assert torch.equal(cpu.attention(q, k, k, mask, out=out), cpu.attention(q, k, k))
    # A view of every fourth key reaches four times as far as it has elements.
    cache = torch.zeros(1, 4 * 19, 2, 8)
    inside = cache.flatten()[2 * k.numel() : 2 * k.numel() + q.numel()].view(q.shape)
    with pytest.raises(ValueError, match=r"out overlaps another tensor"):
        cpu.attention(q, cache[:, ::4], k, out=inside)


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 3).contiguous().transpose(1, 3)


def zeros_like(x: Tensor, wider: int) -> Tensor:
    return x.new_zeros(*x.shape[:3], x.shape[3] + wider)


# Backend -> (dtype, changes of the arguments, what is said).
REFUSED: dict[str, tuple[torch.dtype, list[tuple[Callable[..., dict[str, Any]], str]]]] = {
    "cpu": (F32, [
        (lambda q, k, v, mask: dict(q=q.half()), "q has dtype torch.float16; accepted are torch.float32, torch.bfloat16"),
        (lambda q, k, v, mask: dict(k=k.bfloat16()), "k has dtype torch.bfloat16, q has torch.float32"),
        (lambda q, k, v, mask: dict(mask=mask.float()), "mask has dtype torch.float32, a mask has torch.bool"),
        (lambda q, k, v, mask: dict(q=q[0]), r"\[B, T, H, D\]"),
        (lambda q, k, v, mask: dict(q=q[:, :, :5]), "H a multiple of K"),
        (lambda q, k, v, mask: dict(k=k[:, :0]), "S and D must be at least 1"),
        (lambda q, k, v, mask: dict(v=v[:, :82]), r"v has shape \[2, 82, 2, 24\]; accepted is \[2, 83, 2, 24\]"),
        (lambda q, k, v, mask: dict(k=k[:1]), r"k has shape \[1, 83, 2, 24\]"),
        (lambda q, k, v, mask: dict(mask=mask[0]), r"mask has shape \[7, 83\]; accepted is \[2, 7, 83\]"),
        (lambda q, k, v, mask: dict(k=turned(k)), "k has strides .*; the last must be 1"),
        (lambda q, k, v, mask: dict(v=v.to("meta")), "v is on meta"),
        (lambda q, k, v, mask: dict(out=q), "out overlaps another tensor"),
        (lambda q, k, v, mask: dict(out=torch.empty(2, 6, 7, 24).transpose(1, 2)), "out is not contiguous"),
        (lambda q, k, v, mask: dict(q=q.clone().requires_grad_()), "q wants a gradient"),
    ]),
    "triton": (F32, [
        (lambda q, k, v, mask: dict(q=q[0]), r"q and k have shapes \[7, 6, 24\].*accepted are \[B, T, H, D\]"),
        (lambda q, k, v, mask: dict(q=q[:, :, :5]), "5 query heads over 2 KV heads of 83 keys; accepted is at least one"),
        (lambda q, k, v, mask: dict(k=k[:, :0]), "KV heads of 0 keys; accepted is at least one key"),
        (lambda q, k, v, mask: dict(v=v[:, 1:]), r"v has shape \[2, 82, 2, 24\]; accepted is \[2, 83, 2, 24\]"),
        (lambda q, k, v, mask: dict(mask=mask.float()), r"mask is torch.float32, .*accepted is torch.bool, \[2, 7, 83\]"),
        (lambda q, k, v, mask: dict(q=q.double()), "q is torch.float64; accepted are float32, bfloat16, float16"),
        (lambda q, k, v, mask: dict(k=k.repeat_interleave(2, 3)[..., ::2]), "the last dimension of k is strided"),
        (lambda q, k, v, mask: {n: zeros_like(x, 136) for n, x in (("q", q), ("k", k), ("v", v))},
         "a head size of 160 has no tile; accepted are 1 to 128"),
    ]),
    "cuda": (BF16, [
        (lambda q, k, v, mask: dict(q=q.float()), "q is float32, k bfloat16, v bfloat16; accepted is q in bfloat16 or"),
        (lambda q, k, v, mask: dict(k=k.half()), "q is bfloat16, k float16, v bfloat16"),
        (lambda q, k, v, mask: dict(k=k.float()), "q is bfloat16, k float32, v bfloat16"),
        (lambda q, k, v, mask: dict(q=q[0]), r"accepted are \[B, T, H, D\]"),
        (lambda q, k, v, mask: dict(q=q[:, :, :5]), "multiple of the KV heads"),
        (lambda q, k, v, mask: dict(k=k[:, :0]), "at least one key"),
        (lambda q, k, v, mask: dict(q=q[..., :20], k=k[..., :20], v=v[..., :20]),
         "head size 20; accepted are multiples of 8 up to 128"),
        (lambda q, k, v, mask: dict(v=v[:, :82]), r"v has shape \[2, 82, 2, 24\]; accepted is \[2, 83, 2, 24\]"),
        (lambda q, k, v, mask: dict(k=turned(k)), r"k has strides .*; accepted are elements of a head side by side"),
        (lambda q, k, v, mask: dict(k=zeros_like(k, 4)[..., :24]), "k has strides .* at multiples of 16 bytes"),
        (lambda q, k, v, mask: dict(v=zeros_like(v, 8)[..., 4:28]), "v begins at an address that is no multiple of 16"),
        (lambda q, k, v, mask: dict(q=zeros_like(q, 1)[..., :24]), "q has strides .* at multiples of 4 bytes"),
        (lambda q, k, v, mask: dict(mask=mask[0]), r"mask has shape \[7, 83\]; accepted is \[2, 7, 83\]"),
        (lambda q, k, v, mask: dict(mask=mask.float()), "mask is float32; accepted: bool"),
        (lambda q, k, v, mask: dict(v=v.to("meta")), "v is on meta"),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("backend", [CPU[0], TRITON, CUDA], indirect=True)
def test_wrong_arguments_are_named(backend: str) -> None:
    dtype, refused = REFUSED[backend]
    call = cpu.attention if backend == "cpu" else module(backend).masked_attention
    given = {n: x.to(device_of(backend)) for n, x in inputs(SMALL, (dtype, dtype)).items()}
    for change, match in refused:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
            call(**{**given, **change(**given)})
