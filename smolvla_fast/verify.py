"""``verify(policy, batch)``: the fast path beside the reference, on the user's own weights and observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .inference import Engine
from .measure.rounding import FP32_BOUND as FP32_BOUND
from .measure.rounds import rel_l2
from .patch import engine_of, find_policy, status
from .patching.call_rules import Call
from .patching.chunk_forward import Accelerated
from .patching.eligibility import INFERENCE
from .patching.inputs import Inputs, chunk_inputs
from .patching.judge import SCATTER as SCATTER
from .patching.judge import Judgement, Stock, cosine, in_fp32
from .patching.runtime import runtime_of
from .patching.untried import Untried

FAR = 2.0
"""How many times the bound of bf16 a frame of many may reach: three times stock's own loss."""


@dataclass
class Report:
    """Errors on one observation, same noise, against the fp32 reference.

    rel_l2, max_abs, cosine   of the fast chunk (max_abs in normalised action units)
    stock_*                   of stock computing in the tier's own dtype
    velocity_rel_l2           of the fast path's velocity, one a denoise step; where a backend runs the whole loop in one
                              launch, of its ops called one by one
    movement                  tier fp32: how far stock in fp32 is from itself with its sums in another order
                              (``rounding.OtherSums``): in reverse, and, where that does not explain ``rel_l2``, the farthest
                              of four orders; None in other tiers
    passed                    exact: equal bits to stock. fp32: rel_l2 at most ``bound``, three times ``movement`` and at
                              least 1e-5 (``rounding.fp32_bound``). bf16: at most SCATTER times what stock itself
                              loses in bf16, and no less than 1e-5. fp8, int8, int16: cosine at least the tier's, and
                              rel_l2 at most that of two chunks of one size with that cosine, sqrt(2 (1 - cosine))
    """

    precision: str
    backend: str
    rel_l2: float
    max_abs: float
    cosine: float
    stock_rel_l2: float
    stock_max_abs: float
    stock_cosine: float
    velocity_rel_l2: list[float]
    movement: float | None
    bound: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Comparison:
    """Chunks of one observation on one noise, [B, S, A] in normalised action units.

    fast       the patched policy's       reference  what it is judged against: stock in fp32; exact: stock itself
    own        stock in the tier's own dtype, in fp32 with its sums in another order; None for exact and for quantized tiers,
               in which stock does not compute
    judgement  of ``fast``, as ``verify`` judges      tier  its name
    """

    tier: str
    fast: Tensor
    reference: Tensor
    own: Tensor | None
    judgement: Judgement


def passed_together(judgements: Sequence[Judgement], tier: str) -> bool:
    """Whether a tier keeps its promise over many observations.

    Every one has to be within its bound. bf16's bound is of stock's own loss, against which a right chunk scatters, so that
    of many frames one may exceed SCATTER: there the root of the mean square has to be within that of the bounds, and no
    frame may exceed its own by more than FAR.
    """
    if tier != "bf16":
        return all(each.passed for each in judgements)
    errors, bounds = (sum(x * x for x in column) for column in list(zip(*judgements, strict=True))[:2])
    return errors <= bounds and all(each.error <= FAR * each.bound for each in judgements)


class StockNotFinite(ValueError):
    """Stock's own chunk holds NaN or infinity, so there is nothing to judge by. The message names where it comes from.

    always  whether a weight is at fault, and with it every other observation
    """

    def __init__(self, model: Any, inputs: Inputs) -> None:
        bad = [
            [name for name, each in named.items() if each.is_floating_point() and not each.isfinite().all()]
            for named in (dict(model.named_parameters()), Call(*inputs).tensors())
        ]
        self.always = bool(bad[0])
        found = ", ".join([f"the weight {name}" for name in bad[0][:1]] + bad[1])
        super().__init__(
            f"stock's own chunk is not finite: {found or 'no weight and no input'} holds NaN or infinity. Check "
            + ("the checkpoint" if self.always else "the observation and the statistics that normalise it")
        )


def stock_in_fp32(
    policy: Any, batch: dict[str, Any], noise: Tensor, copies: dict[torch.dtype, Any] | None = None
) -> Tensor:
    """Stock's chunk of a patched policy computed in fp32, [B, S, A] in normalised action units.

    copies  as in ``compare``      raises  StockNotFinite
    """
    found = find_policy(policy)
    inputs = chunk_inputs(found, batch)
    chunk = in_fp32(found.model, inputs, noise, None, copies)[0]
    if not chunk.isfinite().all():
        raise StockNotFinite(found.model, inputs)
    return chunk


class StockServed(RuntimeError):
    """The patched policy ran stock on this observation, for this reason."""


