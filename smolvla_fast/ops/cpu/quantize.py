"""What stands before and behind an integer product on a CPU, as functions on tensors; checked here as in ``kernels.py``.

The product of bytes is torch's, in ``int8.py``, on AMX ours, in ``int8_linear.py``, on aarch64 ours, here; that of 16 bits
is in ``int16.py``. Numbers come in as fp32 or bf16 and go out as rows of integers with a scale each
(``reference.quantize.IntegerRows``); what a product of bytes leaves comes in as fp32.
Equal bits at every instruction level and for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import extension
from ..memory import Memory, empty
from ..reference.quantize import KINDS, IntegerRows, IntegerWeight
from .kernels import ACTIVATIONS
from .operands import KERNELS, check_contiguous, check_one

_NONE, _LAYER, _RMS = range(3)


def quantize_rows(
    x: Tensor, dtype: torch.dtype = torch.uint8, *, memory: Memory | None = None
) -> IntegerRows:
    """See ``reference.quantize.quantize_activations``.

    x        [..., K]  fp32 | bf16, contiguous
    dtype    uint8 | int16; of 16 bits data is [..., K + K % 2], with a zero behind an odd number of inputs
    memory   where the rows are kept, until it is given again; fresh where None: see ``ops.memory``
    errors   as ``kernels.rms_norm``
    """
    return _quantize("quantize_rows", _NONE, x, None, None, 0.0, dtype, memory)


def layer_norm_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype = torch.uint8,
    *,
    memory: Memory | None = None,
) -> IntegerRows:
    """``kernels.layer_norm`` in fp32, and its rows at once as integers: the same bits as one after the other."""
    return _quantize("layer_norm_rows", _LAYER, x, weight, bias, eps, dtype, memory)


def rms_norm_rows(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.uint8, *, memory: Memory | None = None
) -> IntegerRows:
    """``kernels.rms_norm`` of fp32 x, and its rows at once as integers."""
    return _quantize("rms_norm_rows", _RMS, x, weight, None, eps, dtype, memory)


def _quantize(
    op: str,
    norm: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    memory: Memory | None,
) -> IntegerRows:
    if dtype not in KINDS:
        raise TypeError(f"{op}: dtype is {dtype}; accepted are {', '.join(map(str, KINDS))}")
    if x.dtype not in KERNELS:
        raise TypeError(f"{op}: x has dtype {x.dtype}; accepted are {', '.join(map(str, KERNELS))}")
    if not x.shape or not x.shape[-1]:
        raise ValueError(f"{op}: x has shape {list(x.shape)}; accepted is [..., K], K at least 1")
    check_one(op, "x", x, x.dtype, "x", x.shape)
    check_contiguous(op, "x", x)
    addresses = []
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32
            check_one(op, name, tensor, own, "a norm", x.shape[-1:])
            tensor = tensor.float().contiguous()
        addresses.append(tensor)
    width = x.shape[-1] + (x.shape[-1] % 2 if dtype is torch.int16 else 0)
    out = _rows(memory, (*x.shape[:-1], width), dtype)
    if x.numel():
        kinds = f"{KERNELS[x.dtype]}_{str(dtype).removeprefix('torch.')}"
        kernel = getattr(extension.load("cpu"), f"quantize_rows_{kinds}")
        pointers = (_address(x), *map(_address, addresses), _address(out.data), _address(out.scale))
        kernel(norm, *pointers, x.numel() // x.shape[-1], x.shape[-1], eps, torch.get_num_threads())
    return out


def finish(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``sums <- residual + act(sums · scale + bias)``, in place, and returns it.

    sums       [..., O] fp32, contiguous: integer sums times the scales of the weight      scale  [...] fp32, of x's rows
    bias       [O] fp32      residual  [..., O] fp32
    activation None | "silu" | "gelu_tanh"
    errors     as ``kernels.rms_norm``; ValueError for another activation
    """
    _check_sums("finish", sums, scale, bias, activation)
    if residual is not None:
        _check_fp32("finish", "residual", residual, sums.shape)
    if sums.numel():
        pointers = map(_address, (sums, scale, bias, residual))
        extension.load("cpu").finish_sums(
            *pointers, ACTIVATIONS[activation], scale.numel(), sums.shape[-1], torch.get_num_threads()
        )
    return sums


