"""Checks 49 to 51: real-time chunking, against LeRobot's own processor."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.captured import Captured
from support.policies import chunk, make_policy, rel_l2

import smolvla_fast
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

SCHEDULES = ("ZEROS", "ONES", "LINEAR", "EXP")
CALLS = [
    dict(inference_delay=0, prev_chunk_left_over=None),
    *(dict(inference_delay=delay, prev_chunk_left_over=(8, 6)) for delay in (0, 1, 5, 8, 12)),
    dict(inference_delay=2, prev_chunk_left_over=(1, 3, 32)),
    dict(inference_delay=2, prev_chunk_left_over=(10, 32), execution_horizon=40),
]
SHAPES = ((1, 1), (8, 6), (10, 32), (1, 8, 6), (1, 10, 32), (1, 3, 32))
GRID = [
    dict(inference_delay=2, prev_chunk_left_over=shape, execution_horizon=horizon)
    for shape in SHAPES
    for horizon in (None, 3, 10, 40)
]


def _guided(schedule: str, weight: float, **fields: Any) -> Any:
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = make_policy("tiny", num_steps=2)
    # Said here, for in LeRobot 0.4.4 and 0.5.1 it is off by default.
    policy.config.rtc_config = RTCConfig(
        enabled=True, execution_horizon=6, max_guidance_weight=weight,
        prefix_attention_schedule=RTCAttentionSchedule[schedule], **fields,
    )  # fmt: skip
    policy.init_rtc_processor()
    return policy


@pytest.mark.check(49)
@pytest.mark.parametrize(
    ("schedule", "weight", "calls"),
    [
        *(
            (schedule, weight, CALLS)
            for schedule, weight in zip(SCHEDULES, (1.0, 10.0, 1.0, 10.0), strict=True)
        ),
        ("LINEAR", 10.0, GRID),
    ],
)
def test_guided_chunks_are_stocks(schedule: str, weight: float, calls: list[dict[str, Any]]) -> None:
    """None, 2-D and 3-D, shorter, as long and as wide as a chunk; before the delay, at the horizon and beyond."""
    stock = _guided(schedule, weight)
    given, noise = make_observation(stock), make_noise(stock)
    exact, fp32 = (smolvla_fast.patch(copy.deepcopy(stock), precision=tier) for tier in ("exact", "fp32"))
    free, steered = chunk(stock, given, noise), 0
    for call in calls:
        shape = call["prev_chunk_left_over"]
        left = None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(9))
        kwargs: dict[str, Any] = {**call, "prev_chunk_left_over": left}
        wanted, kept = chunk(stock, given, noise, **kwargs), None if left is None else left.clone()
        steered += not torch.equal(wanted, free)
        assert torch.equal(chunk(exact, given, noise, **kwargs), wanted), call
        assert rel_l2(chunk(fp32, given, noise, **kwargs), wanted) <= FP32_BOUND, call
        assert left is None or torch.equal(left, kept), "what was left over is the caller's"
    # Nothing left over guides nothing, nor does schedule ZEROS without a delay.
    guided = [call for call in calls if call["prev_chunk_left_over"] is not None]
    assert steered == sum(schedule != "ZEROS" or call["inference_delay"] > 0 for call in guided)
    assert smolvla_fast.status(exact).calls_stock == smolvla_fast.status(fp32).calls_stock == 0


@pytest.mark.check(49)
@pytest.mark.usefixtures("recording")
def test_guided_chunks_share_a_graph() -> None:
    """Delay, horizon, length and values of the previous chunk change from call to call; the graph does not."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    pair = Captured(rtc_config=RTCConfig(enabled=True, execution_horizon=6), num_steps=2)
    for policy in (pair.plain, pair.policy):
        policy.init_rtc_processor()
    assert pair.same()
    for delay, length, horizon in ((0, 8, None), (3, 8, 5), (7, 4, 9)):
        previous = torch.randn(length, 6, generator=torch.Generator().manual_seed(delay))
        assert pair.same(inference_delay=delay, prev_chunk_left_over=previous, execution_horizon=horizon)
    assert pair.driver.captures == 2, "one with guidance, one without"
    for policy in (pair.plain, pair.policy):
        policy.config.rtc_config.max_guidance_weight = 1.5
    assert pair.same(inference_delay=2, prev_chunk_left_over=torch.ones(8, 6)) and pair.driver.captures == 2


@pytest.mark.check(51)
def test_guidance_runs_under_inference_mode() -> None:
    """Stock's autograd raises there; the closed form does not need it."""
    stock = _guided("LINEAR", 10.0)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision="exact")
    given, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(inference_delay=3, prev_chunk_left_over=torch.ones(8, 6))
    wanted = chunk(stock, given, noise, **kwargs)
    with torch.inference_mode():
        assert torch.equal(chunk(fast, given, noise, **kwargs), wanted)


@pytest.mark.check(50)
@pytest.mark.parametrize(
    ("shape", "delay", "error"),
    [((8, 6), None, TypeError), ((12, 32), 2, AssertionError), ((2, 8, 6), 2, RuntimeError)],
    ids=["no delay", "longer than a chunk", "another batch size"],
)
def test_bad_guidance_raises_as_in_stock(
    shape: tuple[int, ...], delay: int | None, error: type[Exception]
) -> None:
    stock = _guided("LINEAR", 10.0)
    fast = smolvla_fast.patch(copy.deepcopy(stock))
    given, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(prev_chunk_left_over=torch.ones(shape))
    if delay is not None:
        kwargs["inference_delay"] = delay
    for policy in (stock, fast):
        with pytest.raises(error):
            chunk(policy, given, noise, **kwargs)
    chunk(fast, given, noise)
    assert smolvla_fast.status(fast).calls_fast == 1


@pytest.mark.check(50)
def test_the_debug_tracker_runs_stock_with_full_records() -> None:
    stock = _guided("LINEAR", 10.0, debug=True)
    fast = smolvla_fast.patch(copy.deepcopy(stock), precision="exact")
    given, noise = make_observation(stock), make_noise(stock)
    kwargs: dict[str, Any] = dict(inference_delay=3, prev_chunk_left_over=torch.ones(8, 6))
    assert torch.equal(chunk(stock, given, noise, **kwargs), chunk(fast, given, noise, **kwargs))
    records = [len(p.model.rtc_processor.get_all_debug_steps()) for p in (stock, fast)]
    assert records[0] == records[1] > 0
    assert "debug tracker" in str(smolvla_fast.status(fast).last_fallback)
