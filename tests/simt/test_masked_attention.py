"""Attention in CUDA C++ on the host emulator: prefix, suffix and cross attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.attention_inputs import DTYPES, PAIRED, SMALL, inputs, masked_attention
from support.contract import check, widened
from torch import Tensor

from smolvla_fast.ops.reference.masked_attention import CASES as REAL
from smolvla_fast.ops.reference.masked_attention import masked_attention as reference
from smolvla_fast.ops.reference.masks import block_mask

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


def table_of(attend: Any) -> Any:
    """The table of one op that ``contract.check`` wants."""
    return SimpleNamespace(masked_attention=attend, prepare_mask=lambda mask: mask)


def assert_as_exact_as_eager(out: Tensor, values: dict[str, Any]) -> None:
    """The contract where dtypes are mixed: eager computes in fp32, and its result is rounded to the dtype of q, as ours."""
    truth, narrow = reference(**widened(values)), values["q"].dtype
    eager = reference(**values).to(narrow)
    error, eager_error = ((x.double() - truth).abs().max().item() for x in (out, eager))
    print(f"error {error:.3g}, eager {eager_error:.3g}")
    assert out.dtype is narrow and not out.isnan().any()
    assert error <= 2 * eager_error


@DTYPES
@pytest.mark.parametrize("case", (*REAL, *CASES), ids=sizes)
def test_contract(case: dict[str, int], dtype: torch.dtype) -> None:
    check(table_of(reference), table_of(masked_attention), "masked_attention", case, dtype)


@DTYPES
@CASED
def test_contract_over_fp32_keys_and_values(case: dict[str, int], dtype: torch.dtype) -> None:
    values = inputs(case, dtype, torch.float32)
    out = masked_attention(**values)
    assert_as_exact_as_eager(out, values)
    truth = reference(**widened(values))
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
        results.append(masked_attention(**values))
    assert all(torch.equal(result, results[0]) for result in results[1:])


@PAIRED
@pytest.mark.parametrize(("tokens", "prefix"), [(7, 40), (17, 1), (9, 0), (1, 31), (20, 250)])
def test_suffix_attention(tokens: int, prefix: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """The masks of a denoise step: the valid keys of the prefix, then each token's own causally."""
    values = inputs(dict(B=2, T=tokens, S=prefix + tokens, H=3, K=1, D=16), *pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(3)) < 0.6
    ones = torch.ones(2, tokens, dtype=torch.bool)
    values["mask"] = torch.cat([seen[:, None].expand(2, tokens, prefix), block_mask(ones, ones)], dim=2)
    assert_as_exact_as_eager(masked_attention(**values), values)


@PAIRED
@pytest.mark.parametrize("prefix", [1, 32, 83, 260])
def test_cross_attention(prefix: int, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Every query sees the same keys: one row of the mask serves them all, and gives the bits of a copy for each."""
    values = inputs(dict(B=2, T=7, S=prefix, H=6, K=2, D=16), *pair)
    seen = torch.rand(2, prefix, generator=torch.Generator().manual_seed(2)) < 0.7
    values["mask"] = seen[:, None].expand(2, 7, prefix)
    assert values["mask"].stride(1) == 0
    out = masked_attention(**values)
    assert_as_exact_as_eager(out, values)
    values["mask"] = values["mask"].contiguous()
    assert torch.equal(out, masked_attention(**values))
