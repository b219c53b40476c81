"""Whole chunks through ``patch(policy, backend="cuda")``, the denoise loop in one launch among them, on the emulator."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simt import on_the_host
from support.recorder import RecordedLibrary, RecorderDriver
from torch import Tensor

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine import products
from smolvla_fast.ops.cuda import library
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.verify import rel_l2

pytestmark = pytest.mark.usefixtures("emulator", "bf16_products")
SMALL: dict[str, Any] = dict(
    cameras=1, num_vlm_layers=2, num_steps=2, chunk_size=5, tokenizer_max_length=16, expert_width_multiplier=1.0,
    vision={"num_hidden_layers": 1, "image_size": 16},
)  # fmt: skip
"""The emulator runs thread by thread. The expert of a tiny policy is else 36 wide, which one launch does not serve."""


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor that is slow at them as well: else there would be no bf16 weights for the kernels."""
    monkeypatch.setattr(products, "why_bf16_is_slow", lambda: None)


def make(**settings: Any) -> Any:
    return make_policy("tiny", **{"origin": "ours", **SMALL, **settings})


def chunk(policy: Any, observation: dict[str, Tensor], noise: Tensor, **kwargs: Any) -> Tensor:
    return policy.predict_action_chunk({k: v.clone() for k, v in observation.items()}, noise=noise, **kwargs)


