"""Training steps of tiny policies, stock's and ours: what they are fed, what comes out, how far two of them are apart."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from smolvla_fast.measure.rounding import OtherSums, fp32_bound
from smolvla_fast.testing.policies import make_observation

EACH = 4
"""How much farther one parameter's gradient may be: the worst of up to 113 draws."""
FLOOR = 1e-6
"""Of the whole gradient's norm. The gradient to a key's bias is zero by the softmax; what is computed is rounding alone."""


class Step(NamedTuple):
    """loss, the gradient of every parameter that got one, and the random state afterwards."""

    loss: Tensor
    gradients: dict[str, Tensor]
    random: Tensor


def make_batch(
    policy: Any, *, batch: int = 2, padded: bool = True, seed: int = 0, **given: Any
) -> dict[str, Tensor]:
    """A preprocessed training batch: prompts of different lengths, and actions of which some lie beyond an episode."""
    tasks = ["pick up the red cube", "go", "wave"]
    given.setdefault("task", [tasks[i % 3] for i in range(batch)])
    found = make_observation(policy, batch=batch, seed=seed, **given)
    config = policy.config
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (batch, config.chunk_size, config.action_feature.shape[0])
    found["action"] = torch.randn(shape, generator=generator)
    if padded:
        ends = torch.tensor([config.chunk_size - 2 * i for i in range(batch)]).clamp_min(1)
        found["action_is_pad"] = torch.arange(config.chunk_size)[None] >= ends[:, None]
    return found


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    """Aloha policies write into what they are given."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}


def step(
    policy: Any, batch: dict[str, Tensor], *, seed: int = 7, reduction: str = "mean", autocast: bool = False
) -> Step:
    """One forward and backward with noise and time drawn from a seed; gradients of before are dropped."""
    policy.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = policy.forward(copied(batch), reduction=reduction)
        random = torch.get_rng_state()
    # Weights that differ from sample to sample, as reward-weighted training has them.
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    (loss * weights).sum().backward()
    return Step(loss.detach(), gradients_of(policy), random)


def gradients_of(policy: Any) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in policy.named_parameters() if p.grad is not None}


def norm(gradients: dict[str, Tensor]) -> float:
    return float(sum(g.double().square().sum() for g in gradients.values()) ** 0.5)


def distance(gradients: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Relative L2 of all gradients as one vector."""
    return norm({name: gradients[name].double() - truth[name].double() for name in truth}) / norm(truth)


def other_order(policy: Any, batch: dict[str, Tensor], stock: Step, **how: Any) -> float:
    """How far stock is from itself where its sums run in another order, as ``verify`` asks of chunks."""
    with OtherSums():
        return distance(step(policy, batch, **how).gradients, stock.gradients)


def assert_same(ours: Step, stock: Step, noise: float = 0.0) -> None:
    """Loss, every gradient, which parameters have one, and the random state, within the bounds above.

    noise  how far stock is from itself, of ``other_order``; all gradients as one vector are within ``fp32_bound`` of that
    """
    bound = fp32_bound(noise)
    assert ours.gradients.keys() == stock.gradients.keys(), ours.gradients.keys() ^ stock.gradients.keys()
    assert torch.equal(ours.random, stock.random), "another number of draws than stock's"
    # The bound of tier fp32: two orders of summation.
    torch.testing.assert_close(ours.loss, stock.loss, rtol=1e-5, atol=0)
    whole = norm(stock.gradients)
    assert whole > 0.1, "a gradient this small would hide any error"
    apart = distance(ours.gradients, stock.gradients)
    assert apart <= bound, f"{apart:.2e} of {bound:.2e}"
    for name, want in stock.gradients.items():
        assert ours.gradients[name].dtype is want.dtype and ours.gradients[name].shape == want.shape
        error = float((ours.gradients[name].double() - want.double()).norm())
        assert error <= EACH * bound * float(want.double().norm()) + FLOOR * whole, f"{name}: {error:.2e}"
