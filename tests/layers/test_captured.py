"""``captured``: a user's own sampler as a graph, with the checks and the undo of a chunk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.layer_calls import forward, given
from support.policies import LEROBOT_ONLY, make_policy, model_inputs, rel_l2
from support.recorder import RecorderDriver
from torch import Tensor

import smolvla_fast
from examples.custom_sampler import heun, main
from smolvla_fast.layers import caches
from smolvla_fast.patching import captured as module
from smolvla_fast.testing.policies import make_noise, make_observation

pytestmark = LEROBOT_ONLY


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "driver_for", lambda device: RecorderDriver())


class Sampler:
    """Heun's sampler on a patched policy, captured, and on a plain patched twin."""

    def __init__(self, precision: str = "fp32") -> None:
        self.policy = make_policy("tiny")
        self.stock = copy.deepcopy(self.policy)
        smolvla_fast.patch(self.policy, precision=precision, backend="torch")
        self.call = smolvla_fast.captured(self.policy, lambda *given: heun(self.policy, *given))

    def inputs(self, seed: int = 0, batch: int = 1) -> tuple[Any, ...]:
        observation = make_observation(self.policy, seed=seed, batch=batch)
        return *model_inputs(self.policy, observation), make_noise(self.policy, seed=seed, batch=batch)

    def right(self, *given: Any) -> bool:
        """Whether the captured call answers as the function itself does, and as stock does."""
        given = given or self.inputs()
        with torch.no_grad():
            found = self.call(*given)
            # Another order of fp32 sums; see test_layer_parity.
            return (
                torch.equal(found, heun(self.policy, *given))
                and rel_l2(found, heun(self.stock, *given)) < 1e-5
            )

    @property
    def driver(self) -> Any:
        return self.call._graphs()._driver


@pytest.mark.usefixtures("recording")
def test_a_sampler_is_captured_once_for_a_shape() -> None:
    sampler = Sampler()
    for seed in (0, 1, 2):
        assert sampler.right(*sampler.inputs(seed))
    assert (sampler.driver.captures, sampler.driver.replays) == (1, 3)
    assert sampler.right(*sampler.inputs(batch=2)) and sampler.driver.captures == 2
    assert sampler.right(*sampler.inputs(), 3) and sampler.driver.captures == 3, "another number of steps"
    now = smolvla_fast.status(sampler.policy)
    assert now.graphs == 3 and now.graph_bytes > 0 and sampler.call.last_fallback is None


@pytest.mark.usefixtures("recording")
def test_changes_of_the_policy_show() -> None:
    sampler = Sampler()
    assert sampler.right()
    layer, twin = (p.model.vlm_with_expert.lm_expert.layers[1] for p in (sampler.policy, sampler.stock))
    with torch.no_grad():
        for each in (layer, twin):
            each.mlp.up_proj.weight.mul_(1.1)
    assert sampler.right() and sampler.driver.captures == 1, "weights are read where they lie"
    with torch.no_grad():
        for each in (layer, twin):
            each.mlp.up_proj.weight = torch.nn.Parameter(1.1 * each.mlp.up_proj.weight)
    assert sampler.right() and sampler.driver.captures == 2, "a replaced parameter"
    for each in (layer, twin):
        each.mlp = copy.deepcopy(each.mlp)
    assert sampler.right() and sampler.driver.captures == 3, "a replaced module"
    hooks = [each.mlp.register_forward_hook(lambda m, i, out: 1.5 * out) for each in (layer, twin)]
    assert sampler.right(), "a hook: stock's layers, captured or not"
    for each in hooks:
        each.remove()
    assert sampler.right()


@pytest.mark.usefixtures("recording")
def test_no_parameter_is_asked_for_gradients_where_these_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, asked = Sampler(), []
    cls = type(sampler.policy.model)
    plain = cls.parameters

    def counted(self: Any) -> Any:
        for each in plain(self):
            asked.append(each)
            yield each

    monkeypatch.setattr(cls, "parameters", counted)
    with torch.no_grad():
        assert sampler.call._reason((sampler.inputs(), {})) is None
    assert len(asked) <= 2, "the first alone, whose device is read"
    assert "gradients are on" in str(sampler.call._reason((sampler.inputs(), {})))


@pytest.mark.usefixtures("recording")
def test_settings_of_the_configuration_show() -> None:
    sampler = Sampler()
    assert sampler.right()
    for each in (sampler.policy, sampler.stock):
        each.config.min_period = each.model.config.min_period = 0.1
    assert sampler.right() and sampler.driver.captures == 2