def feed(policy: Any, batch: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """An observation whose second sample has a shorter task, and noise."""
    given = make_observation(policy, batch=batch, task="go", language_length=16)
    given["observation.language.attention_mask"][1:, 1:] = False
    return given, make_noise(policy, batch=batch)


def in_one_launch(policy: Any) -> None:
    now = smolvla_fast.status(policy)
    assert now.stages == {"vision": "torch", "prefix": "cuda, torch", "denoise": "cuda"}, now.fallback_reasons
    assert (now.backend, now.precision, now.step_launches, now.fallback_reasons) == ("cuda", "bf16", 0, {})
    assert now.calls_stock == 0, now.last_fallback


def as_right_as_torch(policy: Any, given: Any, noise: Tensor, **kwargs: Any) -> Tensor:
    """The chunk of ``cuda``; its error to fp32 is at most twice that of ``torch``, which computes in bf16 as well."""
    truth = chunk(smolvla_fast.unpatch(copy.deepcopy(policy)).float(), given, noise, **kwargs)
    smolvla_fast.patch(policy, precision="bf16", backend="torch")
    by_torch = rel_l2(chunk(policy, given, noise, **kwargs), truth)
    smolvla_fast.patch(policy, precision="bf16", backend="cuda")
    ours = chunk(policy, given, noise, **kwargs)
    error = rel_l2(ours, truth)
    print(f"relative L2 to fp32: cuda {error:.3g}, torch {by_torch:.3g}")
    assert 0 < error <= 2 * by_torch
    return ours


@pytest.mark.parametrize(
    "settings",
    [
        dict(layout="fp32"),
        dict(layout="mixed", chunk_size=7),
        dict(layout="mixed", attention_mode="self_attn", num_steps=1),
        dict(layout="mixed", self_attn_every_n_layers=0, expert_width_multiplier=0.5, num_steps=1),
        dict(layout="mixed", num_vlm_layers=4, self_attn_every_n_layers=3, num_steps=1),
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_a_chunk_in_one_launch_errs_no_more_than_torch(settings: dict[str, Any]) -> None:
    """Weights in bf16, and copies of them where they are stored in fp32; every pattern of self and cross layers."""
    policy = make(**settings)
    given, noise = feed(policy, batch=2)
    before = noise.clone()
    ours = as_right_as_torch(policy, given, noise)
    in_one_launch(policy)
    assert torch.equal(noise, before) and torch.equal(chunk(policy, given, noise), ours)


def test_a_guided_chunk_in_one_launch_errs_no_more_than_torch() -> None:
    from smolvla_fast.smolvla.rtc import RTCConfig

    policy = make(layout="mixed", rtc_config=RTCConfig(execution_horizon=4))
    policy.init_rtc_processor()
    given, noise = feed(policy)
    kwargs: dict[str, Any] = dict(
        inference_delay=2, prev_chunk_left_over=torch.ones(4, 6), execution_horizon=3
    )
    guided = as_right_as_torch(policy, given, noise, **kwargs)
    in_one_launch(policy)
    assert rel_l2(chunk(policy, given, noise), guided) > 1e-2, "guidance has no effect here: no test"


def test_nan_in_nan_out_and_the_next_chunk_is_clean() -> None:
    policy = smolvla_fast.patch(make(layout="mixed", num_steps=1), precision="bf16", backend="cuda")
    given, noise = feed(policy)
    clean = chunk(policy, given, noise)
    bad = {**given, "observation.state": torch.full_like(given["observation.state"], torch.nan)}
    assert chunk(policy, bad, noise).isnan().any()
    in_one_launch(policy)
    assert torch.equal(chunk(policy, given, noise), clean)


@pytest.mark.parametrize(
    ("settings", "precision", "reason"),
    [
        (dict(layout="mixed", expert_width_multiplier=0.75), "bf16", "widths are 36 and"),
        pytest.param(dict(layout="fp32"), "fp32", "float32; accepted: bfloat16", marks=pytest.mark.long),
    ],
    ids=["width", "fp32 weights"],
)
def test_what_one_launch_does_not_serve_runs_op_by_op(
    settings: dict[str, Any], precision: str, reason: str
) -> None:
    """By the single ops, with the reason in ``status``; stock is not asked. All reasons: test_denoise_persistent.py."""
    policy = make(num_steps=1, **settings)
    given, noise = feed(policy)
    smolvla_fast.patch(policy, precision=precision, backend="torch")
    by_torch = chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision=precision, backend="cuda")
    ours = chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert reason in now.fallback_reasons["denoise_persistent"]
    assert now.stages["denoise"] == "cuda, torch" and (now.calls_fast, now.calls_stock) == (2, 0)
    # One bf16 rounding apart at most: a wrong op shows at 1e-1.
    assert rel_l2(ours, by_torch) < (1e-5 if precision == "fp32" else 2e-2)


def test_a_gpu_too_small_for_one_launch(emulator: Any) -> None:
    """Asked anew at every chunk that is not a replay: a receipt while it does not fit, none when it does."""
    policy = smolvla_fast.patch(make(layout="mixed", num_steps=1), precision="bf16", backend="cuda")
    given, noise = feed(policy)
    whole = chunk(policy, given, noise)
    in_one_launch(policy)
    emulator.configure(shared_bytes_per_block=38 << 10)  # enough for the attention kernel
    steps = chunk(policy, given, noise)
    now = smolvla_fast.status(policy)
    assert "a block's shared memory" in now.fallback_reasons["denoise_persistent"] and now.calls_stock == 0
    assert 0 < rel_l2(steps, whole) < 2e-2  # bf16 rounds elsewhere, as above
    emulator.reset()
    assert torch.equal(chunk(policy, given, noise), whole)
    in_one_launch(policy)


def test_equal_bits_whatever_the_order_and_the_gpu(emulator: Any, over_seeds: Any) -> None:
    policy = smolvla_fast.patch(make(layout="mixed"), precision="bf16", backend="cuda")
    given, noise = feed(policy, batch=2)
    first, *others = over_seeds(lambda: chunk(policy, given, noise))
    assert all(torch.equal(other, first) for other in others)
    for multiprocessors in (1, 3, 13):
        emulator.configure(multiprocessors=multiprocessors)
        assert torch.equal(chunk(policy, given, noise), first), multiprocessors
    in_one_launch(policy)


def test_bytes_of_a_camera() -> None:
    """``image_prep`` is of the backend too: uint8 frames of another size than the tower's."""
    policy = make(layout="mixed", num_steps=1)
    frames = torch.randint(
        0, 256, (1, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    given, noise = feed(policy)
    tokens = (given[f"observation.language.{name}"] for name in ("tokens", "attention_mask"))
    inputs = ([frames], [torch.ones(1, dtype=torch.bool)], *tokens, policy.prepare_state(given))
    found = []
    for backend in ("torch", "cuda"):
        smolvla_fast.patch(policy, precision="bf16", backend=backend)
        with torch.no_grad():
            found.append(policy.model.sample_actions(*inputs, noise=noise))
    in_one_launch(policy)
    assert 0 < rel_l2(found[1], found[0]) < 2e-2  # bf16 rounds elsewhere, as above


def test_a_captured_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded addresses launched again: equal bits, new inputs and edited weights seen, nothing left to the host. The
    weights are fp32, so the kernels read bf16 copies, which are made inside the recording."""
    on_the_host.install(monkeypatch, RecordedLibrary(library.library(torch.device("cpu"))))
    policy = make(layout="fp32", num_steps=1)
    given, noise = feed(policy)
    other = make_noise(policy, seed=3)

    def plain(observation: Any, noise: Tensor) -> Tensor:
        twin = smolvla_fast.unpatch(copy.deepcopy(policy))
        return chunk(smolvla_fast.patch(twin, precision="bf16", backend="cuda"), observation, noise)

    wanted = [plain(given, noise), plain(given, other)]
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())
    smolvla_fast.patch(policy, precision="bf16", backend="cuda")
    assert torch.equal(chunk(policy, given, noise), wanted[0])
    assert torch.equal(chunk(policy, given, other), wanted[1])
    in_one_launch(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.copy_(parameter.data * 1.02)
    edited = chunk(policy, given, noise)
    driver = smolvla_fast.patch.__globals__["engine_of"](policy.model).graphs._driver
    assert (driver.captures, driver.replays) == (1, 3)
    monkeypatch.setattr(inference, "driver_for", lambda device: None)
    assert torch.equal(edited, plain(given, noise)) and not torch.equal(edited, wanted[0])
