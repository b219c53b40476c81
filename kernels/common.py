"""What all kernels share: the target they are tuned for, checks of arguments, and small jitted pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .counters import arrivals as arrival_counters
from .eight_bits import row_scale, scale_of, to_e4m3

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn
IEEE = tl.constexpr("ieee")

_assumed: ContextVar[int | None] = ContextVar("assumed_capability", default=None)


@cache
def _of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """The compute capability that launchers tune for, 90 for 9.0: the device's own; off a GPU (Triton's interpreter) 80."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    if device.type != "cuda":
        return 80
    return _of_device(torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def assume_capability(cc: int) -> Iterator[None]:
    """Inside, launchers tune for this capability whatever the device: for compiling ahead of time."""
    token = _assumed.set(cc)
    try:
        yield
    finally:
        _assumed.reset(token)


def check(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor | None = None) -> None:
    """Raise ValueError unless the tensor has this shape, one of DTYPES, a contiguous last dimension, the device of like."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; accepted is {list(shape)}")
    if tensor.dtype not in DTYPES:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{op}: {name} is {tensor.dtype}; accepted are {accepted}")
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{op}: the last dimension of {name} is strided; call .contiguous() on it")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors on {like.device}")


def refuse_graph(op: str) -> None:
    """Raise RuntimeError in a backward whose results ought to have a gradient again. ``once_differentiable`` would let it
    pass where the gradient that comes in has no graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: a gradient with create_graph=True; accepted is create_graph=False, for the gradient has none again. "
            "smolvla_fast.unpatch(policy) gives stock, which has"
        )


def parts(
    op: str, name: str, weight: Any, shape: tuple[int, ...], like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(what the kernel multiplies by, the scales of its rows) of a plain or a quantised weight, checked.

    A quantised weight is (data, scale, dtype): [O, I] e4m3, [O] fp32, and the dtype of its products; a plain one has no
    scales, and is given twice.
    """
    if isinstance(weight, Tensor):
        check(op, name, weight, shape, like)
        return weight, weight
    data, scale, _ = weight
    if tuple(data.shape) != tuple(shape) or data.dtype is not E4M3 or not data.is_contiguous():
        raise ValueError(
            f"{op}: {name} is {data.dtype}, {list(data.shape)}; accepted is float8_e4m3fn, {list(shape)}, contiguous"
        )
    check(op, f"the scale of {name}", scale, shape[:1], like)
    return data, scale


def as_rows(x: Tensor) -> Tensor:
    """[..., I] -> [rows, I]: a view wherever the leading dimensions have one stride, else a copy."""
    return x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def normalise_first(dtype: torch.dtype) -> bool:
    """Whether rows are scaled by 1/rms before a product with weights of this dtype, not after it.

    After it costs nothing, and errs no more wherever x·norm_weight keeps the range of fp32: in fp32 and bf16. fp16 overflows
    at 65 504, which outlier channels of a residual stream reach, and loses bits below 6e-5; it pays a pass over x instead.
    """
    return dtype is torch.float16


def split_workspace(tiles: int, split: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Partial sums, unwritten, and arrival counters, zero, of one split-K launch, which leaves the counters at zero.

    tiles, split, size  tiles of the output, programs a tile, elements of a tile
    returns             partials [tiles·split·size] fp32, arrivals [tiles] int32

    Zeroing counters here would be one more launch before every product. So they are zeroed once a process, each launch
    restores them, and no two launches that can run at the same time share one: the eager launches of a stream wait for
    each other and have one set; a launch captured into a CUDA graph, which may be replayed beside any other, takes a set
    (some 100 bytes), which the graph gives back when it goes (``counters.give_back``). Where none are left, or a capture
    comes before the first eager launch, the launch gets fresh ones. Partial sums come from the caching allocator, which
    keeps streams and graphs apart.
    """
    partials = torch.empty(tiles * split * size, dtype=torch.float32, device=device)
    arrivals = arrival_counters(tiles, device) if device.type == "cuda" else None
    if arrivals is None:
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=device)
    return partials, arrivals


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x, ROUNDED: tl.constexpr):
    """x / (1 + e^-x) in fp32, to two units in the last place. ROUNDED: to half a unit, for a result that stays in fp32; then
    a division of 0, as in every padded row, is a call."""
    return tl.div_rn(x, 1.0 + tl.exp(-x)) if ROUNDED else x / (1.0 + tl.exp(-x))


