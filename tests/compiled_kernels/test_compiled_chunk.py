"""A whole tiny chunk and a tiny training step in bf16 by compiled kernels, beside the torch backend and LeRobot's class."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from support import triton_by

pytest.importorskip("triton")
pytest.importorskip("lerobot")
if not triton_by.CAPABILITY:
    pytest.skip("the machine of tests/simt/ptx does not run here", allow_module_level=True)
from simt.ptx import launcher
from support.gemms import module
from support.policies import chunk, rel_l2
from support.recorder import RecorderDriver, recorded
from support.streams import Streams
from support.train_steps import distance, make_batch, step

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine import products
from smolvla_fast.engine.side_stream import offered
from smolvla_fast.kernels.tiles import GemmTile
from smolvla_fast.loss import engine as loss_module
from smolvla_fast.patch import engine_of
from smolvla_fast.patching.inputs import made_inputs
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

pytestmark = pytest.mark.compiled_kernels
SMALL: dict[str, Any] = dict(
    origin="lerobot", cameras=2, num_vlm_layers=2, num_steps=2, chunk_size=5, tokenizer_max_length=16, layout="mixed",
    vision={"num_hidden_layers": 1, "image_size": 32},
)  # fmt: skip


@pytest.fixture(params=[pytest.param(80, marks=pytest.mark.long), 90], ids=["sm_80", "sm_90"], autouse=True)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Bf16 is what a GPU multiplies, whatever this processor does.
    monkeypatch.setattr(products, "why_bf16_is_slow", lambda: None)
    with launcher.machine(request.param):
        yield request.param


# Neither the second observation nor guidance asks for the other: apart they are for `make test-full`. One observation
# alone is computed below.
@pytest.mark.parametrize(
    ("precision", "batch", "guided"),
    [
        pytest.param(
            precision,
            batch,
            guided,
            id=f"{precision}-{batch}-{how}",
            marks=[pytest.mark.long] * (not guided or batch == 1 or precision == "fp8"),
        )
        for precision in ("bf16", "fp8")
        for batch in (1, 2)
        for guided, how in ((False, "plain"), (True, "guided"))
    ],
)
def test_a_chunk(precision: str, batch: int, guided: bool, architecture: int) -> None:
    """As far from fp32 as the torch backend in bf16, within 1.5: two orders of rounding scatter (``judge.SCATTER``)."""
    if precision == "fp8" and architecture < 89:
        pytest.skip("8-bit floats are compiled from sm_89 on")
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = make_policy("tiny", rtc_config=RTCConfig(execution_horizon=4), **SMALL)
    policy.init_rtc_processor()
    given = make_observation(policy, batch=batch, task="go", language_length=16)
    noise = make_noise(policy, batch=batch)
    if batch > 1:
        given["observation.language.attention_mask"][1, 2:] = False
    kwargs = (
        dict(inference_delay=2, prev_chunk_left_over=torch.ones(4, 6), execution_horizon=3) if guided else {}
    )
    found = {}
    for name, wishes in (
        ("fp32", dict(precision="fp32", backend="torch")),
        ("torch", dict(precision="bf16", backend="torch")),
        ("kernels", dict(precision=precision, backend="triton")),
    ):
        smolvla_fast.patch(policy, **wishes)
        before = launcher.launched.total()
        found[name] = chunk(policy, given, noise, **kwargs)
        assert (launcher.launched.total() > before) == (name == "kernels")
        assert smolvla_fast.status(policy).last_fallback is None
    stock = chunk(smolvla_fast.unpatch(policy), given, noise, **kwargs)
    lost = max(rel_l2(found["torch"], found["fp32"]), rel_l2(stock, found["fp32"]))
    error = rel_l2(found["kernels"], found["fp32"])
    if precision == "bf16":
        assert 0 < error <= 1.5 * lost, (error, lost)
    else:
        similar = torch.nn.functional.cosine_similarity
        assert similar(found["kernels"].flatten(), found["fp32"].flatten(), dim=0) >= 0.99 and error > 1e-3


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_launches_in_the_order_of_a_graph(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph keeps are the addresses of its launches: run again on other inputs, they give what a plain run gives.

    Nobody but the launches writes into the counters of split sums: each finds what the last one left.
    """
    counters, taken = torch.zeros(4096, dtype=torch.int32), []

    def split_workspace(
        tiles: int, split: int, size: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(tiles)
        return torch.empty(tiles * split * size), counters[sum(taken[:-1]) :][:tiles]

    for op in ("linear_residual", "pixel_shuffle_linear", "attention_residual"):
        monkeypatch.setattr(module(op), "split_workspace", split_workspace)
    # One product at least shares its sums, whatever tiles are ranked first.
    tile = GemmTile(16, 32, 32, 2, 8, 4, 2)
    monkeypatch.setattr(module("pixel_shuffle_linear"), "gemm_tile", lambda *sizes, **more: tile)
    policy = make_policy("tiny", **SMALL)
    smolvla_fast.patch(policy, precision=precision, backend="triton")
    given = [make_observation(policy, seed=seed, task="go", language_length=16) for seed in range(3)]
    noise = [make_noise(policy, seed=seed) for seed in range(3)]
    plain = [chunk(policy, *each) for each in zip(given, noise, strict=True)]
    monkeypatch.setattr(launcher.Launcher, "__call__", recorded(launcher.Launcher.__call__))
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())
    smolvla_fast.patch(smolvla_fast.unpatch(policy), precision=precision, backend="triton")
    for each in range(3):
        assert torch.equal(chunk(policy, given[each], noise[each]), plain[each])
    driver = engine_of(policy.model).graphs._driver
    assert (driver.captures, driver.replays) == (1, 3)
    assert taken and not counters.any()


