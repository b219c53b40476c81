"""The Triton kernels around matrix products: rows, strides, views of the cache, parts left out, and what they refuse."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from support.contract import changed, reference_module, run, to_device, widened
from support.gemms import ATEN, DTYPES, F32, OPS, TRITON, assert_no_worse, inputs_of, module
from support.guarded import DEVICE

from smolvla_fast.ops.select import reference_ops

pytestmark = [
    pytest.mark.triton,
    # Of numpy, which computes the kernels under the interpreter.
    pytest.mark.filterwarnings("ignore:.*(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
CASES_OF_QKV = (
    *reference_module("norm_qkv_rope").CASES[-1:],
    dict(B=2, T=3, M=33, H=4, K=2, D=6),
)


@OPS
def test_nan_stays_in_its_row(op):
    """One NaN in the second row (patch, token, block of patches) of the input: NaN there, nowhere else."""
    inputs = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in inputs_of(op).items()}
    place = {
        "norm_qkv_rope": ("x", 0, 1, 47),
        "cross_kv": ("k", 0, 1, 0, 15),
        "pixel_shuffle_linear": (
            "x",
            0,
            8 + 3,
            47,
        ),  # 8 patches a row, 2 x 2 a block: the second block's last patch
        "patch_embed": ("pixels", 0, 2, 3, 7),  # the last pixel of the second patch of 4 x 4
    }.get(op, ("x", 1, 32))
    inputs[place[0]][place[1:]] = torch.nan
    for name, y in run(TRITON, op, inputs).items():
        rows = y.flatten(0, 1).flatten(1) if y.ndim > 2 else y
        hit = rows.isnan().all(1)
        assert rows[~hit].isfinite().all(), name
        assert hit.nonzero().flatten().tolist() == ([] if (op, name) == ("cross_kv", "y1") else [1]), name


@pytest.mark.parametrize("op", ["linear", "linear_residual", "norm_swiglu"])
def test_leading_dimensions_strided_rows_and_empty_inputs(op):
    inputs = inputs_of(op)
    flat = run(TRITON, op, inputs)["y"]
    rowwise = [name for name in ("x", "residual") if inputs.get(name) is not None]
    if op == "linear":
        rowwise, inputs["residual"] = ["x", "residual"], torch.zeros(5, 47)
    folded = {name: inputs[name][:4].view(2, 2, -1) for name in rowwise}
    y = run(TRITON, op, {**inputs, **folded})["y"]
    assert y.shape == (2, 2, 47) and torch.equal(y.view(4, 47), flat[:4])

    wide = {name: torch.full((5, 3, inputs[name].shape[-1] + 5), torch.nan) for name in rowwise}
    for name, buffer in wide.items():
        buffer[:, 1, :-5] = inputs[name]
    views = {name: buffer[:, 1, :-5] for name, buffer in wide.items()}
    assert torch.equal(run(TRITON, op, {**inputs, **views})["y"], flat)
    weights = {}
    for name, value in inputs.items():
        if name.endswith("weight") and value.ndim == 2:
            weights[name] = torch.cat([value, torch.full_like(value, torch.nan)], dim=1)[:, : value.shape[1]]
    assert torch.equal(run(TRITON, op, {**inputs, **weights})["y"], flat), "rows of a wider matrix"
    empty = {name: inputs[name][:0] for name in rowwise}
    assert run(TRITON, op, {**inputs, **empty})["y"].shape == (0, 47)


@pytest.mark.parametrize("op", ["linear", "linear_residual", "norm_swiglu", "norm_qkv_rope"])
def test_a_product_over_nothing_is_refused(op):
    """A kernel takes its first step along K without asking whether there is one."""
    case = dict(B=1, T=3, M=1, H=2, K=1, D=8) if op == "norm_qkv_rope" else dict(rows=3, inputs=1, outputs=4)
    inputs = inputs_of(op, case=case)
    narrow = {
        name: value[..., :0] if isinstance(value, torch.Tensor) else tuple(part[..., :0] for part in value)
        for name, value in inputs.items()
        if name in ("x", "weight", "weights", "gate_weight", "up_weight")
    }
    if op.startswith("norm"):
        narrow["norm"] = (inputs["norm"][0][:0], inputs["norm"][1])
    with pytest.raises(ValueError, match="a product over 0 inputs has no tile; accepted is 1 and more"):
        run(TRITON, op, {**inputs, **narrow})


def qkv(case, dtype=F32, free=3):
    """Inputs whose keys and values go into NaN-filled caches behind ``free`` slots; the caches themselves."""
    inputs = inputs_of("norm_qkv_rope", dtype, case)
    b, t, kv, d = (case[name] for name in "BTKD")
    caches = [torch.full((b, free + t + 2, kv, d), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    slots = tuple(cache[:, free : free + t] for cache in caches)
    return {**to_device(inputs, DEVICE), "slots": slots}, caches


@DTYPES
@pytest.mark.parametrize("case", CASES_OF_QKV, ids=str)
def test_cache_slots_and_absent_parts(case, dtype):
    """Only the slots are written; leaving out queries, or keys and values, changes no bit of the rest."""
    kernel = module("norm_qkv_rope").norm_qkv_rope
    inputs, caches = qkv(case, dtype)
    q = kernel(**inputs)
    plain = run(TRITON, "norm_qkv_rope", inputs_of("norm_qkv_rope", dtype, case))
    assert torch.equal(q.cpu(), plain["q"])
    for cache, name in zip(caches, ("k", "v"), strict=True):
        assert torch.equal(cache[:, 3:-2].cpu(), plain[name])
        assert cache[:, :3].isnan().all() and cache[:, -2:].isnan().all()

    alone, caches = qkv(case, dtype)
    assert kernel(**changed(alone, {"weights.q": None})) is None
    for cache, name in zip(caches, ("k", "v"), strict=True):
        assert torch.equal(cache[:, 3:-2].cpu(), plain[name])
        assert cache[:, :3].isnan().all() and cache[:, -2:].isnan().all()
    none = {"weights.k": None, "weights.v": None, "slots": None}
    assert torch.equal(kernel(**changed(inputs, none)).cpu(), plain["q"])


def test_one_rope_table_serves_a_whole_batch():
    case = reference_module("norm_qkv_rope").CASES[-1]
    inputs = inputs_of("norm_qkv_rope", F32, case)
    shared = tuple(table[:1].expand_as(table).contiguous() for table in inputs["rope"])
    both = run(TRITON, "norm_qkv_rope", {**inputs, "rope": shared})
    first = tuple(torch.cat([table[:1], torch.full_like(table, torch.nan)])[:1] for table in inputs["rope"])
    one = run(TRITON, "norm_qkv_rope", {**inputs, "rope": first})
    assert all(torch.equal(one[name], both[name]) for name in both)
    apart = tuple(torch.cat([table[:1], torch.zeros_like(table[:1])]) for table in inputs["rope"])
    assert (run(TRITON, "norm_qkv_rope", {**inputs, "rope": apart})["q"][1] == 0).all()


def test_eps_decides_for_small_rows():
    for op in ("norm_swiglu", "norm_qkv_rope"):
        inputs = inputs_of(op)
        inputs["x"] = inputs["x"] * 1e-3
        for eps in (1e-5, 1e-2):
            wide = widened(inputs)
            runs = (
                run(ops, op, changed(i, {"norm.eps": eps}))
                for ops, i in ((TRITON, inputs), (ATEN, inputs), (reference_ops(), wide))
            )
            assert_no_worse(*runs, F32)


def test_cross_kv_reads_views_of_the_cache():
    inputs = inputs_of("cross_kv")
    want = TRITON.cross_kv(**inputs)
    views = {}
    for name in ("k", "v"):
        cache = torch.full((2, 19 + 4, 1, 16), torch.nan)
        cache[:, 2:-2] = inputs[name]
        views[name] = cache[:, 2:-2]
    turned = {"v": inputs["v"].transpose(1, 2).contiguous().transpose(1, 2)}
    for change in (views, {"k": views["k"]}, turned):
        got = TRITON.cross_kv(**{**inputs, **change})
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_patch_embed_takes_other_shapes_ids_and_crops():
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(
        2, 3, 10, 13, generator=generator
    )  # a row and a column left over, as conv2d leaves them
    weight, bias = torch.randn(7, 3, 3, 3, generator=generator), torch.randn(7, generator=generator)
    position = torch.randn(20, 7, generator=generator)
    for ids in (
        torch.randint(0, 20, (2, 12), generator=generator),
        torch.full((1, 12), 19, dtype=torch.int32),
    ):
        inputs = dict(pixels=pixels, weight=weight, bias=bias, position=position, position_ids=ids)
        wide = widened(inputs)
        ours, eager = run(TRITON, "patch_embed", inputs), run(ATEN, "patch_embed", inputs)
        assert_no_worse(ours, eager, run(reference_ops(), "patch_embed", wide), F32)
    strided = torch.randn(2, 4, 12, 13, generator=generator)[:, :3, 1:-1]
    got = TRITON.patch_embed(strided, weight, bias, position, ids)
    assert torch.equal(got, TRITON.patch_embed(strided.contiguous(), weight, bias, position, ids))


REFUSALS = {
    "linear": [
        (dict(activation="relu"), r"unknown activation 'relu'; accepted are None, 'gelu_tanh' and 'silu'"),
        (dict(x=torch.zeros(5, 32)), r"x has shape \[5, 32\]; accepted is \[5, 33\]"),
        (dict(bias=torch.zeros(46)), r"bias has shape \[46\]; accepted is \[47\]"),
        (dict(residual=torch.zeros(4, 47)), r"residual has shape \[4, 47\]; accepted is \[5, 47\]"),
        (dict(weight=torch.zeros(33, 47).t()), "last dimension of weight is strided"),
        (dict(x=torch.zeros(5, 33).double()), "x is torch.float64; accepted are float32, bfloat16, float16"),
        (dict(bias=torch.zeros(47, device="meta")), "bias is on meta"),
    ],
    "linear_residual": [
        (dict(residual=torch.zeros(5, 46)), r"residual has shape \[5, 46\]; accepted is \[5, 47\]"),
        (dict(x=torch.zeros(33, 5).t()), "last dimension of x is strided"),
    ],
    "norm_swiglu": [
        (dict(up_weight=torch.zeros(46, 33)), r"up_weight has shape \[46, 33\]; accepted is \[47, 33\]"),
        (dict(up_weight=torch.zeros(47, 33).half()), "up_weight is torch.float16.*accepted is one dtype"),
        ({"norm.weight": torch.zeros(32)}, r"norm.weight has shape \[32\]; accepted is \[33\]"),
    ],
    "norm_qkv_rope": [
        ({"weights": (None,) * 3}, "needs a weight of q, or weights and slots of k and v.*got neither"),
        ({"weights.q": torch.zeros(40, 48)}, r"a weight has shape \[40, 48\]; accepted is \[32, 48\]"),
        ({"weights.k": torch.zeros(16, 48).half()}, "accepted is one dtype for all"),
        (dict(rope=(torch.zeros(2, 6, 1, 8),) * 2), r"accepted is \[2, 7, 1, 8\]"),
        (dict(rope=(torch.zeros(2, 7, 1, 8).half(),) * 2), "two alike, contiguous, fp32"),
        ({"weights.v": torch.zeros(32, 48)}, r"weights.v has shape \[32, 48\]; accepted is \[16, 48\]"),
        ({"slots.k": torch.zeros(2, 6, 1, 16)}, r"slots.k has shape \[2, 6, 1, 16\]; accepted is \[2, 7, 1, 16\]"),
        ({"slots.v": torch.zeros(2, 9, 1, 16)[:, :7]}, "accepted are the same for both"),
        ({"slots.v": torch.zeros(2, 7, 1, 16).half()}, "accepted is one dtype for both"),
    ],
    "cross_kv": [
        (dict(v=torch.zeros(2, 18, 1, 16)), r"v has shape \[2, 18, 1, 16\]; accepted is \[2, 19, 1, 16\]"),
        (dict(k_weight=torch.zeros(16, 15)), r"k_weight has shape \[16, 15\]; accepted is \[16, 16\]"),
        (dict(v=torch.zeros(2, 19, 1, 16).half()), "accepted is one dtype for k and v"),
    ],
    "pixel_shuffle_linear": [
        (dict(factor=3), "64 patches an image; accepted are squares of multiples of factor = 3"),
        (dict(x=torch.zeros(3, 66, 48)), "66 patches an image"),
        (dict(weight=torch.zeros(40, 191)), r"weight has shape \[40, 191\]; accepted is \[40, 192\]"),
    ],
    "patch_embed": [
        (dict(position_ids=torch.zeros(1, 63, dtype=torch.int64)), r"accepted is \[3 or 1, 64\]"),
        (dict(position_ids=torch.zeros(1, 64)), "position_ids is torch.float32.*int64 and int32"),
        (dict(weight=torch.zeros(48, 3, 4, 5)), r"weight has shape \[48, 3, 4, 5\]"),
    ],
}  # fmt: skip


@OPS
def test_wrong_arguments_are_named(op):
    for changes, match in REFUSALS[op]:
        inputs = {n: to_device(v, DEVICE) for n, v in inputs_of(op).items()}
        moved = {n: v if getattr(v, "is_meta", False) else to_device(v, DEVICE) for n, v in changes.items()}
        with pytest.raises(ValueError, match=match):
            getattr(module(op), op)(**changed(inputs, moved))
