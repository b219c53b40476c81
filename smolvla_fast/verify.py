"""``verify(policy, batch)``: the fast path beside the reference, on the user's own weights and observation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .inference import Engine
from .measure.rounding import FP32_BOUND, ORDERS, OtherSums, fp32_bound
from .model.weights import is_cross
from .ops.reference.patch_embed import patch_embed
from .patch import engine_of, find_policy, status
from .patching.settings import stock_layers
from .stages.vision import patch_positions

TOKENS = ("observation.language.tokens", "observation.language.attention_mask")
SCATTER = 1.5
"""How far one observation may exceed stock's own loss in the same dtype. Rounding errors of two orders of computation
scatter against each other, so a single one may lie above. tests/inference/test_inference.py holds the sum over six policies
to stock's own."""


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
                              least 1e-5 (``rounding.fp32_bound``). bf16: at most SCATTER times what
                              stock itself loses in bf16, and no less than 1e-5. fp8, int8: cosine at least the tier's, and
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


def rel_l2(x: Tensor, reference: Tensor) -> float:
    """``|x - reference| / |reference|``, in fp64."""
    x, reference = x.double(), reference.double()
    return float((x - reference).norm() / reference.norm())


def cosine(x: Tensor, reference: Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(x.double().flatten(), reference.double().flatten(), dim=0)
    )


def _keep_patch_positions(vlm: Any, positions: Tensor) -> None:
    """Transformers 4.57 gives patches other position ids in another dtype; a copy is to differ in rounding alone."""
    embeddings = vlm.vision_model.embeddings

    def forward(pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        patch = embeddings.patch_embedding
        table = embeddings.position_embedding.weight
        return patch_embed(pixel_values, patch.weight, patch.bias, table, positions)

    embeddings.__dict__["forward"] = forward


@contextmanager
def _without_tf32() -> Iterator[None]:
    """fp32 products in fp32 while the reference is computed; the caller's settings are put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _stock_chunk(
    model: Any, dtype: torch.dtype | None, inputs: tuple[Any, ...], noise: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The stock method's own chunk and velocities, with the backbone in ``dtype``: on a copy where it is not stored so."""
    pair = model.vlm_with_expert
    live = pair.get_vlm_model()
    stored = {
        live.vision_model.post_layernorm.weight.dtype,
        live.text_model.layers[0].self_attn.q_proj.weight.dtype,
        pair.lm_expert.norm.weight.dtype,
    }
    if dtype is not None and stored != {dtype}:
        model = copy.deepcopy(model)
        pair = model.vlm_with_expert.to(dtype)
        _keep_patch_positions(pair.get_vlm_model(), patch_positions(live, inputs[0][0]))
        for i, layer in enumerate(pair.lm_expert.layers):
            if is_cross(pair, i):  # fp32 in LeRobot's bf16 layout
                layer.self_attn.k_proj.float(), layer.self_attn.v_proj.float()
    stock = model.stock_class
    # A shallow copy shares every weight and has a namespace of its own: the live model is not touched, so threads may
    # go on using it.
    model = copy.copy(model)
    velocities: list[Tensor] = []

    def denoise_step(*args: Any, **kwargs: Any) -> Tensor:
        velocities.append(stock.denoise_step(model, *args, **kwargs))
        return velocities[-1]

    model.__dict__["denoise_step"] = denoise_step
    with torch.no_grad(), stock_layers():
        return stock.sample_actions(model, *inputs, noise=noise.clone()), velocities


def verify(policy: Any, batch: dict[str, Any], *, noise: Tensor | None = None) -> Report:
    """Compare the patched policy's chunk for this observation with the reference in fp32.

    batch    as ``predict_action_chunk`` takes it (preprocessed); not changed
    noise    [B, S, A] fp32; fixed noise of its own where not given, so that no random state moves
    raises   RuntimeError where the policy is not patched or runs stock, with the reason; TypeError, ValueError for another
             batch or noise
    """
    found = find_policy(policy)
    now = status(policy)
    if not now.active:
        raise RuntimeError(f"nothing to verify: {now.last_fallback}; call smolvla_fast.patch(policy) first")
    model = found.model
    served = engine_of(model)
    tier = served.tier
    shape = (model.config.chunk_size, model.config.max_action_dim)
    if not isinstance(batch, dict):
        raise TypeError(
            f"batch is a {type(batch).__qualname__}; accepted is a dict as predict_action_chunk takes it"
        )
    missing = [name for name in TOKENS if name not in batch]
    if missing:
        raise ValueError(f"batch has no {missing[0]!r}; accepted is what the policy's preprocessor returns")
    batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
    batch = found._prepare_batch(batch)
    images, image_masks = found.prepare_images(batch)
    tokens, token_masks = (batch[name] for name in TOKENS)
    state = found.prepare_state(batch)
    inputs = (images, image_masks, tokens, token_masks, state)
    wanted = (state.shape[0], *shape)
    if noise is None:
        noise = torch.randn(wanted, generator=torch.Generator().manual_seed(0)).to(state.device)
    elif tuple(noise.shape) != wanted or noise.dtype is not torch.float32:
        raise ValueError(f"noise is {tuple(noise.shape)} {noise.dtype}; accepted is {wanted} float32")

    with _without_tf32():
        truth, true_velocities = _stock_chunk(model, torch.float32, inputs, noise)
    stock = _stock_chunk(model, tier.gemm_dtype, inputs, noise)[0]
    velocities: list[Tensor] = []
    engine = Engine(tier, served.products.backend, state.device, capture=False, products=served.products)
    fast = engine.act(model, *inputs, noise, observe=lambda _, v: velocities.append(v))
    # What the caller gets is judged: a replay, and a loop in one launch, which cannot be observed.
    if served.graphs is not None or served.ops.denoise_persistent is not None:
        fast = served.act(model, *inputs, noise)

    movement = None
    if tier.name == "fp32":
        movement = 0.0
        for order in ORDERS:
            with _without_tf32(), OtherSums(order):
                moved = rel_l2(_stock_chunk(model, torch.float32, inputs, noise)[0], truth)
            movement = max(movement, moved)
            if rel_l2(fast, truth) <= fp32_bound(movement):
                break  # the other orders could only widen the bound
    if movement is not None:
        bound = fp32_bound(movement)
    elif tier.cosine is not None:
        # Of two chunks of one size with that cosine. A cosine alone does not see a chunk that is too large or too small.
        bound = math.sqrt(2 * (1 - tier.cosine))
    else:
        bound = max(SCATTER * rel_l2(stock, truth), FP32_BOUND)
    passed = torch.equal(fast, stock) if tier.stock_order else rel_l2(fast, truth) <= bound
    if tier.cosine is not None:
        passed = passed and cosine(fast, truth) >= tier.cosine
    return Report(
        precision=tier.name,
        backend=now.backend,
        rel_l2=rel_l2(fast, truth),
        max_abs=float((fast - truth).abs().max()),
        cosine=cosine(fast, truth),
        stock_rel_l2=rel_l2(stock, truth),
        stock_max_abs=float((stock - truth).abs().max()),
        stock_cosine=cosine(stock, truth),
        movement=movement,
        velocity_rel_l2=[rel_l2(v, t) for v, t in zip(velocities, true_velocities, strict=True)],
        bound=bound,
        passed=passed,
    )
