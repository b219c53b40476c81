"""The compiled attention against fp64, at every instruction level that this processor runs.

Tolerance: the worst error may be twice that of eager torch in the same dtype. Both round the same quantities,
in another order; a factor of two separates that from a lost bit.
"""

import pytest
import torch
from support.processors import LEVELS

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.reference.masked_attention import CASES, make_inputs, masked_attention

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
AT_LEVELS = pytest.mark.parametrize("level", LEVELS)


def sizes(*values):
    return dict(zip("BTSHKD", values, strict=True))


# One query, few keys, sizes off every tile, heads that fill no vector or several panels, H = K and H = 3K.
ODD = [
    sizes(1, 1, 3, 1, 1, 24),
    sizes(2, 7, 65, 4, 4, 40),
    sizes(1, 13, 127, 6, 2, 80),
    sizes(1, 9, 31, 3, 1, 128),
    sizes(1, 5, 17, 2, 1, 7),
    sizes(1, 3, 34, 2, 2, 200),
    sizes(1, 4, 1100, 2, 1, 64),
]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(case, dtype, seed=0):
    return make_inputs(case, dtype, torch.Generator().manual_seed(seed))


def eager(q, k, v, mask, dtype):
    q, k, v = (x.to(dtype) for x in (q, k, v))
    mask = torch.ones(q.shape[0], q.shape[1], k.shape[1], dtype=torch.bool) if mask is None else mask
    return masked_attention(q, k, v, mask).view(q.shape)


def run(q, k, v, mask=None):
    """Into poisoned memory, so that an element never written shows."""
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    assert cpu.attention(q, k, v, mask, out=out) is out
    return out


def assert_as_exact_as_eager(got, q, k, v, mask, dtype):
    truth = eager(q, k, v, mask, torch.float64)
    allowed = 2 * (eager(q, k, v, mask, dtype).double() - truth).abs().max()
    assert (got.double() - truth).abs().max() <= allowed


@AT_LEVELS
@DTYPES
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("case", [*CASES, *ODD], ids=lambda case: "x".join(map(str, case.values())))
def test_error_against_fp64(case, masked, dtype, level):
    args = inputs(case, dtype)
    args["mask"] = args["mask"] if masked else None
    with cpu.instruction_level(level):
        assert_as_exact_as_eager(run(**args), **args, dtype=dtype)


@AT_LEVELS
@DTYPES
def test_a_row_that_sees_nothing_averages_all_keys(dtype, level):
    args = inputs(sizes(2, 7, 19, 6, 2, 24), dtype)
    args["mask"][:, 3] = False
    with cpu.instruction_level(level):
        out = run(**args)
    mean, rtol = (
        args["v"].float().mean(1).repeat_interleave(3, 1),
        {torch.float32: 1e-5, torch.bfloat16: 8e-3},
    )
    # Keys weigh exactly 1 each, so what is left is the rounding of 19 additions and of the result.
    torch.testing.assert_close(out[:, 3].float(), mean, rtol=rtol[dtype], atol=1e-6)
    assert_as_exact_as_eager(out, **args, dtype=dtype)


@AT_LEVELS
@DTYPES
def test_views_of_a_cache_and_of_a_fused_projection(dtype, level):
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(2, 11, 6 + 5, 16, generator=generator).to(dtype)
    # No two strides of k and v are alike, and NaN lies all around them.
    keys, values = (torch.full(size, float("nan"), dtype=dtype) for size in ((2, 40, 7, 24), (2, 35, 3, 17)))
    k, v = keys[:, 3:36, 2:4, :16], values[:, 1:34, 1:, :16]
    for view in (k, v):
        view.copy_(torch.randn(view.shape, generator=generator))
    key_mask = (torch.rand(2, 33, generator=generator) < 0.7)[:, None].expand(2, 11, 33)
    spread = torch.zeros(2, 11, 66, dtype=torch.bool)
    spread[:, :, ::2] = key_mask
    args = {"q": fused[:, :, 2:8], "k": k, "v": v}
    with cpu.instruction_level(level):
        assert_as_exact_as_eager(run(**args, mask=key_mask), **args, mask=key_mask, dtype=dtype)
        assert torch.equal(run(**args, mask=spread[:, :, ::2]), run(**args, mask=key_mask))
        dense = {name: x.contiguous() for name, x in args.items()}
        assert torch.equal(run(**dense, mask=key_mask), run(**args, mask=key_mask))


