"""An action chunk: observation -> image tokens -> prefix KV -> denoise -> action chunk."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .engine.cuda_graphs import GraphCache, driver_for
from .engine.quantized_weights import FLOATS, KINDS, IntegerCast, QuantizedWeights
from .engine.timing import is_timed, section
from .model.dims import read_dims
from .model.precision import Tier
from .model.weights import Cast, keeps_kv_by_head, read_expert_layers, read_heads
from .ops.memory import Workspace
from .ops.processor import why_bf16_is_slow
from .ops.reference.euler_step import Guidances
from .ops.reference.time_embedding import time_embedding
from .ops.select import fallback_reasons, select
from .ops.table import STAGES, serving
from .stages.denoise import LoopReport, denoise
from .stages.observation import Observation, prepare_images, prepare_observation
from .stages.prefix import embed_prefix, embed_state, fill_prefix
from .stages.vision import encode_images, patch_positions


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
    """The model was changed behind a replay so that another engine serves it now."""


class Ineligible(RuntimeError):
    """What was found behind the first gate: why the engine cannot compute this chunk."""


class Validator(NamedTuple):
    """One thing that a chunk relies on and that may change under it.

    noted  what it was as the chunk began
    check  mends what it can and returns what it is now; raises ``Ineligible`` where the engine cannot serve any more
    """

    noted: Any
    check: Callable[[], Any]


class Engine:
    """Computes action chunks for one model in one tier. Weights are read from the model at each call.

    quantized_weights  of the tiers that have them
    graphs             the captured chunks, or None where nothing is captured (a CPU, or graphs switched off)
    """

    def __init__(self, tier: Tier, backend: str, device: torch.device, capture: bool = True) -> None:
        self.tier = tier
        self.ops = select(backend, device, tier.stock_order, tier.quantized)
        self._gemm_dtype = tier.gemm_dtype
        wished = backend != "auto" or tier.stock_order
        self._fallback_reasons = {} if wished else fallback_reasons(device)
        narrow = tier.name not in ("exact", "fp32", "int8")
        slow = why_bf16_is_slow() if narrow and device.type == "cpu" else None
        if slow is not None:  # wider products err less and are faster, so they serve the narrower tier
            self._gemm_dtype = torch.float32
            self._fallback_reasons["bf16 products"] = f"{slow}; products run in fp32"
        driver = driver_for(device) if capture else None
        self.graphs = None if driver is None else GraphCache(driver)
        if capture and driver is None and device.type == "cuda":
            self._fallback_reasons["graph"] = (
                "chunks are captured on NVIDIA GPUs alone; the ops run one by one"
            )
        self._positions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._times: dict[tuple[Any, ...], Tensor] = {}
        self._workspace = Workspace() if self.ops.backend == "cpu" else None
        self._loop: LoopReport | None = None
        self.quantized_weights: QuantizedWeights | None = None
        self._cast: Cast = self._narrow
        if tier.quantized:
            kind = KINDS[tier.quantized]
            self.quantized_weights = QuantizedWeights(tier.gemm_dtype or torch.bfloat16, kind)
            if kind is not FLOATS:
                self._cast = IntegerCast(self.quantized_weights, self._narrow)

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
            _image_ends(model, state.device),
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
            chunk = run()
            # Compared with what was noted: another thread may have seen the change first.
            if is_replay and [each.check() for each in validators] != [each.noted for each in validators]:
                chunk = run()
        return chunk

    def _prepare(
        self, model: Any, inputs: Inputs, observe: Callable[[Tensor, Tensor], None] | None
    ) -> tuple[Callable[[], Tensor], bool]:
        """What computes the chunk, and whether that would be a replay of a graph."""
        graphs = self.graphs
        if graphs is None or observe is not None or is_timed():

            def run() -> Tensor:
                chunk, self._loop = self._chunk(model, inputs, observe)
                return chunk

            return run, False

        tensors, structure, rebuild = _flatten(inputs)
        # The rest of what the captured work depends on; shapes and dtypes of the inputs are the cache's affair.
        config = model.config
        settings = (config.num_steps, config.min_period, config.max_period, model.prefix_length)
        key = (*settings, structure, _math_flags())

        def replay() -> Tensor:
            chunk, self._loop = graphs.run(key, tensors, lambda statics: self._chunk(model, rebuild(statics)))
            return chunk

        return replay, graphs.replays(key, tensors)

    def _chunk(
        self, model: Any, inputs: Inputs, observe: Callable[[Tensor, Tensor], None] | None = None
    ) -> tuple[Tensor, LoopReport]:
        """The stages, and what ran the loop: device work alone, so that it can be captured."""
        pair, config = model.vlm_with_expert, model.config
        vlm, dims, ops, exact = pair.get_vlm_model(), read_dims(model), self.ops, self.tier.stock_order
        heads, observation, noise = read_heads(model), inputs.observation, inputs.noise
        batch = observation.state.shape[0]
        with torch.no_grad():
            with section("vision"):
                image_tokens: list[Tensor] = []
                for group in prepare_images(ops, observation.frames, dims.image_side, not exact):
                    positions = self._patch_positions(vlm, group)
                    out = encode_images(ops, vlm, self._cast, dims, group, positions)
                    image_tokens += out.split(batch)
            with section("prefix"):
                embedded = embed_prefix(
                    observation, image_tokens, vlm, embed_state(observation.state, heads.state),
                    image_ends=inputs.image_ends, length=model.prefix_length if exact else 0,
                    dtype=None if exact else torch.float32,
                )  # fmt: skip
                expert = read_expert_layers(pair, self._cast, self._widen)
                by_head = keeps_kv_by_head(pair) if exact else None
                kv = fill_prefix(ops, vlm, self._cast, dims, *embedded, expert, by_head)
            with section("denoise"):
                times = self._time_embeddings(config, dims.expert_width, batch, noise.device)
                return denoise(
                    ops, dims, expert, heads, kv, noise, times, inputs.guidance, observe, self._workspace
                )

    def _narrow(self, matrix: Tensor) -> Any:
        quantized = self.quantized_weights
        if quantized is not None and quantized.kind is FLOATS and matrix.ndim == 2:
            return quantized.of(matrix)
        dtype = self._gemm_dtype
        return matrix if dtype is None or matrix.dtype is dtype else matrix.to(dtype)

    def _widen(self, matrix: Tensor) -> Tensor:
        """For matrices that no tier narrows: the expert's cross K/V, fp32 in LeRobot's bf16 layout."""
        return matrix.float() if self._gemm_dtype is torch.float32 else matrix

    @property
    def step_launches(self) -> int | None:
        """Kernel launches of one denoise step of the last chunk; see ``LoopReport``."""
        return None if self._loop is None else self._loop.launches

    @property
    def stages(self) -> dict[str, str]:
        """Who computes each stage: of the denoise loop, who ran the last one."""
        found = {stage: serving(self.ops, stage) for stage in STAGES}
        if self._loop is not None and self._loop.persistent:
            found["denoise"] = self.ops.backend
        return found

    @property
    def fallback_reasons(self) -> dict[str, str]:
        """What the engine does without, with the reasons; the loop's is of the last chunk."""
        copies = {} if self.quantized_weights is None else self.quantized_weights.fallback_reasons
        return {
            **self._fallback_reasons,
            **copies,
            **({} if self._loop is None else self._loop.fallback_reasons),
        }

    @property
    def bytes(self) -> int:
        """What the engine holds between chunks: position ids of the patches, time embeddings, buffers of the denoise loop,
        and quantized weights where there are any."""
        holders = (self.quantized_weights, self._workspace, *self._positions.values(), *self._times.values())
        return sum(
            each.nbytes if isinstance(each, Tensor) else each.bytes for each in holders if each is not None
        )

    def after_fork(self) -> None:
        if self.quantized_weights is not None:
            self.quantized_weights.renew_lock()

    def _time_embeddings(self, config: Any, width: int, batch: int, device: torch.device) -> Tensor:
        key = (config.num_steps, config.min_period, config.max_period, width, batch, device)
        if key not in self._times:
            times = _time_embeddings(*key)
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return times  # of a caller's own capture: written when that is replayed, and not before
            # Kept for good, and the first one where threads race: a captured graph may read it.
            return self._times.setdefault(key, times)
        return self._times[key]

    def _patch_positions(self, vlm: Any, images: Tensor) -> Tensor:
        key = (images.shape[-1], vlm.vision_model.embeddings.patch_embedding.weight.dtype, images.device)
        if key not in self._positions:
            return self._positions.setdefault(key, patch_positions(vlm, images))
        return self._positions[key]


