"""Who computes a shape class where nothing was measured on this machine: what measured fastest on most of ours."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from . import extension, processor
from .availability import why_not_library
from .cuda.linear_residual import CLUSTER_ROWS
from .shape_class import Attention, Product
from .torch import fused_attention, linear

Rule = Callable[[Any], str]
"""shape class -> name of a candidate"""

CPU_KERNEL_ROWS = 64
"""Up to this many rows a product on a CPU goes to our kernel: oneDNN first rearranges each weight it reads. ``kManyRows`` of
csrc/cpu/linear.cpp is one more."""
ONE_LAUNCH_ROWS = 64
"""Up to this many rows of a step attention and its output projection are one launch of Triton's."""
FP32_KERNEL_ROWS = 64
"""Above this many rows an fp32 product on a GPU goes to torch: without TF32 it runs outside the tensor cores, where a kernel
of ours has nothing to win over the vendor's library. The 50 rows of an action chunk stay below."""
LIBRARY_ROWS = 512
"""Above this many rows a product in 16 bits with a library's epilogue goes to the library on an NVIDIA GPU, and so does
attention: our tiles leave 36 of an H100's 132 multiprocessors idle there. Reasoned, not measured."""
LIBRARY_BLOCKS = 320
"""Blocks of 64 queries from which FlashAttention takes one launch on every GPU: below 1.6 a multiprocessor it shares the
keys of a block between programs and adds up in a second launch. The largest GPU has 188 multiprocessors."""

MOST_OF_A_GROUP, MOST_KV_HEADS = 4, 16
"""Query heads of a KV head that fit a tile with their tokens, and KV heads that can share a sum."""


BESIDE_TRITON = ("norm_qkv_rope", "linear_residual", "norm_swiglu")
"""Ops of a decoder layer that have a kernel of CUDA C++ for the chain of Triton's."""


def default_rules(backend: str, device: torch.device) -> dict[str, Rule]:
    """Of the ops whose default is not the first candidate: how it follows from the shape class."""
    by_torch = partial(_torch, device.type == "cpu")
    decoder = ("norm_qkv_rope", "linear_residual", "norm_swiglu", "suffix_embed", "euler_step")
    products = ("linear", "cross_kv", "pixel_shuffle_linear", *decoder)
    if backend == "cpu":
        return {
            **dict.fromkeys(
                ("cross_kv", "pixel_shuffle_linear"),
                lambda shape: "cpu" if _packs_weights(shape) else by_torch(shape),
            ),
            **dict.fromkeys(
                decoder, lambda shape: "cpu" if _few_rows(shape) or _packs_weights(shape) else by_torch(shape)
            ),
            "linear": lambda shape: (
                "cpu" if _packs_weights(shape) or _epilogue_costs(shape) else by_torch(shape)
            ),
            "attention": lambda shape: "sdpa" if _on_tiles(shape.q) else "cpu",
        }
    if backend == "triton":
        alike = ("linear", "pixel_shuffle_linear", "norm_qkv_rope", "linear_residual", "norm_swiglu")
        rules: dict[str, Rule] = {**dict.fromkeys(alike, _triton), "attention_residual": _attention_residual}
        return rules | (
            {"linear": _cuda_linear, "attention": partial(_cuda_attention, _cudnn_leads(device))}
            if device.type == "cuda"
            else {}
        )
    return dict.fromkeys(products, by_torch)


def _torch(on_cpu: bool, shape: Product) -> str:
    return "onednn" if on_cpu and linear.onednn_serves(shape.dtype) else "aten"


def _on_tiles(dtype: Any) -> bool:
    """Whether oneDNN multiplies this dtype on AMX, which our kernels do not use: there it was two to seven times as fast at
    every size of a chunk."""
    return dtype is torch.bfloat16 and "AMX-BF16" in processor.features()


def _few_rows(shape: Product) -> bool:
    return shape.rows <= CPU_KERNEL_ROWS and not _on_tiles(shape.dtype)


