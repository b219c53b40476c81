"""Real-time chunking: guidance as elementwise data against LeRobot's own processor, autograd and all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_FIRST, chunk, make_policy, rel_l2
from torch import Tensor

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

rtc = pytest.importorskip("lerobot.policies.rtc.configuration_rtc")
SCHEDULES = ["ZEROS", "ONES", "LINEAR", "EXP"]
CHUNK, WIDTH = 10, 32


def _config(schedule: str = "LINEAR", **fields: Any) -> Any:
    from lerobot.configs.types import RTCAttentionSchedule

    # Said here, for in LeRobot 0.4.4 and 0.5.1 it is off by default.
    return rtc.RTCConfig(enabled=True, prefix_attention_schedule=RTCAttentionSchedule[schedule], **fields)


def _policies(config: Any, precision: str) -> tuple[Any, Any]:
    policy = make_policy("tiny")
    policy.config.rtc_config = config
    policy.init_rtc_processor()
    return policy, smolvla_fast.patch(copy.deepcopy(policy), precision=precision)


def _previous(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@LEROBOT_FIRST
@pytest.mark.check(49)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("delay", [0, 1, 4, 8, 12])
@pytest.mark.parametrize("max_weight", [pytest.param(1.0, marks=pytest.mark.long), 10.0])
def test_chunk_has_stock_bits(schedule: str, delay: int, max_weight: float) -> None:
    config = _config(schedule, execution_horizon=6, max_guidance_weight=max_weight)
    stock, fast = _policies(config, "exact")
    observation, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(inference_delay=delay, prev_chunk_left_over=_previous(8, 6))
    assert torch.equal(chunk(stock, observation, noise, **kwargs), chunk(fast, observation, noise, **kwargs))
    assert smolvla_fast.status(fast).calls_fast == 1


@LEROBOT_FIRST
@pytest.mark.check(49)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (8, 6), (10, 32), (1, 8, 6), (1, 10, 32), (1, 3, 32)],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("horizon", [None, 3, 10, 40])
@pytest.mark.parametrize("precision", ["exact", pytest.param("fp32", marks=pytest.mark.long)])
def test_shapes_of_what_is_left(shape: tuple[int, ...], horizon: int | None, precision: str) -> None:
    stock, fast = _policies(_config(), precision)
    observation, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(
        inference_delay=2, prev_chunk_left_over=_previous(*shape), execution_horizon=horizon
    )
    guided = chunk(stock, observation, noise, **kwargs)
    ours = chunk(fast, observation, noise, **kwargs)
    assert torch.equal(guided, ours) if precision == "exact" else rel_l2(ours, guided) <= FP32_BOUND


def test_guidance_changes_the_chunk_and_leaves_its_input() -> None:
    """Without this the tests above could compare two unguided chunks."""
    _, fast = _policies(_config("ONES"), "fp32")
    observation, noise, previous = make_observation(fast), make_noise(fast), _previous(8, 6)
    kept = previous.clone()
    guided = chunk(fast, observation, noise, inference_delay=2, prev_chunk_left_over=previous)
    assert rel_l2(guided, chunk(fast, observation, noise)) > 1e-2
    assert torch.equal(previous, kept)


@pytest.mark.check(36)
def test_first_chunk_and_switch_at_run_time() -> None:
    stock, fast = _policies(_config(), "exact")
    observation, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(inference_delay=3, prev_chunk_left_over=_previous(8, 6))
    first: dict[str, Any] = dict(inference_delay=0, prev_chunk_left_over=None)
    for enabled in (True, False, True):
        stock.config.rtc_config.enabled = fast.config.rtc_config.enabled = enabled
        for each in (first, kwargs):
            assert torch.equal(
                chunk(stock, observation, noise, **each), chunk(fast, observation, noise, **each)
            )
    for policy in (stock, fast):
        policy.config.rtc_config = _config("EXP")
        policy.init_rtc_processor()
    assert torch.equal(chunk(stock, observation, noise, **kwargs), chunk(fast, observation, noise, **kwargs))
    assert smolvla_fast.status(fast).calls_stock == 0


@pytest.mark.check(51)
def test_runs_under_inference_mode() -> None:
    """Stock's autograd raises there; the closed form does not need it."""
    stock, fast = _policies(_config(), "exact")
    observation, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(inference_delay=3, prev_chunk_left_over=_previous(8, 6))
    wanted = chunk(stock, observation, noise, **kwargs)
    with torch.inference_mode():
        assert torch.equal(chunk(fast, observation, noise, **kwargs), wanted)
