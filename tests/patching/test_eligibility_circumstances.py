"""What is on around a call and would not see into the kernels, or changes stock: stock runs, with a receipt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.policies import chunk, make_policy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation


class _Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is F.linear else found


class _DoubledBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is torch.ops.aten.addmm.default else found


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CIRCUMSTANCES = {
    "a function mode": (_Doubled, "_Doubled is on"),
    "a dispatch mode": (_DoubledBelow, "_DoubledBelow is on"),
    "another default device": (lambda: torch.device("meta"), "DeviceContext is on"),
    "another default dtype": (lambda: _default_dtype(torch.float64), "default dtype is torch.float64"),
}


def _outcome(policy: Any, observation: Any, noise: Any, around: Any) -> Any:
    try:
        with around():
            return chunk(policy, observation, noise)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("precision", ["exact", "fp32"])
@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_stock_answers_under_what_the_engine_does_not_see(name: str, precision: str) -> None:
    around, words = CIRCUMSTANCES[name]
    stock = make_policy("tiny", num_steps=1)
    observation, noise = make_observation(stock), make_noise(stock)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision=precision)
    want, got = (_outcome(each, observation, noise, around) for each in (stock, fast))
    assert (
        torch.equal(got, want) and got.dtype is want.dtype if isinstance(want, torch.Tensor) else got is want
    )
    now = smolvla_fast.status(fast)
    assert (now.calls_fast, now.calls_stock) == (0, 1) and words in str(now.last_fallback)
    chunk(fast, observation, noise)
    assert smolvla_fast.status(fast).calls_fast == 1


def test_a_default_device_of_the_policy_s_own_kind_is_served() -> None:
    policy = make_policy("tiny", num_steps=1)
    observation, noise = make_observation(policy), make_noise(policy)
    want = chunk(policy, observation, noise)
    smolvla_fast.patch(policy, precision="exact")
    with torch.device("cpu"):
        assert torch.equal(chunk(policy, observation, noise), want)
    assert smolvla_fast.status(policy).calls_fast == 1


def test_patch_leaves_a_receipt_where_the_first_layer_is_gone() -> None:
    policy = make_policy("tiny", num_steps=1)
    policy.model.vlm_with_expert.get_vlm_model().text_model.layers[0].self_attn.k_proj = None
    now = smolvla_fast.status(smolvla_fast.patch(policy))
    assert not now.active and now.last_fallback
