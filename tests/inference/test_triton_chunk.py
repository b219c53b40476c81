"""A whole chunk through the Triton backend: under the interpreter where there is no GPU, in fp32 as it cannot do bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy, rel_l2

import smolvla_fast
from smolvla_fast.ops import defaults
from smolvla_fast.ops.availability import MIN_CAPABILITY, fallback_reasons, why_not
from smolvla_fast.ops.select import backend_ops, select
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.verify import FP32_BOUND

pytest.importorskip("triton")
pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[True, False], ids=["kernels alone", "as served"])
def kernels_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products of many rows in fp32 by our kernels too, or by torch as they are served."""
    if request.param:
        monkeypatch.setattr(defaults, "FP32_KERNEL_ROWS", 10**9)
    return request.param


SMALL: dict[str, Any] = dict(
    cameras=1, num_vlm_layers=2, num_steps=1, chunk_size=5, tokenizer_max_length=16,
    vision={"num_hidden_layers": 1, "image_size": 16},
)  # fmt: skip
"""The interpreter takes milliseconds for a program that a GPU runs in microseconds."""


@LEROBOT_ONLY
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        pytest.param(dict(attention_mode="self_attn"), marks=pytest.mark.long),
        pytest.param(dict(cameras=2, chunk_size=7), marks=pytest.mark.long),
        pytest.param(dict(self_attn_every_n_layers=0, expert_width_multiplier=0.5), marks=pytest.mark.long),
    ],
    ids=lambda settings: ",".join(map(str, settings.values())) or "default",
)
def test_a_chunk_by_kernels_is_within_the_bound(settings: dict[str, Any], kernels_alone: bool) -> None:
    policy = make_policy("tiny", device=DEVICE, **{**SMALL, **settings})
    given = make_observation(policy, batch=2, task="go", language_length=16)
    noise = make_noise(policy, batch=2)
    given["observation.language.attention_mask"][1, 2:] = False
    frames = {
        name: x.contiguous(memory_format=torch.channels_last) for name, x in given.items() if x.ndim == 4
    }
    given |= frames  # as .permute() leaves what a camera gives
    stock = chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision="fp32", backend="triton")
    fast = chunk(policy, given, noise)
    assert rel_l2(fast, stock) <= FP32_BOUND
    now = smolvla_fast.status(policy)
    assert (now.backend, now.calls_fast, now.calls_stock) == ("triton", 1, 0)
    assert now.step_launches == 2 + 5 * 2


@LEROBOT_ONLY
def test_a_guided_chunk_by_kernels_is_within_the_bound() -> None:
    configuration = pytest.importorskip("lerobot.policies.rtc.configuration_rtc")
    policy = make_policy(
        "tiny", device=DEVICE, rtc_config=configuration.RTCConfig(execution_horizon=4), **SMALL
    )
    policy.init_rtc_processor()
    given, noise = make_observation(policy, task="go", language_length=16), make_noise(policy)
    kwargs: dict[str, Any] = dict(
        inference_delay=2, prev_chunk_left_over=torch.ones(4, 6, device=DEVICE), execution_horizon=3
    )
    stock, unguided = chunk(policy, given, noise, **kwargs), chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision="fp32", backend="triton")
    assert rel_l2(chunk(policy, given, noise, **kwargs), stock) <= FP32_BOUND
    assert rel_l2(unguided, stock) > 1e-2, "guidance has no effect here: no test"


@pytest.mark.long  # that no kernel loses a NaN is seen kernel by kernel in tests/ops
@LEROBOT_ONLY
def test_nan_in_nan_out_and_the_next_chunk_is_clean() -> None:
    policy = make_policy("tiny", device=DEVICE, **SMALL)
    smolvla_fast.patch(policy, precision="fp32", backend="triton")
    given, noise = make_observation(policy, task="go", language_length=16), make_noise(policy)
    clean = chunk(policy, given, noise)
    bad = {name: value.clone() for name, value in given.items()}
    bad["observation.state"][0, 0] = torch.nan
    assert chunk(policy, bad, noise).isnan().any()
    assert torch.equal(chunk(policy, given, noise), clean)


@pytest.mark.check(4)
@LEROBOT_ONLY
def test_the_table_says_who_serves_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    backend_ops(
        "triton"
    )  # imported now, for kernels are made for the interpreter, or not, when they are imported
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "run on an NVIDIA GPU, the policy is on cpu" in str(why_not("triton", cpu))
    with pytest.raises(RuntimeError, match="cannot serve this policy: its kernels run on an NVIDIA GPU"):
        select("triton", cpu, stock_order=False)
    capability = [MIN_CAPABILITY]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[0])
    assert select("auto", cuda, False).backend == "triton" and fallback_reasons(cuda) == {}
    capability[0] = (7, 5)
    assert select("auto", cuda, False).backend == "torch"
    assert fallback_reasons(cuda) == {
        "triton": "compute capability 7.5 has no bf16 tensor cores; accepted is 8.0 and later"
    }
    capability[0] = MIN_CAPABILITY
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "Triton is not installed" in fallback_reasons(cuda)["triton"]


@pytest.mark.long
@LEROBOT_ONLY
def test_fp8_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near stock, far from equal to it, and the next chunk after an averaging of weights is computed from new copies."""
    from dataclasses import replace

    from smolvla_fast.model.precision import TIERS

    if DEVICE == "cpu":  # the interpreter cannot multiply bf16, the dtype of all the rest in this tier
        monkeypatch.setitem(TIERS, "fp8", replace(TIERS["fp8"], gemm_dtype=torch.float32))
    policy = make_policy("tiny", device=DEVICE, **SMALL)
    given, noise = make_observation(policy, task="go", language_length=16), make_noise(policy)
    stock = chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision="fp8")
    fast = chunk(policy, given, noise)
    assert torch.cosine_similarity(fast.flatten(), stock.flatten(), dim=0) >= 0.99  # the tier's own bound
    assert rel_l2(fast, stock) > 1e-3, "nothing was quantised"
    now = smolvla_fast.status(policy)
    assert (now.precision, now.backend, now.calls_stock) == ("fp8", "triton", 0)
    matrices = sum(p.numel() for n, p in policy.named_parameters() if p.ndim == 2 and "layers" in n)
    assert now.extra_bytes >= 0.8 * matrices, "copies are not reported"
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.copy_(parameter.data * 1.05)
    smolvla_fast.unpatch(policy)
    changed = chunk(policy, given, noise)
    smolvla_fast.patch(policy, precision="fp8")
    chunk(policy, given, noise)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data.copy_(parameter.data / 1.05)
    again = chunk(policy, given, noise)
    assert rel_l2(again, fast) < 1e-3 < rel_l2(changed, stock), "a stale copy was read"
