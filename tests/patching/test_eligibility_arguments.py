"""Arguments that stock refuses, and unusual ones that it takes: the patched policy does what its stock twin does.

One table for ``sample_actions`` in every tier, with real-time chunking on and off. Nothing here says what stock does with an
argument: both are asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from support.policies import make_policy, model_inputs, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

rtc = pytest.importorskip("lerobot.policies.rtc.configuration_rtc")
NAMES = ("images", "image_masks", "tokens", "token_masks", "state", "noise")
CHUNK, WIDTH = 10, 32


def _previous(*shape: int, **settings: Any) -> Callable[[int], dict[str, Any]]:
    def make(batch: int) -> dict[str, Any]:
        sizes = [{-1: batch, -2: batch + 1}.get(size, size) for size in shape]
        values = torch.randn(sizes, generator=torch.Generator().manual_seed(9))
        return {"prev_chunk_left_over": values, **settings}

    return make


def _with(**settings: Any) -> Callable[[int], dict[str, Any]]:
    usual = _previous(-1, 8, 6, inference_delay=2)
    return lambda batch: {**usual(batch), **settings}


def _as(change: Callable[[Tensor], Any]) -> Callable[[int], dict[str, Any]]:
    usual = _previous(-1, 8, 6, inference_delay=2)

    def make(batch: int) -> dict[str, Any]:
        given = usual(batch)
        return {**given, "prev_chunk_left_over": change(given["prev_chunk_left_over"])}

    return make


GUIDANCE: dict[str, Callable[[int], dict[str, Any]]] = {
    "usual": _with(),
    "one full chunk for the batch": _previous(1, CHUNK, WIDTH, inference_delay=2),
    "a full chunk of rank 2": _previous(CHUNK, WIDTH, inference_delay=2),
    "a full chunk each": _previous(-1, CHUNK, WIDTH, inference_delay=2),
    "one short chunk for the batch": _previous(1, 8, WIDTH, inference_delay=2),
    "one narrow chunk for the batch": _previous(1, CHUNK, 6, inference_delay=2),
    "a chunk more than the batch has": _previous(-2, 8, 6, inference_delay=2),
    "a full chunk more than the batch has": _previous(-2, CHUNK, WIDTH, inference_delay=2),
    "rank 0": _previous(inference_delay=2),
    "rank 1": _previous(6, inference_delay=2),
    "rank 4": _previous(1, -1, 8, 6, inference_delay=2),
    "too long": _previous(-1, CHUNK + 1, 6, inference_delay=2),
    "too wide": _previous(-1, 8, WIDTH + 1, inference_delay=2),
    "long and narrow": _previous(-1, CHUNK + 1, 1, inference_delay=2),
    "no rows": _previous(-1, 0, 6, inference_delay=2),
    "no columns": _previous(-1, 8, 0, inference_delay=2),
    "fp64": _as(lambda x: x.double()),
    "bf16": _as(lambda x: x.bfloat16()),
    "integers": _as(lambda x: x.long()),
    "bool": _as(lambda x: x > 0),
    "complex": _as(lambda x: x.to(torch.complex64)),
    "on meta": _as(lambda x: x.to("meta")),
    "sparse": _as(lambda x: x.to_sparse()),
    "strided": _as(lambda x: x.flip(-1).transpose(-1, -2).contiguous().transpose(-1, -2)),
    "a negated view": _as(lambda x: torch._neg_view(x)),
    "numpy": _as(lambda x: x.numpy()),
    "a list": _as(lambda x: x.tolist()),
    "a string": _with(prev_chunk_left_over="chunk"),
    "NaN": _as(lambda x: x * torch.nan),
    "delay None": _with(inference_delay=None),
    "no delay": lambda batch: _previous(-1, 8, 6)(batch),
    "delay negative": _with(inference_delay=-1),
    "delay far negative": _with(inference_delay=-100),
    "delay a float": _with(inference_delay=2.0),
    "delay a broken float": _with(inference_delay=2.5),
    "delay NaN": _with(inference_delay=float("nan")),
    "delay too large": _with(inference_delay=10_000),
    "delay True": _with(inference_delay=True),
    "delay numpy": _with(inference_delay=np.int64(3)),
    "delay a tensor": _with(inference_delay=torch.tensor(3)),
    "delay a string": _with(inference_delay="2"),
    "horizon 0": _with(execution_horizon=0),
    "horizon negative": _with(execution_horizon=-3),
    "horizon a float": _with(execution_horizon=3.0),
    "horizon a broken float": _with(execution_horizon=3.5),
    "horizon too large": _with(execution_horizon=10_000),
    "horizon a tensor": _with(execution_horizon=torch.tensor(3)),
    "horizon a string": _with(execution_horizon="3"),
    "horizon before the delay": _with(execution_horizon=1, inference_delay=4),
    "an unknown keyword": _with(colour="red"),
    "no chunk, a wrong delay": lambda batch: {"prev_chunk_left_over": None, "inference_delay": "x"},
}  # fmt: skip

Change = Callable[[dict[str, Any]], None]


def _set(name: str, change: Callable[[Any], Any]) -> Change:
    return lambda given: given.update({name: change(given[name])})


def _first(name: str, change: Callable[[Any], Any]) -> Change:
    return _set(name, lambda values: [change(values[0]), *values[1:]])


def _each(name: str, change: Callable[[Any], Any]) -> Change:
    return _set(name, lambda values: [change(value) for value in values])


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "a string": lambda x: "x",
    "numpy": lambda x: x.numpy(),
    "a list": lambda x: x.tolist(),
    "on meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "fp64": lambda x: x.double(),
    "fp16": lambda x: x.half(),
    "int32": lambda x: x.int(),
    "complex": lambda x: x.to(torch.complex64),
    "of another batch": lambda x: torch.cat([x, x[:1]]),
    "of one sample": lambda x: x[:1],
    "of no sample": lambda x: x[:0],
    "a rank more": lambda x: x[None],
    "a rank more behind": lambda x: x[..., None],
    "a rank less": lambda x: x[0],
    "of rank 0": lambda x: x.flatten()[0],
    "longer": lambda x: torch.cat([x, x], 1) if x.ndim > 1 else x,
    "shorter": lambda x: x[:, :-1] if x.ndim > 1 else x,
    "wider": lambda x: torch.cat([x, x], -1),
    "empty": lambda x: x[..., :0],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
}  # fmt: skip
ARGUMENTS: dict[str, Change] = {
    "usual": lambda given: None,
    **{
        f"{name} {what}": _set(name, change)
        for name in ("tokens", "token_masks", "state", "noise")
        for what, change in TENSORS.items()
    },
    **{
        f"first of {name} {what}": _first(name, change)
        for name in ("images", "image_masks")
        for what, change in TENSORS.items()
    },
    "tokens out of the table": _set("tokens", lambda x: x + 100_000),
    "a masked token out of the table": _set("tokens", lambda x: torch.cat([x[:, :-1], x[:, -1:] + 100_000], 1)),
    "a masked token below 0": _set("tokens", lambda x: torch.cat([x[:, :-1], 0 * x[:, -1:] - 100], 1)),
    "no mask is set": _set("token_masks", torch.zeros_like),
    "images None": _set("images", lambda x: None),
    "images a tensor": _set("images", torch.stack),
    "images a tuple": _set("images", tuple),
    "images an iterator": _set("images", iter),
    "no images": _set("images", lambda x: []),
    "an image more": _set("images", lambda x: [*x, x[0]]),
    "an image less": _set("images", lambda x: x[:1]),
    "image masks None": _set("image_masks", lambda x: None),
    "an image mask more": _set("image_masks", lambda x: [*x, x[0]]),
    "all images larger": _each("images", lambda x: torch.nn.functional.pad(x, (0, 4, 0, 4))),
    "all images not square": _each("images", lambda x: x[..., :-4]),
    "all images grey": _each("images", lambda x: x[:, :1]),
    "all images with 4 channels": _each("images", lambda x: torch.cat([x, x[:, :1]], 1)),
    "all images channels last": _each("images", lambda x: x.permute(0, 2, 3, 1)),
    "all images of one sample": _each("images", lambda x: x[:1]),
    "all images on meta": _each("images", lambda x: x.to("meta")),
    "all masks integers": _each("image_masks", lambda x: x.long()),
    "all masks of two columns": _each("image_masks", lambda x: torch.stack([x, x], 1)),
    "an unknown keyword": lambda given: given.update(colour="red"),
}  # fmt: skip


def _outcome(policy: Any, given: dict[str, Any]) -> Any:
    given = {**given}
    positional = [given.pop(name) for name in NAMES[:5]]
    torch.manual_seed(3)
    try:
        with torch.no_grad():
            return policy.model.sample_actions(*positional, noise=given.pop("noise"), **given)
    except Exception as error:
        return error


def _same(policy: Any, twin: Any, make: Callable[[], dict[str, Any]], undefined: bool = False) -> None:
    """``undefined``: a product with a tensor without memory, for which stock gives what lay in the memory of the result."""
    want, got = _outcome(twin, make()), _outcome(policy, make())
    if isinstance(want, Exception) or isinstance(got, Exception):
        assert type(got) is type(want), f"stock {want!r}, patched {got!r}"
        return
    assert got.shape == want.shape and got.dtype == want.dtype and got.device == want.device
    if undefined or want.is_meta:
        return
    now = smolvla_fast.status(policy)
    assert (now.calls_stock == 0) is (now.last_fallback is None)
    precision = now.precision
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got.nan_to_num(), want.nan_to_num()
    if precision in ("exact", "stock"):
        assert torch.equal(got, want)
    elif not torch.equal(
        got, want
    ):  # bf16 against fp32: 4e-3 of the rounding, an order of magnitude below any other answer
        assert rel_l2(got, want) <= (FP32_BOUND if precision == "fp32" else 5e-2)


def _twins(precision: str, guided: bool) -> tuple[Any, Any]:
    twin, policy = make_policy("tiny", num_steps=1), make_policy("tiny", num_steps=1)
    for each in (twin, policy) if guided else ():
        each.config.rtc_config = rtc.RTCConfig(enabled=True, execution_horizon=6)
        each.init_rtc_processor()
    return twin, smolvla_fast.patch(policy, precision=precision)


def _usual(policy: Any, batch: int) -> dict[str, Any]:
    observation = make_observation(policy, batch=batch)
    given = dict(
        zip(NAMES, (*model_inputs(policy, observation), make_noise(policy, batch=batch)), strict=True)
    )
    return {name: list(value) if isinstance(value, list) else value for name, value in given.items()}


# What refuses an argument asks neither the tier for the batch nor the batch for the tier: each is met once.
PAIRS = pytest.mark.parametrize(
    ("precision", "batch"),
    [
        pytest.param(*pair, marks=[pytest.mark.long] * (pair not in {("exact", 2), ("fp32", 1)}))
        for pair in product(("exact", "fp32", "bf16"), (1, 2))
    ],
)


@PAIRS
def test_guidance_arguments_are_answered_or_refused_as_by_stock(precision: str, batch: int) -> None:
    twin, policy = _twins(precision, guided=True)
    given = _usual(twin, batch)
    wrong = []
    for name, make in GUIDANCE.items():
        try:
            _same(policy, twin, lambda make=make: {**given, **make(batch)}, undefined="meta" in name)
        except AssertionError as difference:
            wrong.append(f"{name}: {difference}")
    assert not wrong, "\n".join(wrong)
    served = smolvla_fast.status(policy).calls_fast
    _same(policy, twin, lambda: {**given, **GUIDANCE["usual"](batch)})
    assert smolvla_fast.status(policy).calls_fast == served + 1 > 5


@PAIRS
def test_arguments_are_answered_or_refused_as_by_stock(precision: str, batch: int) -> None:
    guided = batch == 2
    twin, policy = _twins(precision, guided)
    usual = _usual(twin, batch)
    wrong = []
    for name, change in ARGUMENTS.items():

        def make(change: Change = change) -> dict[str, Any]:
            given = {**copy.deepcopy(usual), **(GUIDANCE["usual"](batch) if guided else {})}
            change(given)
            return given

        try:
            _same(policy, twin, make, undefined="on meta" in name)
        except AssertionError as difference:
            wrong.append(f"{name}: {difference}")
    assert not wrong, "\n".join(wrong)
    served = smolvla_fast.status(policy).calls_fast
    _same(policy, twin, make=lambda: _usual(twin, batch))
    assert smolvla_fast.status(policy).calls_fast == served + 1 > 5


@pytest.mark.parametrize(
    "change",
    [
        dict(rtc_processor=None), dict(horizon=None), dict(horizon=2.5), dict(horizon=-1), dict(weight=None),
        dict(weight=-1.0), dict(weight="10"), dict(schedule="LINEAR"), dict(schedule="CURVED"), dict(num_steps=0),
        dict(num_steps=-2), dict(num_steps=2.0), dict(num_steps=None), dict(num_steps=True), dict(chunk_size=5),
        dict(chunk_size=None), dict(max_action_dim=7),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("first", [False, True], ids=["guided", "first chunk"])
def test_live_settings_are_answered_or_refused_as_by_stock(change: dict[str, Any], first: bool) -> None:
    twin, policy = _twins("exact", guided=True)
    given = {**_usual(twin, 2), **({} if first else GUIDANCE["usual"](2))}
    for each in (twin, policy):
        for name, value in change.items():
            if name == "rtc_processor":
                each.model.rtc_processor = value
            elif hasattr(each.config, name):
                setattr(each.config, name, value)
            else:
                field = dict(horizon="execution_horizon", weight="max_guidance_weight")
                config = each.model.rtc_processor.rtc_config
                setattr(config, field.get(name, "prefix_attention_schedule"), value)
    _same(policy, twin, lambda: given)


def test_public_methods_refuse_as_stock_does() -> None:
    twin, policy = _twins("fp32", guided=True)
    observation = make_observation(twin, batch=2)
    for call in (
        lambda each: each.select_action(dict(observation)),
        lambda each: each.predict_action_chunk(
            dict(observation), **GUIDANCE["one full chunk for the batch"](2)
        ),
        lambda each: each.predict_action_chunk(dict(observation), **GUIDANCE["delay None"](2)),
        lambda each: each.predict_action_chunk(dict(observation), colour="red").shape,
        lambda each: each.predict_action_chunk(dict(observation), make_noise(twin), **GUIDANCE["usual"](2)),
    ):
        found = []
        for each in (twin, policy):
            try:
                found.append(call(each))
            except Exception as error:
                found.append(type(error))
        assert found[0] == found[1]
