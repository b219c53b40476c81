"""Every instruction that the emulator knows, in kernels of one kind each, against what CUDA's manuals say of it."""

import re

import pytest
import torch
from simt.emulator import build

PRIMITIVES = (
    "mma_bf16",
    "mma_fp16",
    "ldmatrix",
    "ldmatrix_trans",
    "shuffles",
    "votes",
    "ring_of_copies",
    "producer_and_consumer",
    "relay",
    "grid_barriers",
    "last_block_sums",
    "atomics",
    "neighbours",
    "indices",
    "widen_bf16",
    "widen_fp16",
    "narrow_bf16",
    "narrow_fp16",
    "bf16_products",
    "vectors",
    "cluster_sums",
)
SEEDS = (0, 1, 2)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
lane = torch.arange(32, dtype=torch.int32)


@pytest.fixture(params=SEEDS)
def seed(request):
    return request.param


def halves(words):
    return words.view(torch.int16).to(torch.int32) & 0xFFFF


@pytest.mark.parametrize("kind", DTYPES)
def test_mma(planted, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(16, 16, generator=generator).to(DTYPES[kind])
    b = torch.randn(16, 8, generator=generator).to(DTYPES[kind])
    d = torch.randn(16, 8, generator=generator)
    given = torch.cat([a.view(torch.int16).reshape(-1), b.view(torch.int16).reshape(-1)])
    got, _ = planted.run(f"mma_{kind}", d, given, seed)
    # fp64 holds the products exactly and their sum to within 1e-15, so the result has the bits of the rounded truth.
    assert torch.equal(got.view(torch.float32).reshape(16, 8), (a.double() @ b.double() + d.double()).float())


def test_mma_of_infinities(planted):
    a, b, d = torch.zeros(16, 16), torch.zeros(16, 8), torch.zeros(16, 8)
    a[2, 3], b[3, 4], a[5, 6], d[5, 0] = torch.inf, 2.0, torch.nan, torch.inf
    given = torch.cat([x.bfloat16().view(torch.int16).reshape(-1) for x in (a, b)])
    got = planted.run("mma_bf16", d, given)[0].view(torch.float32).reshape(16, 8)
    assert got[2, 4] == torch.inf and got[2, 0].isnan() and got[5].isnan().all()
    assert (got[[0, 1, 3, 4, *range(6, 16)]] == 0).all()


def test_ldmatrix(planted, seed):
    # Matrix m is rows 8 m to 8 m + 7; lane i gets row i / 4, columns 2 (i % 4) and the next.
    tiles = torch.arange(256, dtype=torch.int32).reshape(4, 8, 8)
    for name, matrices in (("ldmatrix", tiles), ("ldmatrix_trans", tiles.transpose(1, 2))):
        got = halves(planted.run(name, 128, seed=seed)[0]).reshape(32, 4, 2)
        assert torch.equal(got, matrices.reshape(4, 32, 2).transpose(0, 1))


def test_shuffles(planted, seed):
    got = planted.run("shuffles", 288, seed=seed)[0].reshape(9, 32)
    position = lane % 16
    want = [
        torch.full_like(lane, 7),
        lane // 8 * 8 + (lane + 3) % 8,
        torch.where(lane >= 5, lane - 5, lane),
        torch.where(position + 3 < 16, lane + 3, lane),
        lane ^ 12,
        lane ^ 1,
        torch.full_like(lane, 31),
        torch.where(lane < 16, lane ^ 1, lane ^ 2),
        torch.where(lane // 8 % 2 == 1, lane ^ 8, lane),
    ]
    assert torch.equal(got, torch.stack(want))


def test_votes(planted, seed):
    got = planted.run("votes", 160, seed=seed)[0].reshape(5, 32)
    ballot = sum(1 << i for i in range(0, 32, 3))
    assert (got[0].long() & 0xFFFFFFFF == ballot).all()
    assert (got[1] == 1).all() and (got[2] == 0).all() and (got[3] == 1).all()
    assert (got[4, :20] == 0xFFFFF).all()


def test_ring_of_copies(planted, seed):
    given = torch.randint(0, 1000, (9, 64), dtype=torch.int32)
    got = planted.run("ring_of_copies", 9 * 64, given, seed)[0].reshape(9, 64)
    want = given.sum(1, dtype=torch.int32)
    want[8] = 0  # not wanted: zeros
    assert torch.equal(got, want[:, None].expand(9, 64))


def test_named_barriers(planted, seed):
    got = planted.run("producer_and_consumer", 256, seed=seed)[0].reshape(4, 64)
    want = 100 * torch.arange(4)[:, None] + torch.arange(63, -1, -1)
    assert torch.equal(got.long(), want)
    counts = planted.module.statistics()
    assert counts["named_barriers"] == 12 and counts["block_barriers"] == 0 and counts["threads"] == 128


def test_relay_between_barriers(planted, seed):
    assert torch.equal(planted.run("relay", 32, seed=seed)[0], 31 - lane)


def test_grid_barriers(planted, seed):
    given = torch.zeros(6, 6, 64, dtype=torch.int32)
    given[0] = torch.randint(0, 100, (6, 64))
    got = planted.run("grid_barriers", given, 1, seed)[0].reshape(6, 6, 64)
    want = given[0]
    for step in range(1, 6):
        want = want.roll(-1, 0).roll(-1, 1) + 1
        assert torch.equal(got[step], want)
    assert planted.module.statistics()["counter_adds"] == 30


def test_fences_and_atomics(planted, seed):
    sums, ticket = planted.run("last_block_sums", 1 + 7 * 33, 1, seed)
    assert sums[0] == 7 * 33 and ticket[0] == 7


def test_atomics(planted, seed):
    start = torch.zeros(10, dtype=torch.int32)
    start[4] = 1000
    got = planted.run("atomics", start, 1, seed)[0]
    assert got[[0, 1, 3, 4, 5, 6]].tolist() == [120, -240, 119, 0, 77, 9]
    assert got[2:3].view(torch.float32) == 60 and got[8:10].view(torch.int64) == 120 << 32


def test_neighbours_in_a_word_are_no_race(planted, seed):
    got = planted.run("neighbours", 96, seed=seed)[0]
    assert torch.equal(halves(got[:16]), lane) and torch.equal(got[64:], lane ^ 1)


def test_indices(planted, seed):
    got = planted.run("indices", 12 * 30, seed=seed)[0].reshape(12, 30)
    assert torch.equal(got.long(), torch.arange(12)[:, None] * 65536 + torch.arange(30))


@pytest.mark.parametrize("kind", DTYPES)
def test_widening_of_every_half(planted, kind):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    got = planted.run(f"widen_{kind}", 65536, every)[0].view(torch.float32)
    want = every.view(DTYPES[kind]).float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()].view(torch.int32), want[~want.isnan()].view(torch.int32))


