"""The denoise loop in one launch; csrc/cuda/denoise_persistent.cu, docs/denoise-persistent.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...model.dims import Dims
from ...model.kv_cache import PrefixKV
from ...model.weights import DecoderLayer, Heads
from ..reference.euler_step import Guidances
from ..torch.suffix import suffix_fold
from . import library

_BF16, _FP32 = torch.bfloat16, torch.float32
_EITHER = (_FP32, _BF16)
_OP = "denoise_persistent"

LIMITS = {"batch": 8, "prefix": 320, "suffix": 64, "actions": 64, "layers": 32, "head_dim": 64}
"""What a launch accepts at most. Layers: their addresses are parameters of the launch. The rest is as far as tests go;
a larger batch is no longer bound by the weights, and Triton's larger tiles are ahead."""


def why_not_persistent(
    dims: Dims,
    expert: list[DecoderLayer],
    heads: Heads,
    kv: PrefixKV,
    noise: Tensor,
    times: Tensor,
    guidance: Guidances | None = None,
) -> str | None:
    """Why one launch cannot run this loop on the device of ``noise``, one that takes this library's code, or None. Waits for
    no device work."""
    reason = _why_not_sizes(dims, expert, kv, noise, times) or _why_not_tensors(
        dims, expert, heads, kv, noise, times
    )
    if reason:
        return reason
    try:
        kernels = library.library(noise.device)
    except (RuntimeError, ImportError) as error:
        return str(error)
    with torch.cuda.device_of(noise):
        found = kernels.denoise_resources(_sizes(dims, expert, heads, kv, noise, times))
    if not found["cooperative"]:
        return (
            "the device has no cooperative launches, in which all blocks run at once; the barriers need them"
        )
    if found["ring_bytes"] < found["largest_slab"]:
        return (
            f"a block's shared memory takes {found['ring_bytes']} bytes of weights beside its activations; "
            f"accepted are {found['largest_slab']} and more, what 8 outputs of a product need"
        )
    if found["at_once"] < found["blocks"]:
        return f"the device runs {found['at_once']} blocks at once; accepted are {found['blocks']} and more"
    return None


def _why_not_sizes(
    dims: Dims, expert: list[DecoderLayer], kv: PrefixKV, noise: Tensor, times: Tensor
) -> str | None:
    if not isinstance(expert[0].gate, Tensor):
        return "the expert's weights are quantised; accepted are bfloat16 tensors"
    batch, prefix = kv.pad_masks.shape
    found = dict(
        batch=batch, prefix=prefix, suffix=dims.chunk, actions=noise.shape[-1], layers=len(expert),
        head_dim=dims.head_dim,
    )  # fmt: skip
    for name, size in found.items():
        if not 1 <= size <= LIMITS[name]:
            return f"{name} is {size}; accepted are 1 to {LIMITS[name]}"
    if times.shape[0] < 1:
        return "there are 0 steps; accepted is at least 1"
    if dims.head_dim % 16:
        return f"head_dim is {dims.head_dim}; accepted are multiples of 16"
    if dims.query_heads % dims.kv_heads:
        return f"{dims.query_heads} query heads over {dims.kv_heads} KV heads; accepted is a multiple"
    if dims.expert_width % 8 or expert[0].gate.shape[0] % 8:
        return (
            f"widths are {dims.expert_width} and {expert[0].gate.shape[0]}; accepted are multiples of 8, "
            "which are copied 16 bytes at a time"
        )
    return None