@triton.jit
def gelu_tanh(x):
    """The tanh form of GELU, with tanh(u) = 2·sigmoid(2u) - 1: there is no tanh that every target has."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * sigmoid(2.0 * u)


@triton.jit
def tile_of(program, row_tiles, col_tiles, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a program: GROUP_M row tiles share each weight tile while it is in L2."""
    group_size = GROUP_M * col_tiles
    first = program // group_size * GROUP_M
    members = min(row_tiles - first, GROUP_M)
    within = program % group_size
    return first + within % members, within // members


@triton.jit
def product(
    x_rows,
    weight_cols,
    row_mask,
    col_mask,
    start,
    stop,
    inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr = IEEE,
):
    """x·weightᵀ over start <= k < stop of ``inputs``, in fp32, for at least one k. Pointers to k = 0: x_rows [BLOCK_M, 1],
    weight_cols [1, BLOCK_N]. Beside an 8-bit weight x is quantised by row; the weight's scales are the caller's to apply.
    PRECISION: of products of fp32, as in ``tuning.fp32_precision``."""
    EIGHT_BITS: tl.constexpr = weight_cols.dtype.element_ty == tl.float8e4nv
    if EIGHT_BITS:
        scale = row_scale(x_rows, row_mask, inputs, BLOCK_M, BLOCK_K)
        inverse = 1.0 / scale
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if weight_cols.dtype.element_ty.primitive_bitwidth == 16:
        # ptxas serializes the wgmma of a loop that may not run at all. Products of other widths are none, or were not
        # serialized, and get worse registers by it.
        tl.assume(start < stop)
    for first in range(start, stop, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & (k < stop)[None, :], other=0.0)
        w = tl.load(weight_cols + k[:, None], mask=(k < stop)[:, None] & col_mask[None, :], other=0.0)
        if EIGHT_BITS:
            # Hopper would otherwise add up in fewer bits than fp32's.
            acc = tl.dot(to_e4m3(x.to(tl.float32) * inverse[:, None]), w, acc, max_num_imprecise_acc=0)
        else:
            acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    if EIGHT_BITS:
        acc *= scale[:, None]
    return acc


@triton.jit
def inverse_rms(squares, inputs, eps):
    """1/rms of rows from their sums of squares, to about two units in the last place; all of a row carries its error.

    A Newton step behind the approximate root; a rounded division or root would be a call. A mean that overflowed gives 0.
    """
    mean = squares * (1.0 / inputs) + eps
    root = tl.rsqrt(mean)
    error = 1.0 - mean * root * root
    return tl.where(root > 0.0, root + 0.5 * root * error, root)