def awkward_floats(dtype):
    """4096 floats: any bits, halfway between two values of the dtype, the ends of its range."""
    generator = torch.Generator().manual_seed(3)
    any_bits = (
        torch.randint(-(2**31), 2**31 - 1, (2048,), generator=generator).to(torch.int32).view(torch.float32)
    )
    some = torch.randint(-32768, 32767, (1024,), generator=generator).to(torch.int16).view(dtype)
    above = (some.view(torch.int16) + 1).view(dtype)
    halfway = (some.double() / 2 + above.double() / 2).float()
    info = torch.finfo(dtype)
    ends = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, info.max, info.tiny, info.tiny / 2, 2.0**-24, 65520.0]
    )
    ends = torch.cat([ends, ends * (1 + 2**-9), ends * (1 + 2**-12), ends * (1 - 2**-10)])
    rest = torch.randn(4096 - 3072 - len(ends), generator=generator) * info.tiny * 100
    return torch.cat([any_bits, halfway, ends, rest])


@pytest.mark.parametrize("kind", DTYPES)
def test_rounding(planted, kind):
    given = awkward_floats(DTYPES[kind])
    got = halves(planted.run(f"narrow_{kind}", 4096, given)[0]).reshape(-1, 2).to(torch.int16)
    for column, source in ((0, given), (1, -given)):
        have, want = got[:, column].contiguous().view(DTYPES[kind]), source.to(DTYPES[kind])
        assert torch.equal(have.isnan(), want.isnan())
        assert torch.equal(have[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def test_bf16_products(planted):
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(1024, 2, 2, generator=generator).bfloat16()
    given[0], given[1, 0, 0] = -0.0, torch.inf
    got = planted.run("bf16_products", 1024, given)[0].view(torch.bfloat16).reshape(1024, 2)
    assert torch.equal(got.view(torch.int16), (given[:, 0] * given[:, 1]).view(torch.int16))


def test_vectors(planted, seed):
    given = torch.randn(32, 4)
    got = planted.run("vectors", 256, given, seed)[0].view(torch.float32)
    want = given.clone()
    want[:, 0] += 1
    assert torch.equal(got[:128].reshape(32, 4), want) and torch.equal(got[128:].reshape(32, 4), given)


def test_cluster_sums(planted, seed):
    """In the order of the ranks: 1, 2, 3 and 4, each doubled as often as others follow it; times the thread's number."""
    got = planted.run("cluster_sums", 8 * 64, seed=seed)[0].reshape(8, 64)
    assert (got == (8 + 8 + 6 + 4) * torch.arange(1, 65)).all()


def test_settled_memory_may_be_read_early(planted):
    """By a launch that begins while others still run; what is not settled may not (test_emulator_errors.py)."""
    a, b = torch.zeros(2, 64, dtype=torch.int32)
    planted.module.configure(compute_capability=90)
    planted.module.forget()
    planted.module.allow(a.data_ptr(), 256)
    planted.module.allow(b.data_ptr(), 256, settled=True)
    planted.module.run("read_too_early", False, a.data_ptr(), b.data_ptr())
    with pytest.raises(RuntimeError, match="read at global byte .* before griddepcontrol.wait"):
        planted.module.run("read_too_early", False, b.data_ptr(), a.data_ptr())


def test_the_seed_decides_the_order(planted):
    """The same seed is the same run; another one is another."""
    order = []
    for seed in (4, 4, 5):
        planted.run("shuffles", 288, seed=seed)
        planted.run("grid_barriers", 6 * 6 * 64, 1, seed)
        order.append(planted.module.statistics())
    assert order[0] == order[1] and order[0] != order[2]


def test_what_is_allowed_is_forgotten(planted):
    """A launch, and others right after it, may touch what was allowed; the next allow() begins anew."""
    old, new = torch.zeros(2, 360, dtype=torch.int32)
    planted.module.forget()
    planted.module.allow(old.data_ptr(), 4 * 360)
    planted.module.run("indices", True, old.data_ptr(), 0)
    # Another launch comes after the first: what that wrote is no race.
    planted.module.run("atomics", True, old.data_ptr(), 0)
    planted.module.allow(new.data_ptr(), 4 * 360)
    planted.module.run("indices", True, new.data_ptr(), 0)
    with pytest.raises(RuntimeError, match="out-of-bounds global write"):
        planted.module.run("indices", True, old.data_ptr(), 0)


def test_the_imaginary_gpu(emulator):
    emulator.configure(multiprocessors=5, compute_capability=90, shared_bytes_per_block=1 << 16)
    found = emulator.device()
    assert (found["compute_capability"], found["multiprocessors"]) == (90, 5)
    assert found["shared_bytes_per_block"] == 65536 and emulator.device_count() == 1


@pytest.mark.parametrize(
    ("missing", "said"),
    [("g++", "no g++: install"), ("objcopy", "no objcopy: install"), ("ninja", "no ninja: pip")],
)
def test_without_the_tools_tests_are_skipped(monkeypatch, missing, said):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        build.shutil, "which", lambda name, path=None: None if name == missing else f"/bin/{name}"
    )
    with pytest.raises(build.Unavailable, match=re.escape(said)):
        build.tools()


def test_what_does_not_compile_is_no_skip(tmp_path, planted):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void broken() { undeclared(); }")
    with pytest.raises(RuntimeError, match="do not compile for the emulator(.|\n)*undeclared"):
        build.load("_broken", [source], [])
