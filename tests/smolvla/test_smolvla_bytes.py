"""Camera frames as bytes: read by our own policy, resized and scaled by the engine of a patched one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import smolvla_fast
from smolvla_fast.patching.inputs import chunk_inputs
from smolvla_fast.patching.tuning import tune_policy
from smolvla_fast.smolvla import prepare_observation_for_inference
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

CAMERAS = ("observation.images.camera1", "observation.images.camera2")


def _batches(policy: Any, *size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same frames as floats and as bytes."""
    rng = np.random.default_rng(0)
    frames = {key: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for key in CAMERAS}
    rest = {k: v for k, v in make_observation(policy).items() if "image" not in k}
    made = []
    for keep_bytes in (False, True):
        prepared = prepare_observation_for_inference(frames, keep_bytes=keep_bytes)
        made.append({**rest, **{key: prepared[key] for key in CAMERAS}})
    assert made[1][CAMERAS[0]].dtype is torch.uint8 and made[1][CAMERAS[0]].shape == (1, *size, 3)
    return made[0], made[1]


@pytest.mark.parametrize("size", [(24, 32), (32, 32), (57, 31)], ids=str)
@pytest.mark.parametrize("precision", [None, "exact", "fp32"])
def test_bytes_give_what_floats_give(size: tuple[int, int], precision: str | None) -> None:
    policy = make_policy("tiny", origin="ours")
    floats, frames = _batches(policy, *size)
    noise = make_noise(policy)
    wanted = policy.predict_action_chunk(dict(floats), noise=noise)
    if precision is not None:
        smolvla_fast.patch(policy, precision=precision)
    got = policy.predict_action_chunk(dict(frames), noise=noise)
    if precision == "fp32":
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()  # the bound of the tier
    else:
        assert torch.equal(got, wanted)
    if precision is not None:
        assert smolvla_fast.status(policy).calls_fast == 1


def test_bytes_reach_stock_as_floats() -> None:
    """A call that falls back is given what it can read."""
    policy = make_policy("tiny", origin="ours")
    floats, frames = _batches(policy, 24, 32)
    noise = make_noise(policy)
    wanted = policy.predict_action_chunk(dict(floats), noise=noise)
    smolvla_fast.patch(policy)
    policy.model.vlm_with_expert.lm_expert.norm.register_forward_hook(lambda *_: None)
    assert torch.equal(policy.predict_action_chunk(dict(frames), noise=noise), wanted)
    assert smolvla_fast.status(policy).calls_stock == 1


def test_bytes_work_beside_absent_cameras() -> None:
    policy = make_policy("tiny", origin="ours", cameras=3, empty_cameras=1)
    floats, frames = _batches(policy, 24, 32)
    noise = make_noise(policy)
    wanted = policy.predict_action_chunk(dict(floats), noise=noise)
    for precision in ("exact", "fp32"):
        smolvla_fast.patch(policy, precision=precision)
        got = policy.predict_action_chunk(dict(frames), noise=noise)
        assert torch.equal(got, wanted) or (
            precision == "fp32" and (got - wanted).norm() < 1e-5 * wanted.norm()
        )


def test_bytes_mean_nothing_to_lerobots_own_model() -> None:
    """There they are images whose values happen to be whole: stock computes what stock computes."""
    policy = make_policy("tiny")
    given, noise = make_observation(policy), make_noise(policy)
    images, masks = policy.prepare_images(given)
    inputs = (
        [image.to(torch.uint8) for image in images], masks,
        given["observation.language.tokens"], given["observation.language.attention_mask"],
        policy.prepare_state(given),
    )  # fmt: skip
    with torch.no_grad():
        wanted = policy.model.sample_actions(*inputs, noise=noise)
        smolvla_fast.patch(policy)
        assert torch.equal(policy.model.sample_actions(*inputs, noise=noise), wanted)
    assert "uint8; floating point is accepted" in str(smolvla_fast.status(policy).last_fallback)


@pytest.mark.parametrize("training", [False, True])
def test_a_loss_of_bytes_is_that_of_floats(training: bool) -> None:
    policy = make_policy("tiny", origin="ours")
    shape = (1, policy.config.chunk_size, policy.config.action_feature.shape[0])
    action = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    floats, frames = ({**each, "action": action} for each in _batches(policy, 24, 32))
    given = dict(noise=make_noise(policy), time=torch.full((1,), 0.5))
    wanted = policy.forward(floats, **given)[0]
    smolvla_fast.patch(policy, training=training)
    got = policy.forward(frames, **given)[0]
    if training:
        assert smolvla_fast.status(policy).training_fast == 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)  # tier fp32's bound: sums in another order


@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_a_prefix_of_bytes_is_that_of_floats(precision: str) -> None:
    """For samplers of one's own: by the engine, as a chunk is."""
    policy = make_policy("tiny", origin="ours")
    floats, frames = _batches(policy, 24, 32)
    with torch.no_grad():
        wanted = policy.model.embed_prefix(*chunk_inputs(policy, floats))[0]
        smolvla_fast.patch(policy, precision=precision)
        got = policy.model.embed_prefix(*chunk_inputs(policy, frames))[0]
    assert torch.equal(got, wanted) or precision == "fp32"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))  # the tier's bound
    assert smolvla_fast.status(policy).layers_fast == {"embed_prefix": 1}


def test_bytes_are_judged_and_tuned_by_what_stock_makes_of_them() -> None:
    policy = smolvla_fast.patch(make_policy("tiny", origin="ours", layout="mixed"))
    floats, frames = _batches(policy, 24, 32)
    found, wanted = (smolvla_fast.verify(policy, each) for each in (frames, floats))
    assert found.passed and found == wanted
    assert tune_policy(policy, frames, seconds=1.0).stock_ms is not None