def test_the_first_step_beside_the_prefix(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of the plain order, in an order that is right on two streams: whatever a launch is given, it may write.

    Those are as far from fp32 as the torch backend's in bf16, within 1.5, as in ``test_a_chunk``.
    """
    if architecture < 90:
        pytest.skip("the order is that of sm_90")
    policy = make_policy("tiny", **{**SMALL, "num_vlm_layers": 3, "num_steps": 1})
    given = (policy.model, *made_inputs(policy.model), make_noise(policy))
    found = []
    for precision, backend in (("fp32", "torch"), ("bf16", "torch"), ("bf16", "triton")):
        smolvla_fast.patch(policy, precision=precision, backend=backend)
        engine = engine_of(policy.model)
        found.append(engine.act(*given))
    truth, by_torch, plain = found
    assert 0 < rel_l2(plain, truth) <= 1.5 * rel_l2(by_torch, truth)
    streams, launches = Streams(monkeypatch), []

    def launch(self: launcher.Launcher, *args: Any) -> None:
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        streams.queue("a launch", tensors, tensors)
        launches.append((streams.current.name, self._metadata.launch_pdl))
        run(self, *args)

    run = launcher.Launcher.__call__
    monkeypatch.setattr(launcher.Launcher, "__call__", launch)
    with streams, offered(streams.side):
        beside = engine.act(*given)
    assert torch.equal(beside, plain)
    turns = [list(each) for _, each in groupby(launches, lambda launch: launch[0])]
    # Text layers 0 and 1 beside those of the expert, and the suffix ahead of them.
    assert [each[0][0] for each in turns] == ["main", "side"] * 3 + ["main"]
    for side in turns[1::2]:
        assert not side[0][1], "behind an event"
        assert any(early for _, early in side[1:])


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.long), 2])
def test_a_training_step(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast in bf16, as far from stock in fp32 as stock is, within 1.5."""
    monkeypatch.setattr(loss_module, "why_bf16_is_slow", lambda: None)
    policy = make_policy("tiny", **{**SMALL, "cameras": 1}).train()
    given = make_batch(policy, batch=batch, task="go", language_length=8)
    truth, stock = step(policy, given), step(policy, given, autocast=True)
    smolvla_fast.patch(policy, training=True, backend="triton")
    before = launcher.launched.copy()
    ours = step(policy, given, autocast=True)
    ran = {name for name, count in launcher.launched.items() if count > before[name]}
    assert smolvla_fast.status(policy).training_fast == 1
    assert {"_masked_attention_backward_rows", "_masked_attention_backward_keys", "_flow_loss_bwd"} <= ran
    assert ours.gradients.keys() == truth.gradients.keys()
    assert 0 < distance(ours.gradients, truth.gradients) <= 1.5 * distance(stock.gradients, truth.gradients)
    # Of one number the errors of two orders may cancel or add up: five units in the last place of bf16.
    torch.testing.assert_close(ours.loss, truth.loss, rtol=2e-2, atol=0)