def _packs_weights(shape: Product) -> bool:
    """Whether our kernel serves many rows: in fp32 on 256-bit vectors, where it packs the weights."""
    return (
        shape.dtype is torch.float32
        and shape.rows > CPU_KERNEL_ROWS
        and extension.load("cpu").level() == "avx2"
    )


def _epilogue_costs(shape: Product) -> bool:
    """Whether what follows the product costs oneDNN more than it is ahead: an activation, or the separate addition of a
    residual wider than the weight."""
    return not _on_tiles(shape.dtype) and any(each not in (shape.dtype, "tf32") for each in shape.end)


def _attention_residual(shape: Product) -> str:
    """In one launch where a step has few rows: with many, all that attend once more for each tile of columns count. Heads
    of a group share a tile, quantised weights need the whole row at once, and in fp32 a tile's attention fills the
    registers."""
    heads, kv_heads = map(int, shape.end[0].split(":"))
    fits = heads // kv_heads <= MOST_OF_A_GROUP and kv_heads <= MOST_KV_HEADS
    narrow = all(each in (torch.bfloat16, torch.float16) for each in (shape.dtype, shape.x, *shape.end[2:]))
    return "triton" if shape.rows <= ONE_LAUNCH_ROWS and fits and narrow else "apart"


def hopper_rules(beside: Collection[str]) -> dict[str, Rule]:
    """Of a Hopper GPU in the place of Triton's: where the kernels ``beside`` Triton's serve."""
    rules: dict[str, Rule] = dict.fromkeys(beside, _hopper_product)
    return rules | ({"attention_residual": _hopper_attention_residual} if "linear_residual" in beside else {})


def _hopper_product(shape: Product) -> str:
    """Of few rows. Where there is no candidate "cuda" for the class Triton's kernel serves, as ever: ``Choice.default``."""
    return "cuda" if shape.rows <= CLUSTER_ROWS and shape.dtype is torch.bfloat16 else _triton(shape)


def _hopper_attention_residual(shape: Product) -> str:
    """Masked attention alone took a third of the one launch, and the cluster's sum over twice as many inputs two fifths of
    it; not measured one behind the other: benchmarks/results/contacts."""
    return "apart" if shape.dtype is shape.x is torch.bfloat16 else _attention_residual(shape)


def _triton(shape: Product) -> str:
    # Not where the caller lets fp32 products run in TF32, which torch then would do and our kernels do not.
    plain = shape.dtype is torch.float32 and "tf32" not in shape.end
    return "aten" if plain and shape.rows > FP32_KERNEL_ROWS else "triton"


def _cuda_linear(shape: Product) -> str:
    """A library where it takes as few launches as our kernel."""
    if shape.rows > LIBRARY_ROWS and shape.x is shape.dtype and shape.dtype in fused_attention.DTYPES:
        return {(): "aten", ("gelu_tanh",): "cublaslt", (torch.float32,): "cublas"}.get(shape.end, "triton")
    return _triton(shape)


def _cudnn_leads(device: torch.device) -> bool:
    """Whether torch itself prefers cuDNN's attention to FlashAttention-2, as ``check_prefer_cudnn_attention`` in its
    ``sdp_utils.cpp`` says: on Hopper and 10.x, with a cuDNN above 9.15.0. FlashAttention-2 leaves them half idle, for its
    products and exponents run one behind the other (arXiv 2407.08608). Not measured here."""
    if why_not_library("cudnn", device) or torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return False
    return (torch.backends.cudnn.version() or 0) >= fused_attention.CUDNN_ANY_LENGTH


def _cuda_attention(cudnn_leads: bool, shape: Attention) -> str:
    """cuDNN's is one launch whatever the blocks."""
    if shape.queries <= LIBRARY_ROWS:
        return "triton"
    if cudnn_leads and fused_attention.takes("cudnn", shape.queries, shape.head_dim, shape.q):
        return "cudnn"
    blocks = shape.batch * int(shape.heads) * -(-shape.queries // 64)
    return "flash-sdpa" if blocks >= LIBRARY_BLOCKS else "triton"
