"""OpenVINO on the engine's own stages: traced over torch's ops, converted in memory, compiled for the CPU.

So OpenVINO is given the work that our backends have: the last text layer computes keys and values alone, cross KV is
projected once a chunk. Weights are the policy's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from smolvla_fast.engine.timing import section
from smolvla_fast.inference import _time_embeddings as time_embeddings
from smolvla_fast.model.dims import read_dims
from smolvla_fast.model.kv_cache import PrefixKV
from smolvla_fast.model.weights import read_expert_layers, read_heads
from smolvla_fast.ops.select import backend_ops
from smolvla_fast.ops.torch import linear
from smolvla_fast.ops.torch.decoder import norm_qkv_rope
from smolvla_fast.ops.torch.masked_attention import attention_with_grad
from smolvla_fast.stages.denoise import denoise
from smolvla_fast.stages.observation import prepare_observation
from smolvla_fast.stages.prefix import embed_prefix, embed_state, fill_prefix
from smolvla_fast.stages.vision import encode_images, patch_positions

HINTS = {"fp32": "f32", "bf16": "bf16"}
NO_INT8 = "OpenVINO has no int8 without quantising the model by another library (NNCF), so its work would not be the same"
NO_ISA = "OpenVINO does not start where ONEDNN_MAX_CPU_ISA is set"

Call = Callable[..., tuple[Tensor, ...]]


def why_missing(precision: str = "fp32") -> str | None:
    """Why OpenVINO is no peer at this precision, or None."""
    if precision not in HINTS:
        return NO_INT8
    if find_spec("openvino") is None:
        return 'openvino is not installed; run `pip install "smolvla_fast[bench]"`'
    return NO_ISA if "ONEDNN_MAX_CPU_ISA" in os.environ else None


def compile_for_cpu(precision: str, threads: int) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], Call]:
    """Compiles a module for inputs of the shapes of an example.

    precision  of ``HINTS``: in what OpenVINO may compute (INFERENCE_PRECISION_HINT)
    """
    import openvino as ov

    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }  # fmt: skip

    def compile_(module: torch.nn.Module, example: tuple[Tensor, ...]) -> Call:
        converted = ov.convert_model(module.eval(), example_input=example)
        # A trace leaves shapes open; OpenVINO plans memory and kernels better for known ones.
        ports = zip(converted.inputs, example, strict=True)
        converted.reshape({port: list(each.shape) for port, each in ports})
        request = ov.Core().compile_model(converted, "CPU", settings).create_infer_request()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            for index, each in enumerate(inputs):
                request.set_input_tensor(index, ov.Tensor(each.contiguous().numpy(), shared_memory=True))
            request.infer()
            outputs = (request.get_output_tensor(index) for index in range(len(request.model_outputs)))
            return tuple(torch.from_numpy(each.data) for each in outputs)

        return run

    return compile_


def as_stored(matrix: Tensor) -> Tensor:
    return matrix


def rotate(x: Tensor, sin: Tensor, cos: Tensor, out: Any = None) -> Any:
    """See ``reference.rope.apply_rope``."""
    low, high = x.chunk(2, dim=-1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)
    return rotated if out is None else out.copy_(rotated)


class GrownKV:
    """A ``LayerKV`` whose suffix is joined to the prefix: a traced graph has no memory to write into."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def suffix(self, prefix: int) -> Any:
        return tuple(SimpleNamespace(copy_=partial(self._grow, name)) for name in ("k", "v"))

    def _grow(self, name: str, new: Tensor) -> None:
        setattr(self, name, torch.cat([getattr(self, name), new], dim=1))


class Stage(torch.nn.Module):
    """A function of tensors as a module that holds the weights of a model."""

    def __init__(self, model: Any, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.forward = model, function


class Runner:
    """Stands for ``sample_actions`` of one fp32 model.

    compile_  makes a callable of each stage when the first chunk shows the shapes; other shapes make others
    """

    def __init__(self, model: Any, compile_: Callable[[torch.nn.Module, tuple[Tensor, ...]], Call]) -> None:
        self.model, self.compile = model, compile_
        # Fused attention, which OpenVINO has a kernel for, and no writing into what a trace cannot follow.
        own = {"prepare_mask": lambda mask: mask, "norm_qkv_rope": partial(norm_qkv_rope, rotate=rotate)}
        own["masked_attention"] = lambda *given, memory=None: attention_with_grad(*given)
        self.ops = replace(backend_ops("torch"), **own)
        self.dims, self.heads = read_dims(model), read_heads(model)
        self.vlm = model.vlm_with_expert.get_vlm_model()
        self.expert = read_expert_layers(model.vlm_with_expert, as_stored, as_stored)
        self._compiled: dict[Any, Call] = {}

    def _vision(self, frames: Tensor, positions: Tensor) -> Tensor:
        return encode_images(self.ops, self.vlm, as_stored, self.dims, frames, positions)

    def _prefix(self, *embedded: Tensor) -> tuple[Tensor, ...]:
        dims = replace(self.dims, chunk=0)  # no free slots
        kv = fill_prefix(self.ops, self.vlm, as_stored, dims, *embedded, self.expert)
        return tuple(each for layer in kv.layers for each in (layer.k, layer.v))

    def _step(self, x: Tensor, time: Tensor, pad_masks: Tensor, *kv: Tensor) -> Tensor:
        """One of N steps: the whole way from noise, which a loop of one step goes, divided by N."""
        layers: Any = [GrownKV(k, v) for k, v in zip(kv[::2], kv[1::2], strict=True)]
        end, _ = denoise(self.ops, self.dims, self.expert, self.heads, PrefixKV(layers, pad_masks), x, time)
        return x + (end - x) / self.model.config.num_steps

    def _run(self, function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        key = (function.__name__, self.model.config.num_steps, *(tuple(each.shape) for each in inputs))
        if key not in self._compiled:
            # oneDNN's own op is torch's alone.
            with patch.object(linear, "onednn_serves", lambda dtype: False), warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # other shapes are traced anew
                self._compiled[key] = self.compile(Stage(self.model, function), inputs)
        return self._compiled[key](*inputs)

    @torch.no_grad()
    def __call__(
        self, images: Any, img_masks: Any, lang_tokens: Tensor, lang_masks: Tensor, state: Tensor,
        noise: Tensor, **_: Any,
    ) -> Tensor:  # fmt: skip
        config = self.model.config
        observation = prepare_observation(
            images, img_masks, lang_tokens, lang_masks, state,
            stock_order=False, keep_cameras=False, max_language=config.tokenizer_max_length,
        )  # fmt: skip
        with section("vision"):
            frames = torch.cat(observation.frames)
            (tokens,) = self._run(self._vision, frames, patch_positions(self.vlm, frames))
        with section("prefix"):
            embedded = embed_prefix(
                observation, list(tokens.split(len(state))), self.vlm, embed_state(state, self.heads.state),
                image_ends=None, length=0, dtype=torch.float32,
            )  # fmt: skip
            kv = self._run(self._prefix, *embedded)
        with section("denoise"):
            times = time_embeddings(
                config.num_steps, config.min_period, config.max_period, self.dims.expert_width, len(state),
                noise.device,
            )  # fmt: skip
            x = noise
            for each in times.split(1):
                (x,) = self._run(self._step, x, each, embedded[1], *kv)
            return x.clone()
