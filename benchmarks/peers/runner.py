"""A chunk computed by ``restructured``'s three modules, whoever runs them: torch, to check the modules, or OpenVINO."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.restructured import Prefix, Step, Vision, added_mask
from smolvla_fast.inference import _time_embeddings as time_embeddings
from smolvla_fast.model.dims import read_dims
from smolvla_fast.model.weights import read_heads
from smolvla_fast.ops.reference.masks import block_mask
from smolvla_fast.ops.reference.rope import rope_tables
from smolvla_fast.ops.reference.suffix_tokens import suffix_tokens
from smolvla_fast.ops.torch.suffix import suffix_fold
from smolvla_fast.stages.observation import prepare_observation
from smolvla_fast.stages.prefix import embed_prefix, embed_state
from smolvla_fast.stages.vision import patch_positions

Compile = Callable[[torch.nn.Module, tuple[Tensor, ...]], Callable[..., tuple[Any, ...]]]
"""A module and an example of its inputs -> the same on inputs of the same shapes; outputs may be another runtime's."""


def plain(module: torch.nn.Module, example: tuple[Tensor, ...]) -> Callable[..., tuple[Any, ...]]:
    """Torch itself."""

    def run(*inputs: Any) -> tuple[Any, ...]:
        found = module(*inputs)
        return found if isinstance(found, tuple) else (found,)

    return run


class Runner:
    """Stands for ``sample_actions`` of one fp32 model.

    compile_    makes a callable of each module when the first chunk shows the shapes; a chunk of other shapes makes
                others
    to_torch    an output of the runtime as a tensor
    stage_ms    vision, prefix and denoise of the last chunk
    """

    def __init__(
        self, model: Any, compile_: Compile, to_torch: Callable[[Any], Tensor] = lambda x: x
    ) -> None:
        self.model, self.compile, self.to_torch = model, compile_, to_torch
        self.dims = read_dims(model)
        self.stage_ms: dict[str, float] = {}
        self._compiled: dict[Any, Callable[..., tuple[Any, ...]]] = {}
        heads = read_heads(model)
        times = time_embeddings(
            model.config.num_steps, model.config.min_period, model.config.max_period,
            self.dims.expert_width, 1, torch.device("cpu"),
        )  # fmt: skip
        with torch.no_grad():
            self.fold = suffix_fold(times, heads.action_in, heads.time_in)
        self._positions: Tensor | None = None

    def _run(self, name: str, make: Callable[[], torch.nn.Module], *inputs: Any) -> tuple[Any, ...]:
        key = (name, *(tuple(each.shape) for each in inputs))
        if key not in self._compiled:
            example = tuple(self.to_torch(each) for each in inputs)
            self._compiled[key] = self.compile(make(), example)
        return self._compiled[key](*inputs)

    @torch.no_grad()
    def __call__(
        self, images: Any, img_masks: Any, lang_tokens: Tensor, lang_masks: Tensor, state: Tensor,
        noise: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        started = time.perf_counter()
        model, dims = self.model, self.dims
        vlm = model.vlm_with_expert.get_vlm_model()
        observation = prepare_observation(
            images, img_masks, lang_tokens, lang_masks, state,
            stock_order=False, keep_cameras=False, max_language=model.config.tokenizer_max_length,
        )  # fmt: skip
        frames = torch.cat(observation.frames)
        if self._positions is None:
            self._positions = patch_positions(vlm, frames)
        positions = self._positions
        tokens = self.to_torch(self._run("vision", lambda: Vision(model, positions), frames)[0])
        seen = time.perf_counter()
        embeddings, pad_masks, att_masks = embed_prefix(
            observation, list(tokens.split(state.shape[0])), vlm, embed_state(state, read_heads(model).state),
            image_ends=None, length=0, dtype=torch.float32,
        )  # fmt: skip
        group = dims.query_heads // dims.kv_heads
        mask = added_mask(block_mask(pad_masks, att_masks), group)
        rope = rope_tables(torch.cumsum(pad_masks, dim=1) - 1, dims.head_dim)
        kv = self._run("prefix", lambda: Prefix(model), embeddings, mask, *rope)
        filled = time.perf_counter()
        chunk = self._denoise(pad_masks, kv, noise, group)
        done = time.perf_counter()
        self.stage_ms = {
            "vision": 1e3 * (seen - started),
            "prefix": 1e3 * (filled - seen),
            "denoise": 1e3 * (done - filled),
        }
        return chunk

    def _denoise(self, pad_masks: Tensor, kv: tuple[Any, ...], noise: Tensor, group: int) -> Tensor:
        dims, steps = self.dims, self.model.config.num_steps
        own, cross = suffix_tokens(pad_masks, dims.chunk, dims.head_dim)
        self_mask, cross_mask = (added_mask(tokens.mask, group) for tokens in (own, cross))
        rope = torch.stack([*own.rope, *cross.rope])
        x: Any = noise
        for step in range(steps):
            constants = (self.fold.bias[step], self_mask, cross_mask, rope)
            make = lambda: Step(self.model, steps, self.fold.weight)  # noqa: E731
            x = self.to_torch(self._run("step", make, x, *constants, *kv)[0])
        return x.clone()
