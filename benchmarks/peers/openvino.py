"""OpenVINO on the engine's own stages: traced over torch's ops, converted in memory, compiled for the CPU.

So OpenVINO is given the work that our backends have: the last text layer computes keys and values alone, cross KV is
projected once a chunk. Weights are the policy's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from smolvla_fast import inference
from smolvla_fast.loss.layers import rotate
from smolvla_fast.model.kv_cache import PrefixKV
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops.reference.suffix_tokens import suffix_tokens
from smolvla_fast.ops.select import backend_ops
from smolvla_fast.ops.torch import linear
from smolvla_fast.ops.torch.decoder import norm_qkv_rope
from smolvla_fast.ops.torch.masked_attention import attention_with_grad
from smolvla_fast.stages.denoise import denoise
from smolvla_fast.stages.prefix import fill_prefix
from smolvla_fast.stages.vision import encode_images

HINTS = {"fp32": "f32", "bf16": "bf16"}
NO_INT8 = "OpenVINO has no int8 without quantising the model by another library (NNCF), so its work would not be the same"
NO_ISA = "OpenVINO does not start where ONEDNN_MAX_CPU_ISA is set"

Call = Callable[..., tuple[Tensor, ...]]


@cache
def core() -> Any:
    """OpenVINO's one core of this process, never let go of. Each gives the thread a stack for signals; the ends of several
    leave it one that is freed, and the next signal, be it the alarm of a time limit, kills the process (2026.4)."""
    import openvino as ov

    return ov.Core()


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
        compiled = core().compile_model(converted, "CPU", settings)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = [each.contiguous().numpy() for each in inputs]
            found = compiled(given, share_inputs=True, share_outputs=True)
            return tuple(map(torch.from_numpy, found.to_tuple()))

        return run

    return compile_


def rotate_into(x: Tensor, sin: Tensor, cos: Tensor, out: Any = None) -> Any:
    rotated = rotate(x, (sin, cos))
    return rotated if out is None else out.copy_(rotated)


class GrownKV:
    """A ``LayerKV`` whose suffix is joined to the prefix: a traced graph has no memory to write into."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    def suffix(self, prefix: int) -> Any:
        return tuple(SimpleNamespace(copy_=partial(self._grow, name)) for name in ("k", "v"))

    def _grow(self, name: str, new: Tensor) -> None:
        setattr(self, name, torch.cat([getattr(self, name), new], dim=1))


class Runner:
    """Stands for ``sample_actions`` of one fp32 model: the engine's own chunk, each of its stages compiled.

    compile_  makes a callable of each stage when the first chunk shows the shapes; other shapes make others
    """

    def __init__(self, model: Any, compile_: Callable[[torch.nn.Module, tuple[Tensor, ...]], Call]) -> None:
        self.model, self.compile = model, compile_
        # Fused attention, which OpenVINO has a kernel for, and no writing into what a trace cannot follow.
        own = {"prepare_mask": lambda mask: mask, "norm_qkv_rope": partial(norm_qkv_rope, rotate=rotate_into)}
        own["masked_attention"] = lambda *given, memory=None: attention_with_grad(*given)
        self.engine = inference.Engine(TIERS["fp32"], "torch", torch.device("cpu"))
        # The plain table: a choice by shapes is nothing that a trace can follow.
        self.engine.ops = replace(backend_ops("torch"), **own)
        self._compiled: dict[Any, Call] = {}

    def _run(self, function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        key = (function.__name__, self.model.config.num_steps, *(tuple(each.shape) for each in inputs))
        if key not in self._compiled:
            stage = torch.nn.Module()
            stage.model, stage.forward = self.model, function  # a module, as it holds weights
            # oneDNN's own op is torch's alone.
            with patch.object(linear, "onednn_serves", lambda dtype: False), warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # other shapes are traced anew
                self._compiled[key] = self.compile(stage, inputs)
        return self._compiled[key](*inputs)

    def _vision(self, ops: Any, vlm: Any, cast: Any, dims: Any, *given: Tensor) -> Tensor:
        def vision(frames: Tensor, positions: Tensor) -> Tensor:
            return encode_images(ops, vlm, cast, dims, frames, positions)

        return self._run(vision, *given)[0]

    def _prefix(self, ops: Any, vlm: Any, cast: Any, dims: Any, *given: Any) -> Any:
        embedded, expert = given[:3], given[3]

        def prefix(*embedded: Tensor) -> tuple[Tensor, ...]:
            kv = fill_prefix(ops, vlm, cast, replace(dims, chunk=0), *embedded, expert)  # no free slots
            return tuple(each for layer in kv.layers for each in (layer.k, layer.v))

        return embedded[1], *self._run(prefix, *embedded)

    def _denoise(
        self, ops: Any, dims: Any, expert: Any, heads: Any, kv: Any, x: Tensor, times: Tensor, *_: Any
    ) -> Any:
        def step(x: Tensor, time: Tensor, pad_masks: Tensor, *kv: Tensor) -> Tensor:
            """One of N steps: the whole way from noise, which a loop of one step goes, divided by N."""
            layers: Any = [GrownKV(k, v) for k, v in zip(kv[::2], kv[1::2], strict=True)]
            prefix = PrefixKV(layers, pad_masks, *suffix_tokens(pad_masks, dims.chunk, dims.head_dim))
            end, _ = denoise(ops, dims, expert, heads, prefix, x, time)
            return x + (end - x) / self.model.config.num_steps

        for time in times.split(1):
            (x,) = self._run(step, x, time, *kv)
        return x.clone(), None

    def __call__(self, *given: Any, noise: Tensor, **_: Any) -> Tensor:
        own = dict(encode_images=self._vision, fill_prefix=self._prefix, denoise=self._denoise)
        with patch.multiple(inference, **own):
            return self.engine.act(self.model, *given, noise)