def compare(
    policy: Any,
    batch: dict[str, Any],
    noise: Tensor,
    *,
    truth: Tensor | None = None,
    copies: dict[torch.dtype, Any] | None = None,
) -> Comparison:
    """The patched policy's chunk as its callers get it, beside stock's: for many observations and several tiers.

    truth   as ``stock_in_fp32`` gives it for this noise, where it was computed already
    copies  as in ``judge.Stock``: an empty dictionary, given again with every observation and tier
    raises  StockServed where stock computed the chunk; StockNotFinite; ValueError for another batch
    """
    found = find_policy(policy)
    model, inputs = found.model, chunk_inputs(found, batch)
    for _ in range(2):  # the first chunk of a kind that is on trial is stock's
        before = status(policy).calls_fast
        with torch.no_grad():
            fast = model.sample_actions(*inputs, noise=noise.clone())
        now = status(policy)
        if now.calls_fast > before:
            break
    else:
        raise StockServed(now.last_fallback)
    tier = engine_of(model).tier
    truth = stock_in_fp32(policy, batch, noise, copies) if truth is None else truth
    stock = Stock(model, tier, inputs, noise, truth=truth, copies=copies)
    judgement = stock.judge(fast)
    exact = tier.stock_order
    own = None if exact or tier.quantized else stock.chunk if stock.moved is None else stock.moved
    return Comparison(tier.name, fast, stock.chunk if exact else stock.truth, own, judgement)


def verify(policy: Any, batch: dict[str, Any], *, noise: Tensor | None = None) -> Report:
    """Compare the patched policy's chunk for this observation with the reference in fp32.

    batch    as ``predict_action_chunk`` takes it (preprocessed); not changed
    noise    [B, S, A] fp32; fixed noise of its own where not given, so that no random state moves
    raises   RuntimeError where the policy is not patched or stock serves this call, with the reason; StockNotFinite;
             TypeError, ValueError for another batch or noise
    """
    found = find_policy(policy)
    model, now = found.model, status(policy)
    if not now.active:
        advice = "; call smolvla_fast.patch(policy) first"
        if isinstance(model, Accelerated):
            waits = isinstance(runtime_of(model).look(model)[1], Untried) and not now.trials
            advice = (
                ": compute a chunk first, or call smolvla_fast.patch(policy, warmup=True)" if waits else ""
            )
        raise RuntimeError(f"nothing to verify: {now.last_fallback}{advice}")
    served = engine_of(model)
    tier = served.tier
    shape = (model.config.chunk_size, model.config.max_action_dim)
    if not isinstance(batch, dict):
        raise TypeError(
            f"batch is a {type(batch).__qualname__}; accepted is a dict as predict_action_chunk takes it"
        )
    inputs = chunk_inputs(found, batch)
    state = inputs[-1]
    wanted = (state.shape[0], *shape)
    if noise is None:
        noise = torch.randn(wanted, generator=torch.Generator().manual_seed(0)).to(state.device)
    elif tuple(noise.shape) != wanted or noise.dtype is not torch.float32:
        raise ValueError(f"noise is {tuple(noise.shape)} {noise.dtype}; accepted is {wanted} float32")
    with torch.no_grad():  # as the chunk is computed below
        reason = INFERENCE.call_reason(model, Call(*inputs, noise))
    if reason is not None:
        raise RuntimeError(f"nothing to verify: {reason}")

    stock = Stock(model, tier, inputs, noise)
    truth = stock.truth
    if not truth.isfinite().all():
        raise StockNotFinite(model, inputs)
    velocities: list[Tensor] = []
    products = served.products  # the plan that serves the caller, and his quantised copies
    engine = Engine(tier, products.backend, state.device, capture=False, products=products)
    fast = engine.act(model, *inputs, noise, observe=lambda _, v: velocities.append(v))
    # What the caller gets is judged: a replay, and a loop in one launch, which cannot be observed.
    if served.graphs is not None or served.ops.denoise_persistent is not None:
        fast = served.act(model, *inputs, noise)
    judgement = stock.judge(fast)
    return Report(
        precision=tier.name,
        backend=now.backend,
        rel_l2=rel_l2(fast, truth),
        max_abs=float((fast - truth).abs().max()),
        cosine=cosine(fast, truth),
        stock_rel_l2=rel_l2(stock.chunk, truth),
        stock_max_abs=float((stock.chunk - truth).abs().max()),
        stock_cosine=cosine(stock.chunk, truth),
        movement=judgement.movement,
        velocity_rel_l2=[rel_l2(v, t) for v, t in zip(velocities, stock.velocities, strict=True)],
        bound=judgement.bound,
        passed=judgement.passed,
    )
