"""masked_attention and attention as Triton kernels: prefix, suffix and cross attention, and the vision tower's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from support.contract import check, inputs_in, run
from support.guarded import DEVICE, guarded

from smolvla_fast.kernels import attention as vision_module
from smolvla_fast.kernels import masked_attention as module
from smolvla_fast.kernels.tuning import AttentionTile
from smolvla_fast.ops.reference.masked_attention import masked_attention as reference
from smolvla_fast.ops.reference.masks import block_mask
from smolvla_fast.ops.select import reference_ops

pytestmark = pytest.mark.triton

masked_attention, attention = guarded(module.masked_attention), guarded(vision_module.attention)
OPS = SimpleNamespace(masked_attention=masked_attention, attention=attention, prepare_mask=lambda mask: mask)
# The interpreter's bf16 products are wrong, so bf16 is a device's to judge.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
# SmolVLA's own sizes, but for the prefix, whose 177 tokens the interpreter takes 10 s for; a device runs them in tests/gpu.
PREFIX = (dict(B=1, T=67, S=67, H=15, K=5, D=64), dict(B=2, T=21, S=21, H=6, K=2, D=24))
SUFFIX = (dict(B=1, T=50, S=227, H=15, K=5, D=64), dict(B=2, T=7, S=19, H=3, K=1, D=16))
CROSS = (dict(B=1, T=50, S=177, H=15, K=5, D=64), dict(B=3, T=1, S=33, H=4, K=4, D=8))
ODD = (
    dict(B=1, T=3, S=1, H=2, K=2, D=40),
    dict(B=1, T=5, S=300, H=5, K=1, D=128),
    dict(B=2, T=9, S=70, H=8, K=2, D=96),
    dict(B=1, T=2, S=17, H=3, K=3, D=1),
)
SMALL = dict(B=2, T=7, S=83, H=6, K=2, D=24)


# In 32 bits the first of each, SmolVLA's, takes the interpreter twice as long as in 16.
LONG = [pytest.mark.long] if DEVICE == "cpu" else []


def of_smolvla(cases: tuple[dict[str, int], ...]) -> Any:
    """Cases by dtype, the first of them in fp32 for the long run."""
    return pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(
                case,
                dtype,
                marks=[pytest.mark.gpu] * (dtype is torch.bfloat16)
                + LONG * (case is cases[0] and dtype is torch.float32),
                id=f"{sizes(case)}-{dtype}",
            )
            for dtype in (torch.float32, torch.float16, torch.bfloat16)
            for case in cases
        ],
    )


def sizes(case: dict[str, int]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items())


def inputs(case: dict[str, int], dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    return inputs_in("masked_attention", case, dtype, seed)[0]


@of_smolvla(PREFIX)
def test_prefix_attention(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "masked_attention", case, dtype)


@of_smolvla(SUFFIX)
def test_suffix_attention(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "masked_attention", case, dtype)


@of_smolvla(CROSS)
def test_cross_attention(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "masked_attention", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=sizes)
def test_odd_sizes(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "masked_attention", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [(16, 16), (32, 32), (64, 64)], ids=str)
def test_every_tile_gives_the_same(
    tile: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles depend on batch and target; what they compute does not."""
    monkeypatch.setattr(module, "masked_attention_tile", lambda *_: AttentionTile(*tile, 4, 1))
    check(reference_ops(), OPS, "masked_attention", SMALL, dtype)


