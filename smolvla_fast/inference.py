"""An action chunk: observation -> image tokens -> prefix KV -> denoise -> action chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine.cuda_graphs import CaptureFailed, GraphCache, Graphed, driver_for, math_flags
from .engine.products import Products
from .engine.quantized_weights import QuantizedWeights
from .engine.side_stream import Side
from .engine.timing import is_timed, section
from .kernels.launch_order import dependent_launches
from .model.dims import read_dims
from .model.precision import TIERS, Tier
from .model.weights import keeps_kv_by_head, read_expert_layers, read_heads
from .ops.memory import Workspace
from .ops.reference.euler_step import Guidances
from .ops.reference.time_embedding import time_embedding
from .ops.table import STAGES, Ops, serving
from .stages.denoise import LoopReport, denoise
from .stages.observation import Observation, prepare_images, prepare_observation
from .stages.prefix import fill_prefix, image_ends
from .stages.vision import Positions, encode_images, kept_patch_positions
from .stages.wavefront import fill_prefix_with_first_step, side_of_first_step


class Inputs(NamedTuple):
    """All that one chunk is computed from besides the weights: tensors on the model's device, ready for device work.

    noise       [B, S, A] fp32
    guidance    where real-time chunking is on
    image_ends  token ids before and after each camera, where the checkpoint asks for them
    """

    observation: Observation
    noise: Tensor
    guidance: Guidances | None
    image_ends: tuple[Tensor, Tensor] | None


class EngineReplaced(Exception):
    """The model was changed during a replay so that another engine serves it now."""


class Ineligible(RuntimeError):
    """What was found after the first gate: why the engine cannot compute this chunk."""


class Validator(NamedTuple):
    """One thing that a chunk relies on and that may change under it.

    noted  what it was as the chunk began
    check  mends what it can and returns what it is now; raises ``Ineligible`` where the engine cannot serve any more
    """

    noted: Any
    check: Callable[[], Any]


class Engine:
    """Computes action chunks for one model in one tier. Weights are read from the model at each call.

    products           ops and weights of the tier; its own where not given
    graphs             the captured chunks, or None where nothing is captured (a CPU, or graphs switched off)
    """

    def __init__(
        self,
        tier: Tier,
        backend: str,
        device: torch.device,
        capture: bool = True,
        products: Products | None = None,
    ) -> None:
        self.products = products or Products(tier, backend, device)
        self.tier, self.ops = tier, self.products.ops
        driver = driver_for(device) if capture else None
        self.graphs = None if driver is None else GraphCache(driver)
        self._no_graph = {}
        if capture and driver is None and device.type == "cuda":
            self._no_graph["graph"] = "chunks are captured on NVIDIA GPUs alone; the ops run one by one"
        self._no_branch: dict[str, str] = {}  # why captures have the first step behind the prefix
        self._positions: Positions = {}
        self._times: dict[tuple[Any, ...], Tensor] = {}
        self._workspace = Workspace() if self.ops.backend == "cpu" else None
        self._loop = LoopReport(None, False, {})  # of the chunk that ended last, whichever thread's
        # Of a chunk in whose attention products of integers cannot serve.
        self._in_fp32 = None
        if self.ops.heads is not None:
            self._in_fp32 = Products(
                TIERS["fp32"], self.products.backend, self.products.device, self.products.plan
            )

    @property
    def quantized_weights(self) -> QuantizedWeights | None:
        return self.products.quantized_weights

    def act(
        self,
        model: Any,
        images: Sequence[Tensor],
        image_masks: Sequence[Tensor],
        tokens: Tensor,
        token_masks: Tensor,
        state: Tensor,
        noise: Tensor,
        guidance: Guidances | None = None,
        *,
        observe: Callable[[Tensor, Tensor], None] | None = None,
        validators: Sequence[Validator] = (),
    ) -> Tensor:
        """One action chunk.

        model        a ``VLAFlowMatching``, LeRobot's or ours
        images       C of [B, 3, side, side] in [-1, 1], or uint8 frames of any size      image_masks  C of [B] bool
        tokens       [B, T] token ids      token_masks  [B, T] bool      state  [B, R]      noise  [B, S, A] fp32
        guidance     where real-time chunking is on
        observe      called with (x, v) after every step
        validators   of what the chunk relies on; the quantized weights' is added here
        returns      [B, S, A] fp32, a fresh tensor
        raises       ``CaptureFailed`` where this shape of call cannot be captured, ``Ineligible`` of a validator
        replaces     ``sample_actions`` of LeRobot's ``VLAFlowMatching``

        Where attention turns out too sharp for products of integers, the chunk is computed once more, and all later ones
        with these weights, in fp32; ``observe`` sees the steps of the chunk that is returned.

        On a GPU the whole chunk is one captured graph; an observed or timed chunk runs the same ops one by one.
        Validators are asked before a run, which reads parameters. A replay reads what a capture has read, so they are asked
        behind it, while the GPU works; if anything has changed, the chunk is computed once more.
        """
        inputs = Inputs(
            prepare_observation(
                images, image_masks, tokens, token_masks, state,
                stock_order=self.tier.stock_order,
                keep_cameras=model.add_image_special_tokens,
                max_language=model.config.tokenizer_max_length,
            ),
            noise,
            guidance,
            image_ends(model, state.device),
        )  # fmt: skip
        if self.quantized_weights is not None:
            quantized = self.quantized_weights
            validators = (*validators, Validator(quantized.generation, quantized.checked))
        # Triton launches on the current device, whatever device its tensors are on.
        with torch.cuda.device(state.device) if state.is_cuda else nullcontext():
            run, is_replay = self._prepare(model, inputs, observe)
            if not is_replay:
                for each in validators:
                    each.check()
            chunk, loop = run()
            # Compared with what was noted: another thread may have seen the change first.
            if is_replay and [each.check() for each in validators] != [each.noted for each in validators]:
                chunk, loop = run()
        self._loop = loop
        return chunk

    def _prepare(
        self, model: Any, inputs: Inputs, observe: Callable[[Tensor, Tensor], None] | None
    ) -> tuple[Callable[[], tuple[Tensor, LoopReport]], bool]:
        """What computes the chunk and its report, and whether that would be a replay of a graph."""
        graphs = self.graphs
        if graphs is None or observe is not None or is_timed():
            compute_now = self._chunk if self._in_fp32 is None else self._chunk_or_in_fp32
            return lambda: compute_now(model, inputs, observe), False

        # The rest of what the captured work depends on; shapes and dtypes of the inputs are the cache's affair.
        call = Graphed.of(inputs, (*chunk_settings(model), *math_flags()))

        branches: list[Side] = []

        def compute(statics: list[Tensor]) -> tuple[Tensor, LoopReport]:
            return self._chunk(model, call.rebuild(statics), branches=branches)

        def captured() -> tuple[Tensor, LoopReport]:
            try:
                return graphs.run(call.key, call.tensors, compute)
            except CaptureFailed as error:
                if not branches:
                    raise
                self._no_branch["first step beside the prefix"] = f"{error}; it runs behind the prefix"
            graphs.try_again(call.key, call.tensors)
            try:
                return graphs.run(call.key, call.tensors, compute)
            except CaptureFailed:
                self._no_branch.clear()  # the branch was not the reason
                raise

        return captured, graphs.replays(call.key, call.tensors)

    def _chunk_or_in_fp32(
        self, model: Any, inputs: Inputs, observe: Callable[[Tensor, Tensor], None] | None
    ) -> tuple[Tensor, LoopReport]:
        """In tiers of integers: with the copies of one generation, or in fp32 where their attention is too sharp."""
        heads, copies = self.ops.heads, self.quantized_weights
        assert heads is not None and copies is not None
        generation = copies.generation
        if heads.why_too_sharp(generation) is None:
            attention = heads.chunk(generation)
            steps: list[tuple[Tensor, Tensor]] = []
            note = None if observe is None else lambda x, v: steps.append((x, v))
            ops = replace(
                self.ops, attention=attention.attention, masked_attention=attention.masked_attention
            )
            found = self._chunk(model, inputs, note, ops=ops)
            heads.add(attention.seen)
            if not heads.is_sharp(attention.seen):
                for step in steps:
                    observe(*step)  # type: ignore[misc]
                return found
        in_fp32 = self._in_fp32
        assert in_fp32 is not None
        return self._chunk(model, inputs, observe, products=in_fp32, ops=in_fp32.ops)

    def _chunk(
        self,
        model: Any,
        inputs: Inputs,
        observe: Callable[[Tensor, Tensor], None] | None = None,
        branches: list[Side] | None = None,
        *,
        products: Products | None = None,
        ops: Ops | None = None,
    ) -> tuple[Tensor, LoopReport]:
        """The stages, and what ran the loop: device work alone, so that it can be captured. In ``branches`` is noted where
        the first step runs, if not behind the prefix. ``products`` and ``ops`` are the engine's where not given."""
        products, ops = products or self.products, ops or self.ops
        cast = products.cast
        pair, config = model.vlm_with_expert, model.config
        vlm, dims, exact = pair.get_vlm_model(), read_dims(model), self.tier.stock_order
        heads, observation, noise = read_heads(model), inputs.observation, inputs.noise
        batch = observation.state.shape[0]
        with torch.no_grad(), dependent_launches(products.launches_early):
            times = self._time_embeddings(config, dims.expert_width, batch, noise.device)
            with section("vision"):
                image_tokens: list[Tensor] = []  # a camera each, or all together
                for group in prepare_images(ops, observation.frames, dims.image_side, not exact):
                    positions = kept_patch_positions(self._positions, vlm, group)
                    out = encode_images(ops, vlm, cast, dims, group, positions)
                    image_tokens.append(out)
            with section("prefix"):
                embedded = ops.prefix_embed(
                    image_tokens if exact or not image_tokens else image_tokens[0].unflatten(0, (-1, batch)),
                    observation.image_masks, observation.tokens, observation.token_masks, observation.state,
                    vlm.text_model.get_input_embeddings().weight, heads.state, inputs.image_ends,
                    length=model.prefix_length if exact else 0,
                    dtype=None if exact else torch.float32,
                )  # fmt: skip
                expert = read_expert_layers(pair, cast, products.cast_cross_kv)
                by_head = keeps_kv_by_head(pair) if exact else None
                cross_dtype = products.cross_kv_dtype
                beside = products.first_step_beside and not self._no_branch
                plain = exact or observe is not None or not beside
                side = None if plain else side_of_first_step(ops, batch * dims.chunk)
                if side is None:
                    first = None
                    kv = fill_prefix(ops, vlm, cast, dims, *embedded, expert, by_head, cross_dtype)
                else:
                    if branches is not None:
                        branches.append(side)
                    kv, first = fill_prefix_with_first_step(
                        side, ops, vlm, cast, dims, *embedded, expert, heads, noise, times, cross_dtype
                    )
            with section("denoise"):
                return denoise(
                    ops,
                    dims,
                    expert,
                    heads,
                    kv,
                    noise,
                    times,
                    inputs.guidance,
                    observe,
                    self._workspace,
                    first,
                )

    def report(self) -> dict[str, Any]:
        """stages, fallback_reasons and step_launches, as ``Status`` has them: the loop's of one chunk, the last."""
        loop = self._loop  # read once: another thread's chunk may end meanwhile
        sharp = self.products.why_too_sharp() is not None and self._in_fp32
        stages = {stage: serving(sharp.ops if sharp else self.ops, stage) for stage in STAGES}
        if loop.persistent:
            stages["denoise"] = self.ops.backend
        reasons = {
            **self.products.fallback_reasons,
            **self._no_graph,
            **self._no_branch,
            **loop.fallback_reasons,
        }
        return dict(stages=stages, fallback_reasons=reasons, step_launches=loop.launches)

    @property
    def bytes(self) -> int:
        """What the engine holds between chunks: position ids of the patches, time embeddings, buffers of the denoise loop,
        and quantized weights where there are any."""
        holders = (
            self.quantized_weights,
            self._workspace,
            *self._positions.values(),
            *self._times.values(),
        )
        return sum(
            each.nbytes if isinstance(each, Tensor) else each.bytes for each in holders if each is not None
        )

    def after_fork(self) -> None:
        self.products.after_fork()

    def _time_embeddings(self, config: Any, width: int, batch: int, device: torch.device) -> Tensor:
        key = (config.num_steps, config.min_period, config.max_period, width, batch, device)
        if key not in self._times:
            times = _time_embeddings(*key)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return times  # of a caller's own capture: written when that is replayed, and not before
            # Kept for good, and the first one where threads race: a captured graph may read it.
            return self._times.setdefault(key, times)
        return self._times[key]


def chunk_settings(model: Any) -> tuple[Any, ...]:
    """What of a model's configuration a captured chunk has in it."""
    config = model.config
    return config.num_steps, config.min_period, config.max_period, model.prefix_length


def _time_embeddings(
    steps: int, min_period: float, max_period: float, width: int, batch: int, device: torch.device
) -> Tensor:
    """[N, B, E] fp64, as ``time_embedding``: the embedding of t = 1, 1 - 1/N, ... for every sample."""
    dt = -1.0 / steps
    times = (
        torch.full((batch,), 1.0 + step * dt, dtype=torch.float32, device=device) for step in range(steps)
    )
    return torch.stack([time_embedding(t, width, min_period, max_period) for t in times])
