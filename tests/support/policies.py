"""Tiny SmolVLA policies, LeRobot's and ours, and what they are fed: shared by the folders that test the engine."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip(
    "lerobot.policies.smolvla.modeling_smolvla", reason="parity is against LeRobot's own classes"
)

from smolvla_fast import inference
from smolvla_fast.engine import products
from smolvla_fast.model.precision import Tier
from smolvla_fast.testing import policies
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import rel_l2 as rel_l2
from support.copies import Original

TIERS = ["exact", "fp32", "bf16"]
_origin = "lerobot"


@pytest.fixture(params=["lerobot", pytest.param("ours", marks=pytest.mark.long)])
def origin(request: pytest.FixtureRequest) -> Any:
    """Whose class ``make_policy`` builds: LeRobot's, and in ``make test-full`` ours as well.

    That our own model answers as LeRobot's does is the business of tests/smolvla.
    """
    global _origin
    _origin = request.param
    yield _origin
    _origin = "lerobot"


LEROBOT_ONLY = pytest.mark.parametrize("origin", ["lerobot"], indirect=True)
"""For what is true of LeRobot's classes alone: their base class, their source, their looser checks. Our own model also
shares its maths with the references, so a change to those cannot be told apart from it."""


BOTH = pytest.mark.parametrize("origin", ["lerobot", "ours"], indirect=True)
"""For where the engine may read one class otherwise than the other: in ``make test`` too."""


_made: dict[str, Original] = {}
MOST_MADE = 64


def make_policy(size: str, **settings: Any) -> Any:
    """``smolvla_fast.testing.policies.make_policy`` of the class under test; tiny ones are copies of one made before."""
    try:
        key = f"{_origin} {settings}" if json.dumps(settings) and size == "tiny" else ""
    except TypeError:  # an object, whose name says nothing of what it holds
        key = ""
    if not key or "compile_model" in settings:
        return policies.make_policy(size, origin=_origin, **settings)
    if key not in _made:
        if len(_made) == MOST_MADE:
            _made.clear()
        _made[key] = Original(policies.make_policy(size, origin=_origin, **settings))
    return _made[key].copy()


def chunk(policy: Any, observation: dict[str, Tensor], noise: Tensor | None = None, **kwargs: Any) -> Tensor:
    """One chunk from copies of the inputs, since Aloha policies flip the state they are given in place."""
    copies = {key: value.clone() for key, value in observation.items()}
    return policy.predict_action_chunk(copies, noise=noise, **kwargs)


def model_inputs(policy: Any, observation: dict[str, Tensor]) -> tuple[Any, ...]:
    """What ``policy.model.sample_actions`` takes: images, their masks, tokens, their masks, state."""
    images, masks = policy.prepare_images(observation)
    tokens, token_masks = (
        observation[f"observation.language.{name}"] for name in ("tokens", "attention_mask")
    )
    return images, masks, tokens, token_masks, policy.prepare_state(observation)


def chunk_in_fp64(model: Any, inputs: tuple[Any, ...], noise: Tensor) -> Tensor:
    """The truth for a chunk from ``model_inputs``: the references follow the dtype they are given."""
    images, masks, tokens, token_masks, state = inputs
    engine = inference.Engine(Tier("fp64", gemm_dtype=None, stock_order=True), "auto", torch.device("cpu"))
    wide = [image.double() for image in images]
    model = copy.deepcopy(model).double()
    return engine.act(model, wide, masks, tokens, token_masks, state.double(), noise.double())


@pytest.fixture
def policy(origin: str) -> Any:
    """Three steps show whatever ten would."""
    return make_policy("tiny", num_steps=3)


@pytest.fixture
def observation(policy: Any) -> dict[str, Tensor]:
    return make_observation(policy)


@pytest.fixture
def noise(policy: Any) -> Tensor:
    return make_noise(policy)


@pytest.fixture(autouse=True)
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of the bf16 tier in bf16 on every processor, so that its numerics are tested everywhere."""
    monkeypatch.setattr(products, "why_bf16_is_slow", lambda: None)


@pytest.fixture(autouse=True)
def few_threads() -> Any:
    """Tiny matrices on one thread: the tests are then an order of magnitude faster on a shared machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