@pytest.mark.parametrize(
    "narrow", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_cross_attention_over_wider_keys(narrow: torch.dtype) -> None:
    """LeRobot's default layout: the expert's queries in 16 bits, its cross KV in fp32."""
    values = inputs(SMALL, torch.float32)
    values["q"] = values["q"].to(narrow)
    out = masked_attention(**values)
    assert out.dtype is narrow
    truth = reference(**{k: v if k == "mask" else v.double() for k, v in values.items()})
    # q is the same in both, all else is fp32: what is left is the rounding of the result, half a unit, and fp32's noise.
    allowed = 0.6 * torch.finfo(narrow).eps * truth.abs().clamp(min=2**-6)
    assert ((out.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_sees_nothing_averages_all_values(dtype: torch.dtype) -> None:
    """Of all keys, in every block, and of none that pads the last block."""
    values = inputs(SMALL, dtype)
    values["mask"][0, 2] = False
    out = masked_attention(**values)
    mean = values["v"][0].double().mean(0).repeat_interleave(3, dim=0).flatten()
    # A mean of 83 values around 1: a few roundings of weights of one 83rd, and the result's.
    torch.testing.assert_close(out[0, 2].double(), mean, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert (out[0, 2].double() - mean * 83 / 128).abs().max() > 0.01, "padding taken for keys would show"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_keys_have_no_influence(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    before = masked_attention(**values)
    hidden = ~values["mask"].any(1)
    hidden[1] = False
    values["mask"][1, :, :66] = False  # the first blocks of this item are hidden whole
    want = masked_attention(**values)
    assert torch.equal(want[0], before[0]) and not torch.equal(want[1], before[1])
    hidden[1, :66] = True
    assert hidden.any(1).all()
    for name in ("k", "v"):
        values[name][hidden] = 1e6 if dtype is not torch.float16 else 6e4  # near the largest of fp16
    assert torch.equal(masked_attention(**values), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_of_one_key_returns_its_value(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    seen = torch.randint(0, 83, (2, 7), generator=torch.Generator().manual_seed(0))
    values["mask"] = torch.nn.functional.one_hot(seen, 83).bool()
    want = values["v"][torch.arange(2)[:, None], seen].repeat_interleave(3, dim=2).flatten(2)
    assert torch.equal(masked_attention(**values), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_item_of_a_batch_has_its_own_mask(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    values["mask"] = torch.rand(2, 7, 83, generator=torch.Generator().manual_seed(1)) < 0.5
    assert not torch.equal(*values["mask"])
    together = masked_attention(**values)
    for i in range(2):
        alone = masked_attention(**{name: value[i : i + 1] for name, value in values.items()})
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_suffix_attention_reads_a_cache_where_it_lies(dtype: torch.dtype) -> None:
    """Keys and values are the front of a longer cache of all layers, NaN behind; queries a part of a joint projection."""
    values = inputs(SMALL, dtype)
    want = masked_attention(**values)
    for name in ("k", "v"):
        cache = torch.full((2, 3, 100, 2, 32), torch.nan, dtype=dtype)
        view = cache[:, 1, :83, :, :24]
        view.copy_(values[name])
        values[name] = view.to(DEVICE)
    joint = torch.full((2, 7, 9, 24), torch.nan, dtype=dtype)
    joint[:, :, 2:8] = values["q"]
    values["q"] = joint.to(DEVICE)[:, :, 2:8]
    assert not any(values[name].is_contiguous() for name in "qkv")
    assert torch.equal(masked_attention(**values), want)


def test_cross_attention_reads_one_mask_row_for_all_queries() -> None:
    """The pad mask of the prefix, expanded over the queries: no stride along them."""
    values = inputs(SMALL, torch.float32)
    pad = torch.rand(2, 83, generator=torch.Generator().manual_seed(2)) < 0.7
    values["mask"] = pad.to(DEVICE)[:, None].expand(2, 7, 83)
    assert values["mask"].stride(1) == 0
    got = masked_attention(**values)
    assert torch.equal(got, masked_attention(**{**values, "mask": values["mask"].contiguous()}))


def test_prefix_attention_under_lerobots_blocks() -> None:
    """Images and language see each other, padding is seen by none and sees none, the state sees all that is valid."""
    values = inputs(dict(B=2, T=21, S=21, H=6, K=2, D=24), torch.float32)
    valid, blocks = torch.ones(2, 21, dtype=torch.bool), torch.zeros(2, 21, dtype=torch.bool)
    valid[0, 12:20], blocks[:, 20] = False, True
    values["mask"] = block_mask(valid, blocks)
    assert not values["mask"][0, 15].any() and values["mask"][1, 20].all() and not values["mask"][1, 3, 20]
    # fp32 on both sides: sums of 24 and 21 terms in another order.
    torch.testing.assert_close(masked_attention(**values), reference(**values), atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy under the interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    values = inputs(SMALL, dtype)
    values["mask"][0, 3] = True
    want = masked_attention(**values)
    values["q"][0, 3, 4, 5] = torch.nan  # token 3, head 4
    got = masked_attention(**values)
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[0, 3, 4 * 24 : 5 * 24] = True
    assert got[hit].isnan().all() and torch.equal(got[~hit], want[~hit])


def test_masked_attention_refuses_what_it_cannot_do() -> None:
    values = {name: value.to(DEVICE) for name, value in inputs(SMALL, torch.float32).items()}
    refused = module.masked_attention
    with pytest.raises(ValueError, match=r"q and k have shapes \[7, 6, 24\].*accepted are \[B, T, H, D\]"):
        refused(**{**values, "q": values["q"][0]})
    with pytest.raises(
        ValueError, match="5 query heads over 2 KV heads of 83 keys; accepted is at least one key"
    ):
        refused(**{**values, "q": values["q"][:, :, :5]})
    with pytest.raises(ValueError, match="KV heads of 0 keys; accepted is at least one key"):
        refused(**{**values, "k": values["k"][:, :0]})
    with pytest.raises(ValueError, match=r"v has shape \[2, 82, 2, 24\]; accepted is \[2, 83, 2, 24\]"):
        refused(**{**values, "v": values["v"][:, 1:]})
    with pytest.raises(ValueError, match=r"mask is torch.float32, .*accepted is torch.bool, \[2, 7, 83\]"):
        refused(**{**values, "mask": values["mask"].float()})
    with pytest.raises(ValueError, match="q is torch.float64; accepted are float32, bfloat16, float16"):
        refused(**{**values, "q": values["q"].double()})
    with pytest.raises(ValueError, match="the last dimension of k is strided"):
        refused(**{**values, "k": values["k"].repeat_interleave(2, 3)[..., ::2]})
    wide = torch.zeros(1, 1, 1, 160, device=DEVICE)
    with pytest.raises(ValueError, match="a head size of 160 has no tile; accepted are 1 to 128"):
        refused(wide, wide, wide, torch.ones(1, 1, 1, dtype=torch.bool, device=DEVICE))
    none = values["q"][:0]
    assert refused(none, values["k"][:0], values["v"][:0], values["mask"][:0]).shape == (0, 7, 144)


VISION = (
    dict(N=2, T=64, H=3, D=16),
    dict(N=1, T=37, H=2, D=24),
    dict(N=1, T=200, H=2, D=64),
    dict(N=2, T=130, H=1, D=72),
    dict(N=1, T=1, H=3, D=8),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", VISION, ids=sizes)
def test_vision_attention(case: dict[str, int], dtype: torch.dtype) -> None:
    check(reference_ops(), OPS, "attention", case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vision_attention_of_a_joint_projection(dtype: torch.dtype) -> None:
    values, _ = inputs_in("attention", dict(N=2, T=37, H=3, D=16), dtype, seed=0)
    want = run(OPS, "attention", values)["y"]
    joint = torch.cat([values[name] for name in "qkv"], dim=2).to(DEVICE)
    got = attention(*joint.split(48, dim=2), 3)
    assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy under the interpreter
def test_vision_attention_keeps_images_and_heads_apart() -> None:
    values, _ = inputs_in("attention", dict(N=2, T=37, H=3, D=16), torch.float32, seed=0)
    want = run(OPS, "attention", values)["y"]
    values["v"][1, 5, 20] = torch.nan  # image 1, head 1
    got = run(OPS, "attention", values)["y"]
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[1, :, 20] = True
    assert got[hit].isnan().all() and torch.equal(got[~hit], want[~hit])


def test_vision_attention_refuses_what_it_cannot_do() -> None:
    x = torch.zeros(1, 5, 48, device=DEVICE)
    refused = vision_module.attention
    with pytest.raises(
        ValueError, match=r"q has shape \[1, 5, 48\] and heads is 5; accepted is \[N, T, H·D\]"
    ):
        refused(x, x, x, 5)
    with pytest.raises(ValueError, match="v is torch.float16, q is torch.float32; accepted is one dtype"):
        refused(x, x, x.half(), 3)
    with pytest.raises(ValueError, match=r"k has shape \[1, 4, 48\]; accepted is \[1, 5, 48\]"):
        refused(x, x[:, 1:], x, 3)
    assert refused(x[:0], x[:0], x[:0], 3).shape == (0, 5, 48)
