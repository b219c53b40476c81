"""The CPU kernels touch no byte before or behind an operand: each lies at an end of its memory, beside a page that nobody
may touch. Touching it ends the process, so all this happens in one of its own, which says what it does next."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu") or "built"),
    pytest.mark.skipif(sys.platform == "win32", reason="it has no mprotect"),
]
# rows, inputs, outputs: panels and lanes, whole and not, packed weights, single ones
LINEAR = [(50, 72, 47), (55, 33, 17), (52, 33, 49), (66, 33, 47), (2, 800, 19), (9, 31, 5), (1, 1, 1)]
# batch, queries, keys, heads, heads of k and v, head's size
ATTENTION = [(1, 50, 211, 3, 1, 64), (2, 37, 41, 2, 2, 20), (1, 1, 1, 1, 1, 4)]


def beside_a_guard(tensor: Tensor, before: bool) -> Tensor:
    """A copy that begins right behind a page that may not be touched, or ends right before one."""
    page = mmap.PAGESIZE
    pages = -(-tensor.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    offset = page if before else (pages + 1) * page - tensor.nbytes
    placed = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return placed.view(tensor.shape).copy_(tensor)


def calls(dtype: torch.dtype, before: bool) -> Iterator[tuple[str, tuple[int, ...], Callable[..., Tensor]]]:
    """Name, the result's shape, a call that takes ``out``."""

    def place(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return beside_a_guard(torch.randn(shape).to(dtype), before)

    for rows, inputs, outputs in LINEAR:
        x, w, up, bias, residual = (
            place(*shape) for shape in ((rows, inputs), *2 * [(outputs, inputs)], (outputs,), (rows, outputs))
        )
        norm = place(inputs, dtype=torch.float32), 1e-5
        yield "linear", (rows, outputs), lambda out: cpu.linear(x, w, bias, "silu", residual, out=out)  # noqa: B023
        yield "swiglu", (rows, outputs), lambda out: cpu.swiglu(x, w, up, norm=norm, out=out)  # noqa: B023
        yield "rms_norm", (rows, inputs), lambda out: cpu.rms_norm(x, place(inputs), 1e-5, out=out)  # noqa: B023
        yield "layer_norm", (rows, outputs), lambda out: cpu.layer_norm(residual, bias, bias, 1e-5, out=out)  # noqa: B023
    for batch, queries, keys, heads, kv_heads, size in ATTENTION:
        q, k, v = (place(batch, n, h, size) for n, h in ((queries, heads), *2 * [(keys, kv_heads)]))
        mask = place(batch, queries, keys) > 0
        for each in (None, beside_a_guard(mask, before)):
            yield "attention", tuple(q.shape), lambda out: cpu.attention(q, k, v, each, out=out)  # noqa: B023


def main() -> None:
    torch.manual_seed(0)
    for level in cpu.instruction_levels():
        for dtype in (torch.float32, torch.bfloat16):
            for before in (False, True):
                for name, shape, call in calls(dtype, before):
                    print(
                        level,
                        dtype,
                        "begins" if before else "ends",
                        "beside the guard:",
                        name,
                        shape,
                        flush=True,
                    )
                    out = beside_a_guard(torch.full(shape, float("nan"), dtype=dtype), before)
                    with cpu.instruction_level(level):
                        assert call(out=out).isfinite().all()
    print("done", flush=True)


def test_nothing_beside_an_operand_is_touched() -> None:
    done = subprocess.run([sys.executable, __file__], text=True, capture_output=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), (
        done.returncode,
        done.stdout.splitlines()[-1:],
        done.stderr[-2000:],
    )


if __name__ == "__main__":
    main()