def _flatten(inputs: Inputs) -> tuple[list[Tensor], Hashable, Callable[[list[Tensor]], Inputs]]:
    """The tensors in order, all else as a key, and the way back from other tensors."""
    leaves, spec = tree_flatten(inputs)
    tensors = [each for each in leaves if isinstance(each, Tensor)]
    plain: tuple[Any, ...] = tuple(
        Tensor if isinstance(each, Tensor) else (type(each), each) for each in leaves
    )

    def rebuild(others: list[Tensor]) -> Inputs:
        given = iter(others)
        return tree_unflatten([next(given) if each is Tensor else each[1] for each in plain], spec)

    return tensors, (plain, repr(spec)), rebuild  # not every torch since 2.4 can hash a TreeSpec


def _math_flags() -> tuple[Any, ...]:
    """The caller's settings that a captured library call was chosen under."""
    return (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _image_ends(model: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    if not model.add_image_special_tokens:
        return None
    return model.global_image_start_token.to(device), model.image_end_token.to(device)


def _time_embeddings(
    steps: int, min_period: float, max_period: float, width: int, batch: int, device: torch.device
) -> Tensor:
    """[N, B, E] fp64: the embedding of t = 1, 1 - 1/N, ... for every sample."""
    dt = -1.0 / steps
    times = (
        torch.full((batch,), 1.0 + step * dt, dtype=torch.float32, device=device) for step in range(steps)
    )
    return torch.stack([time_embedding(t, width, min_period, max_period) for t in times])
