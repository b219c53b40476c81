"""Attention in 8-bit integers at every instruction level: its bits, its error, and which heads are left to fp32."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from support.int8_levels import at_level, emulate
from torch import Tensor

from smolvla_fast.ops import extension, processor
from smolvla_fast.ops.cpu import int8, int8_attention
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.cpu.int8_attention import LEVELS, Attended, Heads, Seen, spread
from smolvla_fast.ops.select import backend_ops

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
ALL = float("inf")
# Batch, queries, keys, query heads, KV heads, width of a head. Vision, prefix, cross and suffix with fewer heads; sizes of
# one, off every tile, vector, word and block; heads that fill no word, a part of a panel and several panels.
CASES = [
    (1, 70, 1024, 2, 2, 64), (1, 177, 177, 6, 2, 64), (1, 50, 177, 3, 1, 64), (1, 50, 227, 3, 1, 64),
    (2, 7, 83, 6, 2, 24), (1, 1, 1, 1, 1, 1), (3, 1, 33, 4, 4, 8), (1, 3, 64, 2, 2, 200), (1, 9, 65, 3, 1, 128),
    (1, 25, 63, 2, 2, 7), (1, 5, 129, 2, 1, 256), (1, 13, 128, 2, 1, 96),
]  # fmt: skip
SIZES = pytest.mark.parametrize("sizes", CASES, ids=lambda sizes: "x".join(map(str, sizes)))


@pytest.fixture(params=LEVELS)
def attention(request: pytest.FixtureRequest) -> Callable[..., Attended]:
    return at_level(request.param)


def operands(sizes: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Keys with a mean far from zero; a mask with a row that sees nothing, one that sees one key, and a block unseen."""
    batch, queries, keys, heads, kv_heads, dim = sizes
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, queries, heads, dim, generator=generator)
    k, v = (torch.randn(batch, keys, kv_heads, dim, generator=generator) for _ in range(2))
    mask = torch.rand(batch, queries, keys, generator=generator) > 0.3
    mask[:, 0] = False
    mask[:, -1] = False
    mask[:, -1, keys // 2] = True
    mask[:, queries // 2, :64] = False
    return {"q": q, "k": k + 3 * torch.randn(dim, generator=generator), "v": v, "mask": mask}


def emulated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    out, group = torch.empty_like(q), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for head in range(k.shape[2]):
            of = slice(head * group, (head + 1) * group)
            seen = None if mask is None else mask[b]
            out[b, :, of] = emulate(q[b, :, of], k[b, :, head], v[b, :, head], seen)
    return out


@cache
def scheme(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """With the mask and without, for all levels."""
    values = operands(sizes)
    return emulated(**values), emulated(**{**values, "mask": None})


def in_fp64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = torch.where(mask[:, None], scores, torch.finfo(torch.float32).min)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.processor
@SIZES
def test_every_level_has_the_bits_of_the_scheme(attention: Any, sizes: tuple[int, ...]) -> None:
    """Sums of integers are exact and what is fp32 has one order, so nothing is allowed."""
    values, (masked, whole) = operands(sizes), scheme(sizes)
    assert torch.equal(attention(**values, most_error=ALL).out, masked)
    del values["mask"]
    assert torch.equal(attention(**values, most_error=ALL).out, whole)


def test_outlier_channels_and_sharp_rows_have_these_bits_too(attention: Any) -> None:
    """Forced into 8 bits: the largest integers on both sides, one weight near 1, weights of zero; a query and a key of
    zeros, values of zeros for a whole block."""
    values = operands((2, 9, 150, 4, 2, 40))
    values["q"][..., 3] *= 50
    values["k"][..., 3] *= 50
    values["v"][..., 7] *= 50
    values["q"][0, 1] = 0
    values["k"][0, 5] = 0
    values["v"][1, 64:128] = 0
    assert torch.equal(attention(**values, most_error=ALL).out, emulated(**values))
    largest = {name: torch.full((1, 6, 1, 256), 127.0) for name in "qkv"}
    largest["k"][
        :, ::2
    ] = -127  # q8 = 127, k8 = ±127: sums of 2^22, where instructions of 16 bits saturate at once
    assert torch.equal(attention(**largest, most_error=ALL).out, emulated(**largest))


@SIZES
def test_the_result_is_off_by_no_more_than_it_says(attention: Any, sizes: tuple[int, ...]) -> None:
    """``error`` is the share of rounded scores; probabilities and values of 8 bits add half a step of 1/255 and 1/127 of the
    largest of 64, together below a hundredth of the values."""
    values = operands(sizes)
    values.pop("mask")
    found = attention(**values, most_error=ALL)
    off = found.out.double() - in_fp64(**values)
    size = values["v"].double().square().mean().sqrt()
    assert 0 <= found.error.max() < 0.02
    assert off.square().mean().sqrt() <= (float(found.error.max()) + 0.01) * size


def _rounded(x: Tensor) -> Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).round() * step


@pytest.mark.parametrize(
    ("kind", "loudness"),
    [
        ("independent", 0.5),
        ("independent", 4.0),
        ("masked", 0.5),
        ("masked", 4.0),
        ("low rank", 0.5),
        ("low rank", 1.5),
    ],
)
def test_error_and_spread_are_what_is_counted(attention: Any, kind: str, loudness: float) -> None:
    """Whatever the queries have to do with the keys. Spread within a third: 16 rows of one factor are off by up to
    1/sqrt(32) of it, twice that is 35 %. Error from half to four times what is counted, over which it grows tenfold with
    the loudness: it is of 16 rows too, and leaves out that a row on a single key cannot be moved."""
    values = operands((1, 320, 300, 1, 1, 64), seed=3)
    q, k = values["q"][0, :, 0], values["k"][0, :, 0]
    generator = torch.Generator().manual_seed(4)
    seen = torch.ones(320, 300, dtype=torch.bool)
    if kind == "low rank":  # nearly all of queries and keys along one direction across all channels
        along = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:, :1]
        q.copy_(3 * (q @ along) @ along.t() + 0.05 * q)
        k.copy_(3 * ((k - k.mean(0)) @ along) @ along.t() + 0.05 * k)
    if kind == "masked":
        seen[:, 200:] = False  # loud keys that nobody sees
        k[200:] *= 30
    values["mask"] = seen[None]
    q *= loudness
    found = attention(**values, most_error=ALL)
    q, k, v = q.double(), k.double(), values["v"][0, :, 0].double()
    k = k - k.mean(0)
    hidden = torch.where(seen, 0.0, -torch.inf)
    scores = q @ k.t() / 8
    spread = (
        torch.stack([row[see].var(correction=0) for row, see in zip(scores, seen, strict=True)]).mean().sqrt()
    )
    assert float(found.spread) == pytest.approx(float(spread), rel=0.35)
    off = ((_rounded(q) @ _rounded(k).t() / 8 + hidden).softmax(1) - (scores + hidden).softmax(1)) @ v
    counted = float(off.square().mean().sqrt() / v.square().mean().sqrt())
    assert counted / 2 <= float(found.error) <= 4 * counted


def test_the_spread_of_scores_does_not_depend_on_their_basis(attention: Any) -> None:
    """One rotation of queries and keys leaves all scores as they are; loud ones along one channel show most."""
    values = operands((1, 64, 100, 2, 1, 32))
    for name in "qk":
        values[name][..., 7] *= 5
    values["k"] -= values["k"].mean(1, keepdim=True)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    turned = {**values, "q": values["q"] @ turn, "k": values["k"] @ turn}
    before, after = (attention(**each, most_error=ALL).spread for each in (values, turned))
    assert float(before) > 4 and torch.allclose(before, after, rtol=1e-4)  # sums of 32 and of 100 in fp32


@pytest.mark.parametrize("loud", range(3))
def test_one_loud_query_head_of_a_group_counts(attention: Any, loud: int) -> None:
    values = operands((2, 48, 90, 9, 3, 16))
    quiet = attention(**values, most_error=ALL)
    values["q"][1, :, 3 + loud] *= 20
    found = attention(**values, most_error=ALL)
    assert found.spread[1, 1] > 15 * quiet.spread[1, 1] and found.error[1, 1] > quiet.error[1, 1]
    found.spread[1, 1] = quiet.spread[1, 1]
    assert torch.equal(found.spread, quiet.spread), "another head's"


def test_a_sharp_head_falls_back_alone(attention: Any) -> None:
    values = operands((2, 9, 150, 6, 3, 40))
    values["q"][1, :, 2:4, 5] *= 50  # the queries of KV head 1 of the second sample
    found = attention(**values, most_error=0.02)
    wide = found.error > 0.02
    assert wide.nonzero().tolist() == [[1, 1]]
    want, narrow = cpu.attention(**values), emulated(**values)
    want, narrow = (x.view(2, 9, 3, 2, 40) for x in (want, narrow))
    got = found.out.view(2, 9, 3, 2, 40)
    for b in range(2):
        for head in range(3):
            expected = want if wide[b, head] else narrow
            # The fp32 kernel sums in the order of the level in use, which may be another than this one's.
            if wide[b, head]:
                assert torch.allclose(got[b, :, head], expected[b, :, head], rtol=1e-4, atol=1e-5)
                assert not torch.equal(got[b, :, head], narrow[b, :, head])
            else:
                assert torch.equal(got[b, :, head], expected[b, :, head])


@pytest.mark.parametrize("where", ["q", "k", "v", "masked k"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_is_as_in_fp32(attention: Any, where: str, what: float) -> None:
    values = operands((1, 7, 83, 4, 2, 24))
    if where == "masked k":
        values["mask"][:, :, 40] = False
        values["mask"][:, 0] = values["mask"][
            :, 1
        ]  # a row that sees nothing would average the masked key too
        values["k"][0, 40, 1, 3] = what
    else:
        values[where][0, 5, 1, 3] = what
    found, want = attention(**values, most_error=ALL), cpu.attention(**values)
    broken = 0 if where == "q" else 1  # of two KV heads with two query heads each
    assert not found.error[0, broken].isfinite() and found.error[0, 1 - broken].isfinite()
    assert torch.equal(found.out.isnan(), want.isnan())
    assert (
        bool(want.isnan().any()) == (where != "masked k" and not (where == "k" and what == torch.inf))
        or what == torch.inf
    )


@SIZES
def test_threads_and_strides_change_no_bit(attention: Any, sizes: tuple[int, ...]) -> None:
    values = operands(sizes)
    before = torch.get_num_threads()
    want = attention(**values, most_error=ALL)
    wide = {
        name: torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
        for name, x in values.items()
        if name != "mask"
    }
    for name, x in wide.items():
        x[..., : values[name].shape[-1]] = values[name]
    strided = {name: x[..., : values[name].shape[-1]] for name, x in wide.items()}
    strided["mask"] = values["mask"].transpose(1, 2).contiguous().transpose(1, 2)
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for given in (values, strided):
                assert all(map(torch.equal, attention(**given, most_error=ALL), want))
    finally:
        torch.set_num_threads(before)


def test_nothing_is_left_unwritten_or_written_beside() -> None:
    for sizes in CASES:
        values = operands(sizes)
        whole = torch.full((values["q"].numel() + 128,), torch.nan)
        out = whole[64:-64].view(values["q"].shape)
        int8_attention.attention(**values, most_error=ALL, out=out)
        assert not out.isnan().any() and whole[:64].isnan().all() and whole[-64:].isnan().all()


def test_a_head_too_wide_and_no_queries() -> None:
    values = operands((1, 5, 9, 2, 2, 257))
    found = int8_attention.attention(**values, most_error=ALL)
    # Its error is no larger than another's; the kernel has no room for it all the same.
    assert found.error.max() < 0.02 and torch.equal(found.out, cpu.attention(**values))
    none = int8_attention.attention(values["q"][:, :0], values["k"], values["v"])
    assert none.out.shape == (1, 0, 2, 257)


def test_refuses_what_it_cannot_do() -> None:
    values = operands((1, 5, 9, 2, 2, 8))
    with pytest.raises(
        TypeError, match="int8 attention: q has dtype torch.float64, this kernel has torch.float32"
    ):
        int8_attention.attention(**{**values, "q": values["q"].double()})
    with pytest.raises(TypeError, match="int8 attention: v has dtype torch.bfloat16, q has torch.float32"):
        int8_attention.attention(**{**values, "v": values["v"].bfloat16()})
    with pytest.raises(ValueError, match=r"int8 attention: v has shape \[1, 9, 2, 8\]; accepted"):
        int8_attention.attention(values["q"], values["k"][:, :3], values["v"])


# Where it is taken ----------------------------------------------------------------------------------------------------


def heads_over(**ops: Any) -> Heads:
    table = replace(backend_ops("integers"), **ops)
    return Heads(8, table.attention, table.masked_attention)


@pytest.mark.parametrize(("share", "ahead"), [(0.5, True), (0.97, False), (1.2, False)])
def test_integers_are_taken_where_they_are_ahead(
    share: float, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock of the test's own: with the first call of each slow, as it is, and one of the later ones."""
    clock, calls = [0.0], [0, 0]

    def lasting(i: int, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls[i] += 1
            clock[0] += seconds * (9 if calls[i] in (1, 3) else 1)

        return call

    monkeypatch.setattr(int8_attention.time, "perf_counter", lambda: clock[0])
    assert (int8_attention.why_slower(lasting(0, share), lasting(1, 1.0)) is None) == ahead
    assert calls[0] == calls[1] > 2


@pytest.mark.parametrize("wide", [False, True])
def test_where_integers_do_not_serve_the_table_does(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its choice, whoever that is; scores are measured all the same. Width alone is no sharpness."""
    values = operands((2, 7, 83, 4, 2, 257 if wide else 24))
    asked: list[Any] = []

    def choice(*args: Any, **kwargs: Any) -> Tensor:
        asked.append(args)
        return args[0].flatten(2)

    monkeypatch.setattr(int8_attention, "why_slower", lambda *calls: None if wide else "it is slower")
    heads = heads_over(masked_attention=choice, attention=choice)
    chunk = heads.chunk(1)
    assert torch.equal(chunk.masked_attention(**values), values["q"].flatten(2))
    flat = [values["q"].flatten(2)] * 3
    assert torch.equal(chunk.attention(*flat, 4), flat[0]) and len(asked) == 2
    heads.add(chunk.seen)
    assert (chunk.seen.all, chunk.seen.wide) == (0, 0) and 0.5 < chunk.seen.spread < 30
    reason = heads.fallback_reasons["int8 attention"]
    why = "heads are 257 wide, attention in 8 bits has room for 256" if wide else "it is slower"
    assert reason == f"{why}; scores are measured in the first 8 chunks, then in one of 64"
    narrow = {**values, "q": values["q"].bfloat16()}
    chunk.masked_attention(**narrow)
    assert len(asked) == 3 and heads.chunk(1).seen.spread == 0.0


def test_heads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_attention, "why_slower", lambda *calls: None)
    heads, values = heads_over(), operands((1, 7, 83, 4, 2, 64))
    chunk = heads.chunk(3)
    assert torch.equal(chunk.masked_attention(**values), emulated(**values).flatten(2))
    heads.add(chunk.seen)
    assert not heads.fallback_reasons
    values["q"][:, :, :2] *= 5
    chunk = heads.chunk(3)
    chunk.masked_attention(**values)
    heads.add(chunk.seen)
    assert (heads.seen.chunks, heads.seen.all, heads.seen.wide) == (2, 4, 1)
    assert heads.fallback_reasons["int8 attention"].startswith(
        "1 of 4 heads so far were computed in fp32: 8-bit scores would move"
    )
    assert heads.why_too_sharp(3) is None
    x = operands((1, 7, 9, 2, 2, 48))["q"].flatten(2)
    assert torch.equal(
        heads.chunk(3).attention(x, x, x, 2),
        int8_attention.attention(*[x.unflatten(2, (2, 48))] * 3).out.flatten(2),
    )


def test_one_sharp_head_among_sixteen_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one generation of weights: others start anew, and what a chunk saw of older ones counts no more."""
    monkeypatch.setattr(int8_attention, "why_slower", lambda *calls: "no")
    heads, values = heads_over(), operands((1, 48, 90, 16, 16, 32))
    late, chunk = heads.chunk(1), heads.chunk(1)
    values["q"][:, :, 11] *= 25
    for each in (chunk, late):
        each.masked_attention(**values)
    heads.add(chunk.seen)
    assert re.match(
        r"scores of attention spread by 2\d.*, 8-bit products serve up to 8; chunks",
        str(heads.why_too_sharp(1)),
    )
    assert heads.why_too_sharp(2) is None, "of other weights"
    heads.add(heads.chunk(2).seen)
    heads.add(late.seen)
    assert heads.why_too_sharp(2) is None and heads.why_too_sharp(1) is None
    chunk = heads.chunk(2)
    values["k"][0, 3, 5, 7] = torch.inf
    values["q"][:, :, 11] /= 25
    chunk.masked_attention(**values)
    assert not heads.is_sharp(chunk.seen), "an operand that is not finite says nothing of the weights"


def test_scores_are_measured_at_first_and_then_now_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_attention, "why_slower", lambda *calls: "no")
    heads, values = heads_over(), operands((1, 4, 9, 2, 2, 8))

    def measured(generation: int, count: int) -> list[int]:
        found = []
        for i in range(count):
            chunk = heads.chunk(generation)
            chunk.masked_attention(**values)
            if chunk.seen.spread:
                found.append(i)
            heads.add(chunk.seen)
        return found

    assert measured(1, 140) == [*range(8), 64, 128]
    assert measured(2, 10) == [*range(8)]
    values["q"] *= 5 / spread(**values).max()  # above half of the limit
    assert measured(3, 20) == [*range(20)]
    assert not heads.is_sharp(heads.seen)


def test_threads_lose_no_count_and_time_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, timed, under_way = heads_over(), [], threading.Lock()

    def slowly(*calls: Any) -> None:
        assert under_way.acquire(blocking=False), "two trials at once"
        timed.append([tuple(getattr(found, "out", found).shape) for found in (call() for call in calls)])
        time.sleep(0.05)
        under_way.release()

    monkeypatch.setattr(int8_attention, "why_slower", slowly)
    values, plus = operands((3, 7, 83, 4, 2, 24)), Seen.__add__
    # Other threads run between reading what was seen and writing the sum.
    monkeypatch.setattr(Seen, "__add__", lambda a, b: (time.sleep(1e-4), plus(a, b))[1])

    def work() -> None:
        chunk = heads.chunk(1)
        chunk.masked_attention(**values)
        for _ in range(20):
            heads.add(chunk.seen)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert (heads.seen.chunks, heads.seen.all) == (80, 480)
    # Once, and of all heads, which share the threads.
    assert timed == [[(3, 7, 4, 24), (3, 7, 96)]]


@pytest.mark.processor
def test_the_level_is_one_that_the_processor_has() -> None:
    """Under every mask of ``make test-cpus``: features are read from the system, the level from CPUID, both know limits."""
    here = int8_attention.level()
    needed = {
        "amx": "AMX-INT8",
        "avx512_vnni": "AVX512-VNNI",
        "avx2_vnni": "AVX-VNNI",
        "avx2": "AVX2",
        "baseline": None,
    }[here]
    assert needed is None or needed in processor.features()
    best = extension.load("cpu").levels()[-1]
    if best == "avx2" and "AVX-VNNI" in processor.features():
        assert here == "avx2_vnni"
    if best.startswith("avx512") and "AVX512-VNNI" in processor.features():
        # Linux grants tiles to who asks; elsewhere nobody is asked.
        tiles = sys.platform == "linux" and "AMX-INT8" in processor.features()
        assert here == ("amx" if tiles else "avx512_vnni")
    assert int8.tiles() == (here == "amx")