def finish_rows(
    sums: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    up: Tensor | None = None,
    *,
    memory: Memory | None = None,
) -> IntegerRows:
    """``act(sums · scale + bias)``, times ``up · scale`` where there is that, in 8 bits for the next product.

    up       [..., O] fp32, sums of a second product of the same x      the rest as in ``finish``
    sums is overwritten
    """
    _check_sums("finish_rows", sums, scale, bias, activation)
    if up is not None:
        _check_fp32("finish_rows", "up", up, sums.shape)
    out = _rows(memory, sums.shape, torch.uint8)
    if sums.numel():
        pointers = map(_address, (sums, scale, bias, up, out.data, out.scale))
        extension.load("cpu").quantize_sums(
            *pointers, ACTIVATIONS[activation], scale.numel(), sums.shape[-1], torch.get_num_threads()
        )
    return out


MOST_INPUTS = 2**17
"""Below it the sums of products of two bytes fit 32 bits."""


def int8_matmul(x: IntegerRows, weight: IntegerWeight) -> Tensor:
    """``sums = scale · (data - 128)·weightᵀ``, exact in 32 bits, then rounded to fp32 and once more by the scale.

    x        data [..., K] uint8, contiguous; its own scale is left to ``finish``      weight  data [O, K] int8, contiguous
    returns  [..., O] fp32
    errors   as ``kernels.rms_norm``; ValueError for K of ``MOST_INPUTS`` or more
    """
    outputs, inputs = weight.data.shape
    if not 0 < inputs < MOST_INPUTS:
        raise ValueError(
            f"int8_matmul: weight has shape [{outputs}, {inputs}]; accepted is [O, K], 0 < K < 2^17"
        )
    shape = x.data.shape[:-1]
    for name, tensor, dtype, wanted in (
        ("data", x.data, torch.uint8, (*shape, inputs)),
        ("weight", weight.data, torch.int8, weight.data.shape),
        ("scale", weight.scale, torch.float32, (outputs,)),
    ):
        check_one("int8_matmul", name, tensor, dtype, "this kernel", wanted)
        check_contiguous("int8_matmul", name, tensor)
    sums = torch.empty(*shape, outputs, dtype=torch.float32, device="cpu")
    if sums.numel():
        pointers = map(_address, (x.data, weight.data, weight.scale, sums))
        rows = sums.numel() // outputs
        extension.load("cpu").int8_matmul(*pointers, rows, inputs, outputs, torch.get_num_threads())
    return sums


def _check_sums(op: str, sums: Tensor, scale: Tensor, bias: Tensor | None, activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: unknown activation {activation!r}; accepted are None, 'silu', 'gelu_tanh'")
    if not sums.shape or not sums.shape[-1]:
        raise ValueError(f"{op}: sums has shape {list(sums.shape)}; accepted is [..., O], O at least 1")
    _check_fp32(op, "sums", sums, sums.shape)
    _check_fp32(op, "scale", scale, sums.shape[:-1])
    if bias is not None:
        _check_fp32(op, "bias", bias, sums.shape[-1:])


def _check_fp32(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    check_one(op, name, tensor, torch.float32, "this kernel", shape)
    check_contiguous(op, name, tensor)


def _rows(memory: Memory | None, shape: tuple[int, ...], dtype: torch.dtype) -> IntegerRows:
    scale = empty(memory, "scales of rows", shape[:-1], torch.float32)
    return IntegerRows(empty(memory, "rows", shape, dtype), scale)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