def _why_not_tensors(
    dims: Dims, expert: list[DecoderLayer], heads: Heads, kv: PrefixKV, noise: Tensor, times: Tensor
) -> str | None:
    batch, prefix = kv.pad_masks.shape
    width, inner, suffix = dims.expert_width, expert[0].gate.shape[0], dims.chunk
    query, keys = dims.query_heads * dims.head_dim, dims.kv_heads * dims.head_dim

    def check(name: str, tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is quantised; accepted: bfloat16")
        library.check("", name, tensor, shape, dtypes, like=noise, aligned=16)

    try:
        library.check("", "noise", noise, (batch, suffix, dims.action_width), (_FP32,), contiguous=False)
        # What torch folds or copies before the launch: of any strides, but a shape that torch would broadcast or a mask
        # of wider elements would be read wrongly by the kernel.
        before: list[tuple[str, Tensor, tuple[int, ...], tuple[torch.dtype, ...]]] = [
            ("kv.pad_masks", kv.pad_masks, (batch, prefix), (torch.bool,)),
            *(
                ("a table of the suffix's rotation", table, (batch, suffix, 1, dims.head_dim // 2), (_FP32,))
                for table in (*kv.own.rope, *kv.cross.rope)
            ),
            ("times", times, (times.shape[0], batch, width), (*library.DTYPES, torch.float64)),
            ("action_in's weight", heads.action_in.weight, (width, dims.action_width), library.DTYPES),
            ("action_in's bias", heads.action_in.bias, (width,), library.DTYPES),
            ("time_in's weight", heads.time_in.weight, (width, 2 * width), library.DTYPES),
            ("time_in's bias", heads.time_in.bias, (width,), library.DTYPES),
        ]
        for name, tensor, shape, dtypes in before:
            library.check("", name, tensor, shape, dtypes, like=noise, contiguous=False)
        for index, (layer, cache) in enumerate(zip(expert, kv.layers, strict=True)):
            of = f"of layer {index}"
            slots = (batch, prefix if layer.cross else prefix + suffix, dims.kv_heads, dims.head_dim)
            kind = cache.k.dtype
            check(f"norm1 {of}", layer.norm1.weight, (width,), _EITHER)
            check(f"norm2 {of}", layer.norm2.weight, (width,), _EITHER)
            check(f"the keys' cache {of}", cache.k, slots, _EITHER)
            check(f"the values' cache {of}", cache.v, slots, (kind,))
            shapes = {
                "q": (query, width), "o": (width, query), "gate": (inner, width), "up": (inner, width),
                "down": (width, inner),
            }  # fmt: skip
            shapes |= {} if layer.cross else {"k": (keys, width), "v": (keys, width)}
            for name, shape in shapes.items():
                check(f"{name} {of}", getattr(layer, name), shape, (_BF16,))
        check("time_out's weight", heads.time_out.weight, (width, width), _EITHER)
        check("time_out's bias", heads.time_out.bias, (width,), _EITHER)
        check("the last norm", heads.expert_norm.weight, (width,), _EITHER)
        check("action_out's weight", heads.action_out.weight, (dims.action_width, width), _EITHER)
        check("action_out's bias", heads.action_out.bias, (dims.action_width,), _EITHER)
    except ValueError as error:
        return str(error).removeprefix(": ")
    return None


def _sizes(
    dims: Dims, expert: list[DecoderLayer], heads: Heads, kv: PrefixKV, noise: Tensor, times: Tensor
) -> list[int]:
    batch, prefix = kv.pad_masks.shape
    return [
        batch, dims.chunk, prefix, len(expert), times.shape[0],
        dims.expert_width, expert[0].gate.shape[0], dims.query_heads, dims.kv_heads, dims.head_dim, noise.shape[-1],
        int(heads.time_out.weight.dtype is _FP32),
    ]  # fmt: skip


def denoise_persistent(
    dims: Dims,
    expert: list[DecoderLayer],
    heads: Heads,
    kv: PrefixKV,
    noise: Tensor,
    times: Tensor,
    guidance: Guidances | None = None,
) -> Tensor:
    """``x ← noise;  x ← x + dt·v(x, t) for t = 1, 1 - 1/N, ..``, the velocity v by the expert over the prefix KV.

    expert    weights bf16, norms fp32 | bf16, in any order of self- and cross-attention layers
    heads     fp32 | bf16 each
    kv        caches bf16 | fp32, contiguous; the slots of the suffix are written        pad_masks  [B, P] bool
              the suffix's tables fp32
    noise     [B, S, A]  fp32, left as it is        times  [N, B, E]  time embedding of every step
    guidance  where real-time chunking is on
    returns   [B, S, A]  fp32, fresh
    numerics  residual stream, sums, norm statistics, softmax and the last norm fp32; between products activations are
              bf16; the products of fp32 heads and fp32 KV in 16 bits of their mantissas. Equal bits in every run, on
              any number of multiprocessors
    errors    ValueError with the reason of ``why_not_persistent``, or for guidance of other shapes or dtypes;
              RuntimeError with CUDA's own words
    replaces  ``stages.denoise`` step by step, which replaces ``euler_integrate`` over ``denoise_step`` of LeRobot

    The folded time embedding, which depends on neither actions nor step, is made by torch before the launch. Scratch
    comes from torch's allocator, so the call can be captured in a graph.
    """
    reason = why_not_persistent(dims, expert, heads, kv, noise, times, guidance)
    if reason:
        raise ValueError(f"{_OP}: {reason}")
    kernels, address, device = library.library(noise.device), library.address, noise.device
    batch = noise.shape[0]
    steps, rows, width = times.shape[0], batch * dims.chunk, dims.expert_width
    noise, seen = noise.contiguous(), kv.pad_masks.contiguous()

    folded = suffix_fold(times, heads.action_in, heads.time_in)
    inputs = [
        folded.weight.contiguous(),
        folded.bias.contiguous(),
        noise,
        seen,
        *(table.contiguous() for table in (*kv.own.rope, *kv.cross.rope)),
    ]
    guides: list[Tensor | None] = [None, None, None]
    if guidance is not None:
        guides = list(_checked(guidance, noise, steps))

    def scratch(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    heads_width = dims.query_heads * dims.head_dim
    scratches = [
        scratch(rows, heads_width), scratch(rows, heads_width), scratch(rows, expert[0].gate.shape[0]),
        scratch(rows, width), scratch(rows, width), scratch(rows, width),
        scratch(rows, width, dtype=_FP32), scratch(rows, width // 8, dtype=_FP32), scratch(1, dtype=torch.int32),
    ]  # fmt: skip
    x = torch.empty_like(noise)

    def bits(tensors: list[Tensor]) -> int:
        return sum(1 << index for index, tensor in enumerate(tensors) if tensor.dtype is _FP32)

    small = [heads.time_out.bias, heads.expert_norm.weight, *heads.action_out]
    # A launch goes to the device that is current.
    with torch.cuda.device_of(noise):
        kernels.denoise_persistent(
            layers=[
                [
                    address(tensor)
                    for tensor in (
                        layer.q, None if layer.cross else layer.k, None if layer.cross else layer.v, layer.o,
                        layer.gate, layer.up, layer.down, layer.norm1.weight, layer.norm2.weight, cache.k, cache.v,
                    )
                ]
                for layer, cache in zip(expert, kv.layers, strict=True)
            ],
            eps=[[layer.norm1.eps, layer.norm2.eps] for layer in expert],
            fp32_layers=[
                bits([layer.norm1.weight for layer in expert]),
                bits([layer.norm2.weight for layer in expert]),
                bits([cache.k for cache in kv.layers]),
            ],
            sizes=_sizes(dims, expert, heads, kv, noise, times),
            heads=[address(tensor) for tensor in (heads.time_out.weight, *small)],
            fp32_heads=[tensor.dtype is _FP32 for tensor in small],
            end_eps=heads.expert_norm.eps,
            inputs=[address(tensor) for tensor in (*inputs, *guides)],
            scratch=[address(tensor) for tensor in scratches],
            x=address(x),
            stream=library.stream(device),
        )  # fmt: skip
    return x


def _checked(guidance: Guidances, noise: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, suffix, actions = noise.shape
    previous = guidance.previous
    if previous.ndim == 3 and previous.shape[0] == 1:
        previous = previous.expand(batch, -1, -1)
    previous, weights = previous.contiguous(), guidance.weights.contiguous()
    strengths = guidance.strengths.contiguous()
    library.check(_OP, "guidance.previous", previous, (batch, suffix, actions), (_FP32,), like=noise)
    library.check(_OP, "guidance.weights", weights, (1, suffix, 1), (_FP32,), like=noise)
    library.check(_OP, "guidance.strengths", strengths, (steps,), (_FP32,), like=noise)
    return previous, weights, strengths