@AT_LEVELS
@DTYPES
def test_nan_comes_out_where_it_went_in(dtype, level):
    args = inputs(sizes(2, 7, 19, 6, 2, 24), dtype)
    for name, where, seen in (
        ("q", (1, 2, 3), (1, 2, 3)),
        ("k", (1, 18, 1), (1, -1, 4)),
        ("v", (0, 18, 1), (0, -1, 4)),
    ):
        poisoned = {**args, name: args[name].clone()}
        poisoned[name][(*where, 5)] = float("nan")
        with cpu.instruction_level(level):
            out, clean = run(**poisoned), run(**args)
        assert clean.isfinite().all()
        assert out[seen].isnan().any()
        expected = eager(**poisoned, dtype=dtype).isnan()
        assert torch.equal(out.isnan(), expected)


@AT_LEVELS
@DTYPES
def test_large_scores_neither_overflow_nor_lose_the_winner(dtype, level):
    q, k = torch.zeros(1, 2, 1, 8, dtype=dtype), torch.zeros(1, 5, 1, 8, dtype=dtype)
    q[0, :, 0, 0] = torch.tensor([1e15, -1e15], dtype=dtype)
    k[0, :, 0, 0] = torch.tensor([-1e15, 0, 0, 1e15, 0], dtype=dtype)
    v = torch.arange(40, dtype=torch.float32).view(1, 5, 1, 8).to(dtype)
    with cpu.instruction_level(level):
        assert torch.equal(run(q, k, v)[0, :, 0], v[0, [3, 0], 0])


@AT_LEVELS
@DTYPES
def test_bits_do_not_depend_on_threads_or_runs(dtype, level, threads):
    args = inputs(sizes(2, 50, 227, 6, 2, 64), dtype)
    results = []
    with cpu.instruction_level(level):
        for count in (1, 2, 3, 7, 1, 2):
            threads(count)
            results.append(run(**args))
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_empty_batches_and_queries_give_empty_results():
    for shape in ((0, 4, 3, 8), (2, 0, 3, 8)):
        keys = torch.randn(shape[0], 5, 3, 8)
        assert cpu.attention(torch.randn(shape), keys, keys).shape == shape


def test_overlap_is_judged_by_the_memory_that_views_reach():
    q, k = torch.randn(1, 7, 2, 8), torch.randn(1, 19, 2, 8)
    memory = torch.ones(4096, dtype=torch.uint8)
    # Expanded over seven queries, the mask still owns 19 bytes; the output right behind it is free.
    mask = memory[:19].view(torch.bool)[None, None].expand(1, 7, 19)
    out = memory[64 : 64 + q.nbytes].view(torch.float32).view(q.shape)
    assert torch.equal(cpu.attention(q, k, k, mask, out=out), cpu.attention(q, k, k))
    # A view of every fourth key reaches four times as far as it has elements.
    cache = torch.zeros(1, 4 * 19, 2, 8)
    inside = cache.flatten()[2 * k.numel() : 2 * k.numel() + q.numel()].view(q.shape)
    with pytest.raises(ValueError, match=r"out overlaps another tensor"):
        cpu.attention(q, cache[:, ::4], k, out=inside)


def test_wrong_arguments_are_named():
    args = inputs(sizes(2, 7, 19, 6, 2, 24), torch.float32)
    q, k = args["q"], args["k"]

    def refused(error, match, **changes):
        with pytest.raises(error, match=match):
            cpu.attention(**{**args, **changes})

    refused(TypeError, "q has dtype torch.float16; accepted are torch.float32, torch.bfloat16", q=q.half())
    refused(TypeError, "k has dtype torch.bfloat16, q has torch.float32", k=k.bfloat16())
    refused(TypeError, "mask has dtype torch.float32, a mask has torch.bool", mask=args["mask"].float())
    refused(ValueError, r"\[B, T, H, D\]", q=q[0])
    refused(ValueError, "H a multiple of K", q=q[:, :, :5])
    refused(ValueError, "S and D must be at least 1", k=k[:, :0])
    refused(ValueError, r"v has shape \[2, 18, 2, 24\]; accepted is \[2, 19, 2, 24\]", v=args["v"][:, :18])
    refused(ValueError, r"k has shape \[1, 19, 2, 24\]", k=k[:1])
    refused(ValueError, r"mask has shape \[7, 19\]; accepted is \[2, 7, 19\]", mask=args["mask"][0])
    turned = k.transpose(1, 3).contiguous().transpose(1, 3)
    refused(ValueError, "k has strides .*; the last must be 1", k=turned)
    refused(ValueError, "v is on meta", v=args["v"].to("meta"))
    refused(ValueError, r"out overlaps another tensor", out=q)
    refused(ValueError, "out is not contiguous", out=torch.empty(2, 6, 7, 24).transpose(1, 2))
    refused(RuntimeError, "q wants a gradient", q=q.clone().requires_grad_())
