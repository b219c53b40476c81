"""Attention in CUDA C++ on the host emulator: prefix, suffix and cross attention, and the rotation on load."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from simt.emulator import build
from support.attention_inputs import (
    DTYPES,
    PAIRED,
    SMALL,
    cross_attention,
    inputs,
    masked_attention,
    suffix_attention,
    wide,
)
from support.contract import check
from torch import Tensor

from smolvla_fast.ops.reference.masked_attention import CASES as REAL
from smolvla_fast.ops.reference.masked_attention import masked_attention as reference
from smolvla_fast.ops.reference.masks import block_mask
from smolvla_fast.ops.reference.rope import apply_rope, rope_tables

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("emulator")]

# Rows of 16 and keys of 8, 16, 32 and 256 are where a tile, a load, a piece and a round end.
CASES = (
    dict(B=1, T=7, S=41, H=15, K=5, D=64),
    dict(B=1, T=6, S=227, H=6, K=2, D=64),
    dict(B=1, T=3, S=300, H=5, K=1, D=64),
    dict(B=3, T=1, S=33, H=4, K=4, D=8),
    dict(B=1, T=3, S=1, H=2, K=2, D=40),
    dict(B=1, T=5, S=150, H=5, K=1, D=128),
    dict(B=2, T=9, S=30, H=8, K=2, D=96),
    dict(B=1, T=16, S=32, H=2, K=2, D=32),
)


def sizes(case: dict[str, int]) -> str:
    return "-".join(f"{name}{value}" for name, value in case.items())


CASED = pytest.mark.parametrize("case", CASES, ids=sizes)


def beside(attend: Any, **more: Any) -> Any:
    """The backend of one op that ``contract.check`` wants, with arguments that it does not know."""
    return SimpleNamespace(
        masked_attention=lambda **values: attend(**values, **more), prepare_mask=lambda mask: mask
    )


def assert_as_exact_as_eager(out: Tensor, values: dict[str, Any]) -> None:
    """The contract where dtypes are mixed: eager computes in fp32, and its result is rounded to the dtype of q, as ours."""
    truth, narrow = reference(**wide(values)), values["q"].dtype
    eager = reference(**values).to(narrow)
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (out, eager))
    print(f"error {error:.3g}, eager {eager_error:.3g}")
    assert out.dtype is narrow and not out.isnan().any()
    assert error <= 2 * eager_error


@DTYPES
@pytest.mark.parametrize("case", (*REAL, *CASES), ids=sizes)
def test_contract(case: dict[str, int], dtype: torch.dtype) -> None:
    check(beside(reference), beside(masked_attention), "masked_attention", case, dtype)


@DTYPES
@CASED
def test_contract_over_fp32_keys_and_values(case: dict[str, int], dtype: torch.dtype) -> None:
    values = inputs(case, dtype, torch.float32)
    out = masked_attention(**values)
    assert_as_exact_as_eager(out, values)
    truth = reference(**wide(values))
    # Half a unit is the rounding of the result. Keys, values and weights are good to 2^-17 of themselves, scores of about
    # ten to ten times that, and weights are averaged over values.
    allowed = 0.5 * torch.finfo(dtype).eps * truth.abs() + 2**-14 * values["v"].abs().max()
    assert ((out.double() - truth).abs() <= allowed).all()


@PAIRED
def test_contract_with_outliers(pair: tuple[torch.dtype, torch.dtype]) -> None:
    """A few channels of the queries fifty times larger, as in trained transformers."""
    values = inputs(SMALL, *pair, seed=4)
    values["q"][..., ::7] *= 50
    assert_as_exact_as_eager(masked_attention(**values), values)


@PAIRED
def test_equal_bits_whatever_the_order_of_threads(
    pair: tuple[torch.dtype, torch.dtype], emulator: Any
) -> None:
    values = inputs(dict(B=1, T=7, S=270, H=3, K=1, D=64), *pair)
    results = []
    for seed in (1, 2, 3):
        emulator.configure(seed=seed)
        results.append(masked_attention(**values, offset=torch.tensor([5])))
    assert all(torch.equal(result, results[0]) for result in results[1:])


# Positions as in the denoise loop: behind a prefix that differs from sample to sample.
@PAIRED
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5], CASES[7], SMALL], ids=sizes)
def test_contract_with_rotation(case: dict[str, int], pair: tuple[torch.dtype, torch.dtype]) -> None:
    offset = torch.tensor([391, 0, 176])[: case["B"]]
    values = inputs(case, *pair)
    out = masked_attention(**values, offset=offset)
    assert_as_exact_as_eager(out, {**values, "offset": offset})
    # A wrong half, sign or position is far outside: rows of one key alone do not turn.
    plain = masked_attention(**values)
    rows = case["T"] - 1
    assert case["T"] == 1 or (out[0, rows].double() - plain[0, rows].double()).abs().max() > 0.05


@DTYPES
def test_rotated_on_load_is_rotated_before(dtype: torch.dtype) -> None:
    """But for queries whose fp32 rotation lies next to the middle of two roundings."""
    values, offset = inputs(CASES[0], dtype), torch.tensor([177])
    tables = rope_tables(offset[:, None] + torch.arange(7), 64)
    before = masked_attention(**{**values, "q": apply_rope(values["q"], *tables)})
    after = masked_attention(**values, offset=offset)
    assert (before == after).float().mean() > 0.9
    other = masked_attention(**values, offset=offset + 1)
    assert (before == other).float().mean() < 0.7


@DTYPES
def test_offsets_in_either_width_and_any_stride(dtype: torch.dtype) -> None:
    values, offset = inputs(SMALL, dtype), torch.tensor([3, 240])
    want = masked_attention(**values, offset=offset)
    assert torch.equal(masked_attention(**values, offset=offset.int()), want)
    for spread in (torch.full((2, 3), 77), torch.full((2, 3), 77, dtype=torch.int32)):
        spread[:, 0] = offset
        assert torch.equal(masked_attention(**values, offset=spread[:, 0]), want)
    each = [
        masked_attention(**{name: x[i : i + 1] for name, x in values.items()}, offset=offset[i : i + 1])
        for i in range(2)
    ]
    assert torch.equal(torch.cat(each), want)
    assert not torch.equal(masked_attention(**values, offset=offset.flip(0)), want)


@PAIRED
@pytest.mark.parametrize(("tokens", "prefix"), [(7, 40), (17, 1), (9, 0), (1, 31), (20, 250)])
def test_suffix_attention(tokens: int, prefix: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    case = dict(B=2, T=tokens, S=prefix + tokens, H=3, K=1, D=16)
    values = inputs(case, *pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(3)) < 0.6
    ones = torch.ones(2, tokens, dtype=torch.bool)
    values["mask"] = torch.cat([seen[:, None].expand(2, tokens, prefix), block_mask(ones, ones)], dim=2)
    offset = seen.sum(1)
    out = suffix_attention(*(values[name] for name in "qkv"), seen, offset)
    assert_as_exact_as_eager(out, {**values, "offset": offset})
    assert torch.equal(out, masked_attention(**values, offset=offset))


@PAIRED
@pytest.mark.parametrize("prefix", [1, 32, 83, 260])
def test_cross_attention(prefix: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    values = inputs(dict(B=2, T=7, S=prefix, H=6, K=2, D=16), *pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(2)) < 0.7
    values["mask"] = seen[:, None].expand(2, 7, prefix)
    assert values["mask"].stride(1) == 0
    offset = torch.zeros(2, dtype=torch.int32)
    out = cross_attention(*(values[name] for name in "qkv"), seen, offset)
    assert_as_exact_as_eager(out, {**values, "offset": offset})
    assert torch.equal(out, masked_attention(**values, offset=offset))
    values["mask"] = values["mask"].contiguous()
    assert torch.equal(out, masked_attention(**values, offset=offset))


def test_angles_are_those_of_rope_tables(tmp_path: Path) -> None:
    """The kernel's sine and cosine themselves, finer than 16 bits show them."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    source, library = tmp_path / "rope.cpp", tmp_path / "rope.so"
    source.write_text(
        '#include "cuda/rope.cuh"\n'
        'extern "C" void rotate(int position, int i, int head_dim, float* to) {\n'
        "    smolvla::cuda::sin_cos(smolvla::cuda::rope_angle(position, i, head_dim), to[0], to[1]);\n"
        "}\n"
    )
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-DSMOLVLA_SIMT"]
    subprocess.run([*command, *build.INCLUDES, str(source), "-o", str(library)], check=True)
    rotate = ctypes.CDLL(str(library)).rotate
    buffer = (ctypes.c_float * 2)()
    for head_dim in (8, 64, 128):
        place = torch.tensor([[0, 1, 2, 3, 50, 177, 290, 400]])
        ours = torch.empty(2, place.shape[1], head_dim // 2)
        for row, position in enumerate(place[0].tolist()):
            for i in range(head_dim // 2):
                rotate(position, i, head_dim, buffer)
                ours[:, row, i] = torch.tensor(list(buffer))
        sin, cos = rope_tables(place, head_dim)
        # Timescale and quotient are good to three units of fp32, and an angle's error is that of its sine.
        angle = place[0, :, None] / 10_000 ** (2 * torch.arange(head_dim // 2) / head_dim)
        allowed = 2e-7 + 3 * 2**-23 * angle
        for got, want in zip(ours, (sin, cos), strict=True):
            assert ((got - want[0, :, 0]).abs() <= allowed).all()