@triton.jit
def norm_products(
    x_rows,
    norm_weight_ptr,
    a_cols,
    b_cols,
    row_mask,
    col_mask,
    inputs,
    eps,
    NORMALISE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h·aᵀ and h·bᵀ with h = rms_norm(x), in fp32, while x is read once; pointers as in ``product``.

    1/rms is a factor of the whole row, so the sum of squares is taken along the way and applied to the products; see
    ``normalise_first`` for when it is not.
    """
    EIGHT_BITS: tl.constexpr = a_cols.dtype.element_ty == tl.float8e4nv
    squares = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    largest = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if NORMALISE_FIRST or EIGHT_BITS:
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & (k < inputs)[None, :], other=0.0)
            squares += x.to(tl.float32) * x.to(tl.float32)
            if EIGHT_BITS:
                norm_weight = tl.load(norm_weight_ptr + k, mask=k < inputs, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(x.to(tl.float32) * norm_weight[None, :]))
        scale = inverse_rms(tl.sum(squares, axis=1), inputs, eps)
        if EIGHT_BITS:
            eighth = scale_of(tl.max(largest, axis=1) * scale, tl.sum(squares, axis=1) * 0.0)
            scale = scale / eighth
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    b = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if a_cols.dtype.element_ty.primitive_bitwidth == 16:
        tl.assume(inputs > 0)  # as in ``product``
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        k_mask = k < inputs
        x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
        w_mask = k_mask[:, None] & col_mask[None, :]
        a_tile = tl.load(a_cols + k[:, None], mask=w_mask, other=0.0)
        b_tile = tl.load(b_cols + k[:, None], mask=w_mask, other=0.0)
        if NORMALISE_FIRST or EIGHT_BITS:
            h = x * scale[:, None] * norm_weight[None, :]
        else:
            squares += x * x
            h = x * norm_weight[None, :]
        if EIGHT_BITS:
            narrow = to_e4m3(h)
            a = tl.dot(narrow, a_tile, a, max_num_imprecise_acc=0)
            b = tl.dot(narrow, b_tile, b, max_num_imprecise_acc=0)
        else:
            h = h.to(a_tile.dtype)
            a = tl.dot(h, a_tile, a, input_precision="ieee")
            b = tl.dot(h, b_tile, b, input_precision="ieee")
    if EIGHT_BITS:
        a *= eighth[:, None]
        b *= eighth[:, None]
    elif not NORMALISE_FIRST:
        scale = inverse_rms(tl.sum(squares, axis=1), inputs, eps)
        a *= scale[:, None]
        b *= scale[:, None]
    return a, b


@triton.jit
def split_of(split, inputs, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """(start, stop) of a program's share of K: whole blocks, as even as they come."""
    blocks = tl.cdiv(inputs, BLOCK_K)
    start = split * blocks // SPLIT_K * BLOCK_K
    return start, min((split + 1) * blocks // SPLIT_K * BLOCK_K, inputs)


@triton.jit
def sum_of_splits(
    acc,
    partials_ptr,
    arrivals_ptr,
    tile,
    split,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(the whole sum, True) for the program of this tile that arrives last, (anything, False) for the others.

    The order of arrival varies; the order of addition does not: that of K.
    """
    last = True
    if SPLIT_K > 1:
        partials = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
        store_part(acc, partials, split, BLOCK_M, BLOCK_N)
        last = arrives_last(arrivals_ptr + tile, SPLIT_K)
        if last:
            acc = sum_of_parts(partials, SPLIT_K, BLOCK_M, BLOCK_N)
    return acc, last


@triton.jit
def store_part(acc, partials, split, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a program's partial sums of a tile."""
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partials + split * (BLOCK_M * BLOCK_N) + within, acc)


@triton.jit
def arrives_last(arrivals, SPLIT_K: tl.constexpr):
    """Whether this program is the last of its tile; it then puts the counter back."""
    # One thread counts for all: the barrier puts the others' stores before its release.
    tl.debug_barrier()
    last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def sum_of_parts(partials, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """All parts of a tile, added up in the order of K."""
    within = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(SPLIT_K):
        # From L2, where the other programs' stores are; this multiprocessor's L1 does not know of them.
        acc += tl.load(partials + i * (BLOCK_M * BLOCK_N) + within, cache_modifier=".cg")
    return acc


def on_tensor_cores(cc: int, *dtypes: torch.dtype) -> bool:
    """Whether Triton computes products of these dtypes in one pass on tensor cores: 16 bits, from 8.0 on."""
    return cc >= 80 and all(dtype.itemsize == 2 for dtype in dtypes)
