"""Is a chunk right? Judged against stock's own on the same noise, by the bound of the tier."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..measure.rounding import FP32_BOUND, ORDERS, OtherSums, fp32_bound
from ..measure.rounds import rel_l2
from ..model.precision import Tier
from ..model.weights import is_cross
from ..ops.reference.patch_embed import patch_embed
from ..stages.vision import Positions, kept_patch_positions
from .settings import stock_layers

SCATTER = 1.5
"""How far one observation may exceed stock's own loss in the same dtype. Rounding errors of two orders of computation
scatter against each other, so a single one may lie above. tests/inference/test_inference.py holds the sum over six policies
to stock's own."""


HOPELESS = 30.0
"""An error this many times the bound by the first order of sums is none that another order would explain."""


class Judgement(NamedTuple):
    """error     relative L2 to the truth, which is stock in fp32; exact: to stock's chunk
    bound     the most that the tier allows
    movement  tier fp32: how far stock is from itself with its sums in another order, None in other tiers
    passed    exact: equal bits; else the error is within the bound and, in quantized tiers, the cosine at least the tier's
    """

    error: float
    bound: float
    movement: float | None
    passed: bool

    def __str__(self) -> str:
        return f"off by {self.error:.2g}, accepted is {f'{self.bound:.2g}' if self.bound else 'equal bits'}"


class Stock:
    """Stock's chunks of one call.

    truth, velocities  in fp32      chunk  in the tier's own dtype; a copy of the model computes what is stored otherwise
    moved              tier fp32, once judged: the truth with its sums in the order that moved it farthest, else None
    """

    def __init__(
        self,
        model: Any,
        tier: Tier,
        inputs: tuple[Any, ...],
        noise: Tensor,
        kwargs: dict[str, Any] | None = None,
        chunk: Tensor | None = None,
        truth: Tensor | None = None,
        copies: dict[torch.dtype, Any] | None = None,
    ) -> None:
        """chunk   the live model's, where that was computed already      truth  in fp32, where it was
        copies  models by dtype, kept by the caller from one call to the next while no weight changes
        """
        self._call, self._tier = (model, inputs, noise, kwargs, copies), tier
        stored, dtype = _stored(model), tier.gemm_dtype
        self.velocities: list[Tensor] = []
        self.moved: Tensor | None = None
        # On a GPU the live model may have rounded to TF32.
        live = stored == {torch.float32} and noise.device.type == "cpu"
        if truth is not None:
            self.truth = truth
        elif chunk is not None and (live or tier.stock_order):  # equal bits are asked for, whatever the truth
            self.truth = chunk
        else:
            self.truth, self.velocities = in_fp32(model, inputs, noise, kwargs, copies)
        if truth is not None and live and dtype in (None, torch.float32):
            chunk = truth
        elif chunk is None or (dtype is not None and stored != {dtype}):
            chunk = stock_chunk(in_dtype(model, dtype, copies), inputs, noise, kwargs)[0]
        self.chunk = chunk

    def judge(self, fast: Tensor, always_move: bool = True) -> Judgement:
        """always_move  whether ``movement`` is wanted where the bound that holds without it is kept: it costs a chunk"""
        tier = self._tier
        if tier.stock_order:
            return Judgement(rel_l2(fast, self.chunk), 0.0, None, torch.equal(fast, self.chunk))
        error, movement = rel_l2(fast, self.truth), None
        if tier.name == "fp32":
            movement = self._movement(error) if always_move or error > FP32_BOUND else 0.0
            bound = fp32_bound(movement)
        elif tier.cosine is not None:
            # Of two chunks of one size with that cosine. A cosine alone does not see a chunk that is too large or too small.
            bound = math.sqrt(2 * (1 - tier.cosine))
        else:
            bound = max(SCATTER * rel_l2(self.chunk, self.truth), FP32_BOUND)
        passed = error <= bound and (tier.cosine is None or cosine(fast, self.truth) >= tier.cosine)
        return Judgement(error, bound, movement, passed)

    def _movement(self, error: float) -> float:
        movement = 0.0
        for order in ORDERS:
            with OtherSums(order):
                chunk = in_fp32(*self._call)[0]
            moved = rel_l2(chunk, self.truth)
            if self.moved is None or moved > movement:
                movement, self.moved = moved, chunk
            if error <= fp32_bound(movement) or not error <= HOPELESS * fp32_bound(movement):
                break  # the other orders could only widen the bound, and not by as much
        return movement


def cosine(x: Tensor, reference: Tensor) -> float:
    return float(
        torch.nn.functional.cosine_similarity(
            x.cpu().double().flatten(), reference.cpu().double().flatten(), dim=0
        )
    )


@contextmanager
def without_tf32() -> Iterator[None]:
    """fp32 products in fp32 while the reference is computed; the caller's settings are put back."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _stored(model: Any) -> set[torch.dtype]:
    """The dtypes that vision tower, text layers and expert are stored in."""
    pair = model.vlm_with_expert
    live = pair.get_vlm_model()
    return {
        live.vision_model.post_layernorm.weight.dtype,
        live.text_model.layers[0].self_attn.q_proj.weight.dtype,
        pair.lm_expert.norm.weight.dtype,
    }


def _keep_patch_positions(vlm: Any, live: Any) -> None:
    """Transformers 4.57 gives patches other position ids in another dtype; a copy is to differ in rounding alone."""
    embeddings = vlm.vision_model.embeddings
    known: Positions = {}

    def forward(pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        patch = embeddings.patch_embedding
        table = embeddings.position_embedding.weight
        positions = kept_patch_positions(known, live, pixel_values)
        return patch_embed(pixel_values, patch.weight, patch.bias, table, positions)

    embeddings.__dict__["forward"] = forward


def in_dtype(model: Any, dtype: torch.dtype | None, copies: dict[torch.dtype, Any] | None = None) -> Any:
    """The model with its backbone in ``dtype``: itself where it is stored so or None is asked for, else a copy, or the one
    that is in ``copies``, to which a new one is added."""
    if dtype is None or _stored(model) == {dtype}:
        return model
    if copies is not None and dtype in copies:
        return copies[dtype]
    live = model.vlm_with_expert.get_vlm_model()
    model = copy.deepcopy(model)
    pair = model.vlm_with_expert.to(dtype)
    _keep_patch_positions(pair.get_vlm_model(), live)
    for i, layer in enumerate(pair.lm_expert.layers):
        if is_cross(pair, i):  # fp32 in LeRobot's bf16 layout
            layer.self_attn.k_proj.float(), layer.self_attn.v_proj.float()
    if copies is not None:
        copies[dtype] = model
    return model


def in_fp32(
    model: Any, inputs: tuple[Any, ...], noise: Tensor, kwargs: dict[str, Any] | None = None,
    copies: dict[torch.dtype, Any] | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """``stock_chunk`` in fp32, which is the truth. copies  as in ``in_dtype``"""
    with without_tf32():
        return stock_chunk(in_dtype(model, torch.float32, copies), inputs, noise, kwargs)


def stock_chunk(
    model: Any, inputs: tuple[Any, ...], noise: Tensor, kwargs: dict[str, Any] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The stock method's own chunk and velocities."""
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
        chunk = stock.sample_actions(model, *inputs, noise=noise.clone(), **(kwargs or {}))
    return chunk, velocities
