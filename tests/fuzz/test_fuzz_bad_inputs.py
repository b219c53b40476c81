"""Wrong inputs: stock's exception type where stock raises, its answer where it has one, and the next call right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.fuzz_cases import attempt, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.verify import FP32_BOUND

IMAGE, STATE = "observation.images.camera1", "observation.state"
TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


def _set(key: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(batch: dict[str, Any]) -> None:
        batch[key] = change(batch[key])

    return apply


def _value(key: str, value: float) -> Callable[[dict[str, Any]], None]:
    def apply(batch: dict[str, Any]) -> None:
        batch[key] = batch[key].clone()
        batch[key].view(-1)[3] = value

    return apply


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def apply(batch: dict[str, Any]) -> None:
        for key in keys:
            del batch[key]

    return apply


def _empty_batch(batch: dict[str, Any]) -> None:
    for key in batch:
        batch[key] = batch[key][:0]


BAD: dict[str, Callable[[dict[str, Any]], None]] = {
    "image NaN": _value(IMAGE, float("nan")),
    "image Inf": _value(IMAGE, float("inf")),
    "state NaN": _value(STATE, float("nan")),
    "state -Inf": _value(STATE, float("-inf")),
    "noise NaN": _value("noise", float("nan")),
    "noise of another shape": _set("noise", lambda x: x[:, :3]),
    "noise of another batch": _set("noise", lambda x: torch.cat([x, x])),
    "noise float64": _set("noise", lambda x: x.double()),
    "noise bf16": _set("noise", lambda x: x.bfloat16()),
    "noise of integers": _set("noise", lambda x: x.long()),
    "empty batch": _empty_batch,
    "image of another batch": _set(IMAGE, lambda x: torch.cat([x, x])),
    "image of no pixels": _set(IMAGE, lambda x: x[..., :0]),
    "image with 4 channels": _set(IMAGE, lambda x: torch.cat([x, x[:, :1]], 1)),
    "image with 1 channel": _set(IMAGE, lambda x: x[:, :1]),
    "image channels last": _set(IMAGE, lambda x: x.permute(0, 2, 3, 1)),
    "image of rank 2": _set(IMAGE, lambda x: x[0, 0]),
    "image of rank 3": _set(IMAGE, lambda x: x[0]),
    "image of rank 5": _set(IMAGE, lambda x: x[:, None]),
    "image uint8": _set(IMAGE, lambda x: (255 * x).to(torch.uint8)),
    "image float64": _set(IMAGE, lambda x: x.double()),
    "image float16": _set(IMAGE, lambda x: x.half()),
    "image strided": _set(IMAGE, lambda x: x.flip(-1).transpose(-1, -2)),
    "image a string": _set(IMAGE, lambda x: "camera1"),
    "no camera": _without(IMAGE, "observation.images.camera2"),
    "one camera": _without(IMAGE),
    "no state": _without(STATE),
    "no tokens": _without(TOKENS),
    "no mask": _without(MASK),
    "state float64": _set(STATE, lambda x: x.double()),
    "state of integers": _set(STATE, lambda x: x.long()),
    "state of rank 1": _set(STATE, lambda x: x[0]),
    "state of rank 3": _set(STATE, lambda x: x[:, None]),
    "state too wide": _set(STATE, lambda x: torch.cat([x] * 9, 1)),
    "state of no numbers": _set(STATE, lambda x: x[:, :0]),
    "state of another batch": _set(STATE, lambda x: torch.cat([x, x])),
    "state strided": _set(STATE, lambda x: torch.stack([x, x], -1)[..., 0]),
    "token out of range": _set(TOKENS, lambda x: x + 100_000),
    "token negative": _set(TOKENS, lambda x: x - 1000),
    "tokens int32": _set(TOKENS, lambda x: x.int()),
    "tokens float": _set(TOKENS, lambda x: x.float()),
    "tokens of rank 1": _set(TOKENS, lambda x: x[0]),
    "tokens of another length than their mask": _set(TOKENS, lambda x: x[:, :5]),
    "no token in them": lambda batch: batch.update({TOKENS: batch[TOKENS][:, :0], MASK: batch[MASK][:, :0]}),
    "mask all false": _set(MASK, torch.zeros_like),
    "mask with holes": _set(MASK, lambda x: x & (torch.arange(x.shape[1]) % 2 == 0)),
    "mask of integers": _set(MASK, lambda x: x.long()),
    "mask of floats": _set(MASK, lambda x: x.float()),
    "padding mask of another shape": lambda batch: batch.update({f"{IMAGE}_padding_mask": torch.ones(1, 2).bool()}),
    "padding mask of integers": lambda batch: batch.update({f"{IMAGE}_padding_mask": torch.ones(1).long()}),
}  # fmt: skip


@pytest.fixture(scope="module")
def stock() -> Any:
    return make_policy("tiny", num_vlm_layers=2, num_steps=2)


@pytest.fixture(scope="module", params=["exact", "fp32"])
def fast(stock: Any, request: pytest.FixtureRequest) -> Any:
    """One patched policy for all: what one bad call leaves behind meets the next."""
    return smolvla_fast.patch(copy.deepcopy(stock), precision=request.param)


@pytest.mark.parametrize("name", BAD)
def test_stocks_answer_or_stocks_error(stock: Any, fast: Any, name: str) -> None:
    good, noise = make_observation(stock), make_noise(stock)
    batch: dict[str, Any] = {**good, "noise": noise}
    BAD[name](batch)
    bad_noise = batch.pop("noise")
    want, got = (attempt(policy, batch, noise=bad_noise) for policy in (stock, fast))
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert type(got) is type(want), (want, got)
    else:
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got.isfinite(), want.isfinite())
        got, want = (x.nan_to_num(0.0, 0.0, 0.0) for x in (got, want))
        exact = smolvla_fast.status(fast).precision == "exact"
        assert torch.equal(got, want) if exact else rel_l2(got, want) <= FP32_BOUND

    served = smolvla_fast.status(fast).calls_fast
    right, again = (attempt(policy, good, noise=noise) for policy in (stock, fast))
    assert isinstance(again, Tensor) and rel_l2(again, right) <= FP32_BOUND
    assert smolvla_fast.status(fast).calls_fast == served + 1