@pytest.mark.usefixtures("recording")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cache_from_outside_is_read_as_it_is(precision: str) -> None:
    """A step over a cache that the function closes over: what is derived of it and of weights is derived in the graph."""
    sampler = Sampler(precision)
    policy, pair = sampler.policy, sampler.policy.model.vlm_with_expert
    inputs = given(policy, make_observation(policy), make_noise(policy))
    with torch.no_grad():
        _, cache = forward(pair, inputs.prefix_call, [inputs.prefix, None], fill=True)
        step = lambda x, time: policy.model.denoise_step(inputs.pads, cache, x, time)  # noqa: E731
        step(inputs.x, inputs.time)  # a note of the cache, made outside
        call = smolvla_fast.captured(policy, step)
        layer = pair.lm_expert.layers[1]
        for change in (
            lambda: None,
            lambda: caches.held(cache, 1)[0].mul_(1.1),
            lambda: caches.held(cache, 0)[0].mul_(1.1),
            lambda: layer.self_attn.k_proj.weight.mul_(1.1),
            lambda: layer.mlp.up_proj.weight.mul_(1.1),
        ):
            change()
            assert (
                torch.equal(call(inputs.x, inputs.time), step(inputs.x, inputs.time))
                and call.last_fallback is None
            )


@pytest.mark.usefixtures("recording")
def test_undo_gives_the_memory_back() -> None:
    sampler = Sampler()
    assert sampler.right()
    smolvla_fast.refresh(sampler.policy)
    assert smolvla_fast.status(sampler.policy).graphs == 0 and sampler.right()
    graphs = sampler.call._graphs()
    smolvla_fast.unpatch(sampler.policy)
    assert graphs.count == 0
    with torch.no_grad():
        given = sampler.inputs()
        assert torch.equal(sampler.call(*given), heun(sampler.stock, *given)), "stock's sampler again"
    assert sampler.call.last_fallback == "the policy is not patched"
    smolvla_fast.patch(sampler.policy, precision="fp32", backend="torch")
    assert sampler.right() and smolvla_fast.status(sampler.policy).graphs == 1, (
        "patched again, captured again"
    )
    smolvla_fast.unpatch(sampler.policy)
    assert graphs.count == 0


@pytest.mark.usefixtures("recording")
def test_what_cannot_be_captured_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler()
    call = smolvla_fast.captured(sampler.policy, lambda x: x + float(x.sum().item()))
    with torch.no_grad():
        assert torch.equal(call(torch.ones(3)), torch.full((3,), 4.0)) and "waits for the device" in str(
            call.last_fallback
        )
        pair = smolvla_fast.captured(sampler.policy, lambda x: (x, x))
        assert isinstance(pair(torch.ones(3)), tuple) and "one tensor" in str(pair.last_fallback)
        other = smolvla_fast.captured(sampler.policy, lambda x, names: x)
        assert torch.equal(other(torch.ones(3), {1, 2}), torch.ones(3)) and "by value" in str(
            other.last_fallback
        )
        named = smolvla_fast.captured(sampler.policy, lambda x, scale: scale * x)
        assert torch.equal(named(torch.ones(3), scale=2), 2 * torch.ones(3)) and named.last_fallback is None
    grown = sampler.call(*sampler.inputs())
    assert grown.requires_grad and "gradients" in str(sampler.call.last_fallback), (
        "with gradients it is the function itself"
    )
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    with torch.no_grad():
        sampler.call(*sampler.inputs())
    assert sampler.call.last_fallback == "SMOLVLA_FAST_DISABLE is set"


def test_on_a_cpu_it_is_the_function_itself() -> None:
    sampler = Sampler()
    assert sampler.right() and sampler.call.last_fallback == "nothing is captured on cpu"
    with pytest.raises(TypeError, match="SmolVLAPolicy"):
        smolvla_fast.captured(object(), lambda x: x)


def test_the_example_names_a_device_that_is_not_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "--device cuda: torch sees no CUDA GPU; use --device cpu" in capsys.readouterr().err


def test_the_example_agrees_with_stock(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "by stock: {}" in capsys.readouterr().out


def test_heun_is_of_second_order() -> None:
    """Twice the steps leave a quarter of the error, where Euler's leave half; the truth is many steps of Heun's."""

    class Exponential:
        """dx/dt = x: at t = 0 e⁻¹ of x."""

        class model:
            class vlm_with_expert:
                @staticmethod
                def forward(**given: Any) -> tuple[None, None]:
                    return None, None

            @staticmethod
            def embed_prefix(*given: Any, state: Tensor) -> tuple[Tensor, ...]:
                ones = torch.ones(1, 1, dtype=torch.bool)
                return state, ones, ones

            @staticmethod
            def denoise_step(pads: Any, cache: Any, x: Tensor, t: Tensor) -> Tensor:
                return x

    x = torch.ones(1, 1, 1, dtype=torch.float64)
    truth = x * torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    errors = [float((heun(Exponential, [], [], x, x, x, x, steps) - truth).abs()) for steps in (40, 80)]
    # The last step is Euler's: its error of h²/2 is of second order in a whole chunk as well.
    assert 3.5 < errors[0] / errors[1] < 4.5
