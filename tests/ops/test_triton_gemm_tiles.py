"""Tiles of the Triton products: K shared between programs, shared memory of every target, work for every multiprocessor."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
from support.contract import check, inputs_in, run
from support.gemms import F16, F32, TRITON, inputs_of, module, with_tile
from support.guarded import DEVICE

from smolvla_fast.kernels import common, cost_model, counters, tuning
from smolvla_fast.ops.select import reference_ops

pytestmark = pytest.mark.triton
SPLIT = ("linear_residual", "pixel_shuffle_linear")


@pytest.mark.parametrize("op", SPLIT)
@pytest.mark.parametrize("split", [1, 2, 3, 5])
def test_split_k(op, split, monkeypatch):
    """Any number of programs a tile, up to one for each step along K, gives the sum and leaves counters at zero."""
    case = {
        "linear_residual": dict(rows=17, inputs=130, outputs=35),
        "pixel_shuffle_linear": dict(N=2, side=8, width=9, factor=4, outputs=35),
    }[op]
    with_tile(monkeypatch, op, split=split, depth=32)
    workspaces = []

    def recorded(*args):
        workspaces.append(common.split_workspace(*args))
        return workspaces[-1]

    monkeypatch.setattr(module(op), "split_workspace", recorded)
    for dtype in (F32, F16):
        check(reference_ops(), TRITON, op, case, dtype, device=DEVICE)
    assert len(workspaces) == (0 if split == 1 else 4), "without a split there is nothing to wait for"
    for partials, arrivals in workspaces:
        assert not arrivals.any() and not partials.isnan().any()


@pytest.mark.skipif(triton_by.CAPABILITY is None, reason="a seed orders the programs of the machine alone")
@pytest.mark.parametrize("op", SPLIT)
def test_bits_do_not_depend_on_arrival(op, monkeypatch):
    from simt.ptx.launcher import machine

    with_tile(monkeypatch, op, split=4, depth=16)
    inputs = inputs_of(op, F32, dict(rows=5, inputs=130, outputs=35) if op == "linear_residual" else None)
    found = []
    for seed in range(4):
        with machine(triton_by.CAPABILITY, seed):
            found.append(run(TRITON, op, inputs)["y"])
    assert all(torch.equal(each, found[0]) for each in found)


def test_counters_are_shared_by_nothing_that_may_run_at_once(monkeypatch):
    """Eager launches of a stream have one set; another stream and every captured launch have their own."""
    zeros, state = torch.zeros, SimpleNamespace(stream=1, capturing=False)
    stream = lambda index: SimpleNamespace(cuda_stream=state.stream, synchronize=lambda: None)  # noqa: E731
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(counters, "_of_device", {})
    device = torch.device("cuda", 0)

    def take(stream, capturing, tiles=12):
        state.stream, state.capturing = stream, capturing
        got = counters.arrivals(tiles, device)
        return None if got is None else range(got.data_ptr(), got.data_ptr() + 4 * got.numel())

    def apart(a, b):
        return a.stop <= b.start or b.stop <= a.start

    assert take(1, capturing=True) is None, "nothing is zeroed inside a capture but by the capture itself"
    first = take(1, capturing=False)
    assert len(first) >= 48 and take(1, capturing=False) == first
    others = [take(2, capturing=False), *(take(1, capturing=True) for _ in range(3))]
    others.append(take(1, capturing=False, tiles=5000))
    for i, one in enumerate(others):
        assert all(apart(one, other) for other in (first, *others[:i]))
    assert take(1, capturing=True, tiles=counters.Counters.NUMBER) is None


@pytest.mark.gpu
def test_graphs_replayed_at_once_keep_their_bits(monkeypatch):
    with_tile(monkeypatch, "linear_residual", split=4)
    kernel = module("linear_residual").linear_residual
    args = [
        {n: v.cuda() for n, v in inputs_in("linear_residual", dict(rows=50, inputs=2048, outputs=720), F16, seed)[0].items()}
        for seed in (0, 1)
    ]  # fmt: skip
    want = [kernel(**a) for a in args]
    graphs, outs = [torch.cuda.CUDAGraph() for _ in args], []
    for graph, a in zip(graphs, args, strict=True):
        with torch.cuda.graph(graph):
            outs.append([kernel(**a) for _ in range(20)])
    streams = [torch.cuda.Stream() for _ in args]
    for _ in range(50):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for ys, y in zip(outs, want, strict=True):
        assert all(torch.equal(other, y) for other in ys)


# rows, inputs, outputs, bytes of x, keywords: SmolVLA's own products, in bf16 with an fp32 residual stream.
PRODUCTS = {
    "vision qkv": (2048, 768, 768, 2, {}),
    "vision up": (2048, 768, 3072, 2, {}),
    "vision down": (3072, 3072, 768, 2, dict(residual=True)),
    "connector": (128, 12288, 960, 2, dict(split=True)),
    "prefix o": (177, 960, 960, 2, dict(split=True, residual=True)),
    "prefix swiglu": (177, 960, 2560, 4, dict(products=2)),
    "prefix qkv": (177, 960, 32, 4, dict(products=2, segments=25)),
    "expert o": (50, 960, 720, 2, dict(split=True, residual=True)),
    "expert down": (50, 2048, 720, 2, dict(split=True, residual=True)),
    "expert swiglu": (50, 720, 2048, 4, dict(products=2)),
    "expert qkv": (50, 720, 32, 4, dict(products=2, segments=25)),
    "expert q": (50, 720, 32, 4, dict(products=2, segments=15)),
    "state": (1, 32, 960, 4, {}),
    "one": (1, 1, 1, 4, {}),
}


@pytest.mark.parametrize("cc", [75, 80, 86, 87, 89, 90, 100, 103, 120, 121, 70])
@pytest.mark.parametrize("weight_bytes", [2, 4])
def test_tiles_fit_the_target(cc, weight_bytes):
    for name, (rows, inputs, outputs, x_bytes, keywords) in PRODUCTS.items():
        products = keywords.get("products", 1)
        for tile in cost_model.gemm_tiles(rows, inputs, outputs, cc, x_bytes, weight_bytes, **keywords):
            needed = cost_model.shared_bytes(tile, cc, x_bytes, weight_bytes, products)
            assert needed <= cost_model.target(cc).shared_bytes, f"{name}: {tile}"
            assert min(tile.rows, tile.cols, tile.depth) >= 16, "what a product on tensor cores needs"
            assert tile.split == 1 or (keywords.get("split") and tile.split <= -(-inputs // tile.depth))
            # fp32 sums and, without tensor cores, operands are registers: 255 a thread.
            assert tile.rows * tile.cols * products <= 32 * tile.warps * 128


@pytest.mark.parametrize("cc", [75, 80, 90, 120])
def test_candidates_differ_in_what_a_program_computes(cc):
    """Of each rows x cols one, for a measurement of tiles that differ in less finds noise."""
    for name, (rows, inputs, outputs, x_bytes, keywords) in PRODUCTS.items():
        tiles = cost_model.gemm_tiles(rows, inputs, outputs, cc, x_bytes, 2, **keywords)
        sides = [(tile.rows, tile.cols) for tile in tiles]
        assert len(set(sides)) == len(sides) <= 6, name
        assert len(sides) >= (1 if name == "one" else 3), name


def test_an_h100_has_work_everywhere():
    """At least a third of its 132 multiprocessors in every product of an action chunk, for more programs read more through
    L2 (docs/gpu-account.md); large tiles in vision."""
    for name, (rows, inputs, outputs, x_bytes, keywords) in PRODUCTS.items():
        tile = tuning.gemm_tile(rows, inputs, outputs, 90, x_bytes, 2, **keywords)
        tiles = -(-rows // tile.rows) * -(-outputs // tile.cols) * keywords.get("segments", 1) * tile.split
        if name.startswith("expert"):
            assert 44 <= tiles <= 132, f"{name}: {tiles} programs"
        if name.startswith("vision"):
            assert tile.rows == 128 and tile.cols >= 128 and tile.warps == 8
