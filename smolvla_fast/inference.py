"""The score for acting: observation -> image tokens -> prefix KV -> denoise -> action chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine.cuda_graphs import CaptureFailed, GraphCache, driver_for
from .engine.nested import flatten
from .engine.quantized_weights import FLOATS, KINDS, Copies, IntegerCast
from .engine.timing import is_timed, section
from .model.dims import read_dims
from .model.precision import Tier
from .model.weights import Cast, DecoderLayer, keeps_kv_by_head, read_expert_layers, read_heads
from .ops.memory import Workspace
from .ops.processor import why_bf16_is_slow
from .ops.reference.euler_step import Guidances
from .ops.reference.time_embedding import time_embedding
from .ops.select import fallback_reasons, select
from .ops.table import STAGES, Ops, serving
from .stages.denoise import denoise
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


class Loop(NamedTuple):
    """What ran the denoise loop of one chunk.

    launches     kernel launches of one step: 0 where the whole loop is one launch, None where ops are not one launch each
    persistent   whether the whole loop was one launch
    passed_over  why it was not, where the backend has a kernel for that
    """

    launches: int | None
    persistent: bool
    passed_over: dict[str, str]


class Engine:
    """Computes action chunks for one model in one tier. Weights are read from the model at each call.

    copies  quantised weights, in the tiers that have them
    graphs  the captured chunks, or None where nothing is captured (a CPU, or graphs switched off)
    """

    def __init__(self, tier: Tier, backend: str, device: torch.device, capture: bool = True) -> None:
        self.tier = tier
        self.ops = select(backend, device, tier.stock_order, tier.quantized)
        self._gemm_dtype = tier.gemm_dtype
        wished = backend != "auto" or tier.stock_order
        self._passed_over = {} if wished else fallback_reasons(device)
        narrow = tier.name not in ("exact", "fp32", "int8")
        slow = why_bf16_is_slow() if narrow and device.type == "cpu" else None
        if slow is not None:  # wider products err less and are faster, so they serve the narrower tier
            self._gemm_dtype = torch.float32
            self._passed_over["bf16 products"] = f"{slow}; products run in fp32"
        driver = driver_for(device) if capture else None
        self.graphs = None if driver is None else GraphCache(driver)
        if capture and driver is None and device.type == "cuda":
            self._passed_over["graph"] = "chunks are captured on NVIDIA GPUs alone; the ops run one by one"
        self._positions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._times: dict[tuple[Any, ...], Tensor] = {}
        self._workspace = Workspace() if self.ops.backend == "cpu" else None
        self._loop: Loop | None = None
        self._loops: dict[Any, Loop] = {}
        self.copies: Copies | None = None
        self._cast: Cast = self._narrow
        if tier.quantized:
            self.copies = Copies(tier.gemm_dtype or torch.bfloat16, KINDS[tier.quantized])
            if self.copies.kind is not FLOATS:
                self._cast = IntegerCast(self.copies, self._narrow)

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
        watch: Callable[[Tensor, Tensor], None] | None = None,
        look: Callable[[], str | None] | None = None,
    ) -> Tensor:
        """One action chunk.

        model        a ``VLAFlowMatching``, LeRobot's or ours
        images       C of [B, 3, side, side] in [-1, 1], or uint8 frames of any size      image_masks  C of [B] bool
        tokens       [B, T] token ids      token_masks  [B, T] bool      state  [B, R]      noise  [B, S, A] fp32
        guidance     where real-time chunking is on
        watch        called with (x, v) after every step
        look         asked before the model's parameters are read, and not before a replay, which reads what a capture has
                     read: why they cannot be, or None
        returns      [B, S, A] fp32, a fresh tensor
        raises       ``graphs.CaptureFailed`` where this shape of call cannot be captured, or ``look`` said no
        replaces     ``sample_actions`` of LeRobot's ``VLAFlowMatching``

        On a GPU the whole chunk is one captured graph; a watched or timed chunk runs the same ops one by one.
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
        # Triton launches on the current device, whatever device its tensors are on.
        with torch.cuda.device(state.device) if state.is_cuda else nullcontext():
            # On a GPU the check hides behind the chunk; where nothing is captured it is as cheap before, and runs one.
            copies, late = self.copies, self.graphs is not None
            if copies is None:
                return self._run(model, inputs, watch, look)
            if not late:
                copies.refreshed()
            before = copies.generation
            chunk = self._run(model, inputs, watch, look)
            # Another thread may have seen the change first: then nothing differs any more, and this chunk is of before.
            if late and (copies.refreshed() or copies.generation != before):
                chunk = self._run(model, inputs, watch, look)
        return chunk

    def _run(
        self,
        model: Any,
        inputs: Inputs,
        watch: Callable[[Tensor, Tensor], None] | None,
        look: Callable[[], str | None] | None,
    ) -> Tensor:
        if self.graphs is None or watch is not None or is_timed():
            _ask(look)
            chunk, self._loop = self._chunk(model, inputs, watch)
            return chunk
        tensors, rebuild = flatten(inputs)
        # The rest of what the captured work depends on; shapes and dtypes of the inputs are the cache's affair.
        config = model.config
        settings = (config.num_steps, config.min_period, config.max_period, model.prefix_length)
        key = (*settings, rebuild.key, _math_flags())
        captured = (key, tuple(each.shape for each in tensors))

        def compute(statics: list[Tensor]) -> Tensor:
            chunk, self._loops[captured] = self._chunk(model, rebuild(statics))
            return chunk

        if not self.graphs.replays(key, tensors):
            _ask(look)
        chunk = self.graphs.run(key, tensors, compute)
        # A replay runs nothing here: what ran its loop is what was captured.
        self._loop = self._loops.get(captured, self._loop)
        return chunk

    def _chunk(
        self, model: Any, inputs: Inputs, watch: Callable[[Tensor, Tensor], None] | None = None
    ) -> tuple[Tensor, Loop]:
        """The score itself, and what ran its loop: device work alone, so that it can be captured."""
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
                refused: dict[str, str] = {}
                chunk = denoise(
                    ops,
                    dims,
                    expert,
                    heads,
                    kv,
                    noise,
                    times,
                    inputs.guidance,
                    watch,
                    refused,
                    self._workspace,
                )
                persistent = ops.denoise_persistent is not None and watch is None and not refused
                launches = 0 if persistent else _launches(ops, expert, batch * dims.chunk)
                return chunk, Loop(launches, persistent, refused)

    def _narrow(self, matrix: Tensor) -> Any:
        if self.copies is not None and self.copies.kind is FLOATS and matrix.ndim == 2:
            return self.copies.of(matrix)
        dtype = self._gemm_dtype
        return matrix if dtype is None or matrix.dtype is dtype else matrix.to(dtype)

    def _widen(self, matrix: Tensor) -> Tensor:
        """For matrices that no tier narrows: the expert's cross K/V, fp32 in LeRobot's bf16 layout."""
        return matrix.float() if self._gemm_dtype is torch.float32 else matrix

    @property
    def step_launches(self) -> int | None:
        """Kernel launches of one denoise step of the last chunk: two at its ends, five a layer; 0 where the whole loop is
        one launch; None where ops are not one launch each."""
        return None if self._loop is None else self._loop.launches

    @property
    def stages(self) -> dict[str, str]:
        """Who computes each stage: of the denoise loop, who ran the last one."""
        found = {stage: serving(self.ops, stage) for stage in STAGES}
        if self._loop is not None and self._loop.persistent:
            found["denoise"] = self.ops.backend
        return found

    @property
    def passed_over(self) -> dict[str, str]:
        """What would rather have been taken, with the reasons: by "auto" as backend, for copies of weights, and for the last
        chunk's loop."""
        copies = {} if self.copies is None else self.copies.passed_over
        return {**self._passed_over, **copies, **({} if self._loop is None else self._loop.passed_over)}

    @property
    def bytes(self) -> int:
        """What the engine holds between chunks: position ids of the patches, time embeddings, buffers of the denoise loop,
        and quantised weights where there are any."""
        copies = 0 if self.copies is None else self.copies.bytes
        buffers = 0 if self._workspace is None else self._workspace.bytes
        return (
            copies + buffers + sum(each.nbytes for each in (*self._positions.values(), *self._times.values()))
        )

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


def _ask(look: Callable[[], str | None] | None) -> None:
    reason = None if look is None else look()
    if reason is not None:
        raise CaptureFailed(reason)


def _math_flags() -> tuple[Any, ...]:
    """The caller's settings that a captured library call was chosen under."""
    return (
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _launches(ops: Ops, expert: list[DecoderLayer], rows: int) -> int | None:
    single = ops.single_launch and not ops.leaves_to_torch(expert[0].gate.dtype, rows)
    return 2 + 5 * len(expert) if single else None


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
