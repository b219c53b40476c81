"""The CPU kernels touch no byte before or behind an operand: each lies beside a page that nobody may touch. Touching it ends
the process, so a process of its own makes the calls, and says each before it does."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support import emulated
from support.processors import at_level, why_not
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int8_attention, int8_linear, int16, quantize
from smolvla_fast.ops.cpu import kernels as cpu
from smolvla_fast.ops.cpu.image_prep import image_prep
from smolvla_fast.ops.cpu.rope import rope
from smolvla_fast.ops.reference.quantize import IntegerRows, IntegerWeight, quantize_weight

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
    pytest.mark.skipif(sys.platform == "win32", reason="it has no mprotect"),
]
VNNI = [level for level in int8_attention.LEVELS if level not in cpu.LEVELS]
HERE = extension.load("cpu").levels() if extension.available("cpu") else []
EMULATED = [
    *(level for level in cpu.LEVELS if level not in HERE and not why_not(level, emulable=True)),
    *VNNI,
]
# rows, inputs, outputs: panels and lanes, whole and not, packed weights, single ones
LINEAR = [(50, 72, 47), (55, 33, 17), (52, 33, 49), (66, 33, 47), (2, 800, 19), (9, 31, 5), (1, 1, 1)]
# batch, queries, keys, heads, heads of k and v, head's size
ATTENTION = [(1, 50, 211, 3, 1, 64), (2, 37, 41, 2, 2, 20), (1, 3, 65, 2, 1, 7), (1, 1, 1, 1, 1, 1)]
# batch, tokens, heads, head's size
ROPE = [(2, 7, 3, 46), (1, 5, 4, 64), (1, 1, 1, 2)]
# height and width of a frame, then of the result: larger, smaller, the same, single ones
IMAGES = [(13, 17, 24, 31), (37, 70, 9, 11), (5, 35, 5, 35), (1, 1, 3, 2), (1, 1, 1, 1)]


class BesideAGuard(TorchDispatchMode):
    """Every tensor made in here begins right behind a page that may not be touched, or ends right before one."""

    def __init__(self, begins: bool) -> None:
        super().__init__()
        self.begins = begins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not isinstance(made, Tensor) or any(_share_memory(made, each) for each in args):
            return made
        if "empty" in func.name() and made.is_floating_point():
            made.fill_(torch.nan)  # what is not written is not finite then
        page, size = mmap.PAGESIZE, made.nbytes
        behind = page + -(-size // page) * page
        memory = mmap.mmap(-1, behind + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + behind):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
        offset = page if self.begins else behind - size
        placed = torch.frombuffer(memory, dtype=made.dtype, count=made.numel(), offset=offset)
        return placed.view(made.shape).copy_(made)


def _share_memory(a: Tensor, b: Any) -> bool:
    return isinstance(b, Tensor) and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def calls(level: str) -> Iterator[tuple[Any, ...]]:
    """A name, a function, its operands. Some levels only products of integers have; of those emulated some have none."""
    if level not in VNNI:
        yield from of_floats(torch.float32)
        yield from of_floats(torch.bfloat16)
        yield from of_integers()
    if level not in (*HERE, *VNNI):
        return
    for rows, inputs, outputs in (*LINEAR, (513, 1500, 70)):
        at = f"{rows, inputs, outputs}"
        x = quantize.quantize_rows(torch.randn(rows, inputs), torch.int16)
        gate, up = (int16.pack(torch.randn(outputs, inputs)) for _ in range(2))
        bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
        yield f"int16 linear {at}", int16.linear, x, gate, bias, "gelu_tanh", residual
        yield f"int16 swiglu {at}", gate.swiglu, x, up
        if level == "amx":
            yield from of_tiles(rows, inputs, outputs)
    attention = partial(int8_attention.attention, most_error=float("inf"))
    for sizes in ATTENTION:
        q, k, v, mask = attention_operands(sizes, torch.float32)
        yield f"int8 attention {sizes}", attention, q, k, v
        yield f"int8 attention {sizes}, masked", attention, q, k, v, mask


def of_floats(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    normal = partial(torch.randn, dtype=dtype)
    for rows, inputs, outputs in LINEAR:
        at = f"{dtype} {rows, inputs, outputs}"
        x, w, up = normal(rows, inputs), normal(outputs, inputs), normal(outputs, inputs)
        bias, residual, gain = normal(outputs), normal(rows, outputs), torch.randn(inputs)
        yield f"linear {at}", cpu.linear, x, w, bias, "silu", residual
        yield f"swiglu {at}", partial(cpu.swiglu, norm=(gain, 1e-5)), x, w, up
        yield f"rms_norm {at}", cpu.rms_norm, x, gain.to(dtype), 1e-5
        yield f"layer_norm {at}", cpu.layer_norm, residual, bias, bias, 1e-5
        yield f"quantize_rows {at}", quantize.quantize_rows, x
        yield f"quantize_rows {at} in 16 bits", quantize.quantize_rows, x, torch.int16
        yield f"rms_norm_rows {at}", quantize.rms_norm_rows, x, gain, 1e-5
        yield f"layer_norm_rows {at}", quantize.layer_norm_rows, x, gain, gain, 1e-5
    for sizes in ATTENTION:
        q, k, v, mask = attention_operands(sizes, dtype)
        yield f"attention {dtype} {sizes}", cpu.attention, q, k, v
        yield f"attention {dtype} {sizes}, masked", cpu.attention, q, k, v, mask
    for batch, tokens, heads, size in ROPE:
        tables = torch.randn(batch, tokens, 1, size // 2), torch.randn(batch, tokens, 1, size // 2)
        yield f"rope {dtype} {batch, tokens, heads, size}", rope, normal(batch, tokens, heads, size), *tables
    for sizes in IMAGES:
        height, width, *to = sizes
        yield f"image_prep {dtype} {sizes}", image_prep, torch.rand(2, 3, height, width), *to, dtype
        for shape in ((2, 3, height, width), (2, height, width, 3)):
            frames = torch.randint(0, 256, shape, dtype=torch.uint8)
            yield f"image_prep {dtype} {sizes} of bytes {shape}", image_prep, frames, *to, dtype


def of_integers() -> Iterator[tuple[Any, ...]]:
    for rows, inputs, outputs in LINEAR:
        at = f"{rows, inputs, outputs}"
        x = IntegerRows(torch.randint(0, 256, (rows, inputs), dtype=torch.uint8), torch.rand(rows))
        w = IntegerWeight(torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs))
        sums, up, bias = torch.randn(rows, outputs), torch.randn(rows, outputs), torch.randn(outputs)
        yield f"int8_matmul {at}", quantize.int8_matmul, x, w
        for act in cpu.ACTIVATIONS:
            yield f"finish {at} {act}", quantize.finish, sums, x.scale, bias, act, up
            yield f"finish_rows {at} {act}", quantize.finish_rows, sums, x.scale, bias, act, up


def of_tiles(rows: int, inputs: int, outputs: int) -> Iterator[tuple[Any, ...]]:
    at = f"{rows, inputs, outputs}"
    x = quantize.quantize_rows(torch.randn(rows, inputs))
    gate, up = (int8_linear.pack(quantize_weight(torch.randn(outputs, inputs))) for _ in range(2))
    bias, residual = torch.randn(outputs), torch.randn(rows, outputs)
    yield f"int8 linear {at}", int8_linear.linear, x, gate, bias, "gelu_tanh", residual
    yield f"int8 linear {at} to rows", partial(int8_linear.linear, to_rows=True), x, gate, bias, "silu"
    yield f"int8 swiglu {at}", partial(int8_linear.linear, up_weight=up), x, gate, None, "silu"
    yield f"int8 sums {at}", int8_linear.matmul, x, gate


def attention_operands(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch, queries, keys, heads, kv_heads, size = sizes
    q = torch.randn(batch, queries, heads, size, dtype=dtype)
    k, v = (torch.randn(batch, keys, kv_heads, size, dtype=dtype) for _ in range(2))
    return q, k, v, torch.randn(batch, queries, keys) > 0


def main(levels: list[str]) -> None:
    torch.manual_seed(0)
    for level in levels:
        with emulated.integers_at(level) if level in VNNI else at_level(level):
            for begins in (False, True):
                with BesideAGuard(begins):
                    for name, call, *operands in calls(level):
                        print(level, "begins" if begins else "ends", "beside the guard:", name, flush=True)
                        found = call(*operands)
                        for each in (found,) if isinstance(found, Tensor) else found:
                            assert each.isfinite().all()


def test_nothing_beside_an_operand_is_touched(capfd: pytest.CaptureFixture[str]) -> None:
    """At the levels that this processor has, and where functions for its instructions can be compiled, at all others."""
    try:
        emulated.library()
        levels = HERE + EMULATED
    except pytest.skip.Exception:
        levels = HERE
    process = multiprocessing.get_context("spawn").Process(target=main, args=(levels,))
    process.start()
    process.join()
    said = capfd.readouterr()
    assert process.exitcode == 0, (process.exitcode, said.out.splitlines()[-1:], said.err[-2000:])
