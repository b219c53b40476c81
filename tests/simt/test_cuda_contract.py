"""Every op that backend ``cuda`` has a kernel for, as the engine's table has it, under the contract of all backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import every_kernel
from support.contract import OPS, check

from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.select import reference_ops, select

CPU = torch.device("cpu")
CAPABILITY = 90
"""Of the imaginary GPU: the first that has every kernel."""


def test_every_kernel_of_the_table_is_watched(emulator: Any) -> None:
    """What the table takes from its fallback is checked with that."""
    emulator.configure(compute_capability=CAPABILITY)
    assert why_not("cuda", CPU) is None
    ops = select("cuda", CPU, False)
    assert ops.fallback is not None
    own = {name for name in OPS if getattr(ops, name) is not getattr(ops.fallback, name)}
    assert own == set(every_kernel.SINGLE_OPS)


def test_fp32_queries_are_served_by_the_fallback(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no code, in fp32 and for a head size of 12, the other backend's op gets its own kind of mask."""
    from smolvla_fast.ops.cuda import masked_attention as cuda

    ops = select("cuda", CPU, False)
    launched: list[Any] = []
    kernel = cuda.masked_attention
    monkeypatch.setattr(cuda, "masked_attention", lambda *args: (launched.append(args), kernel(*args))[1])
    for dtype, size, served in ((torch.float32, 16, 0), (torch.bfloat16, 12, 0), (torch.bfloat16, 16, 1)):
        check(reference_ops(), ops, "masked_attention", dict(B=2, T=3, S=9, H=2, K=1, D=size), dtype)
        assert bool(launched) == bool(served), (dtype, size)


def test_what_the_sanitizer_watches(emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that compute-sanitizer runs on a GPU does here what it says: all kernels right, and one overrun."""
    monkeypatch.setattr(every_kernel, "SMALL_FLOPS", 1.1e5)
    emulator.configure(compute_capability=CAPABILITY, shared_bytes_per_block=232448)
    ops = select("cuda", CPU, False)
    launched: set[str] = set()
    for op in every_kernel.SINGLE_OPS:
        own = getattr(emulator, op)

        def counted(*args: Any, op: str = op, own: Any = own, **kwargs: Any) -> Any:
            launched.add(op)
            return own(*args, **kwargs)

        monkeypatch.setattr(emulator, op, counted)
    every_kernel.single_ops(ops, CPU)
    assert launched == set(every_kernel.SINGLE_OPS), "else a fallback served, and nothing was watched"
    every_kernel.normed_products(ops, CPU)
    every_kernel.whole_loop(ops, CPU)
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        every_kernel.overrun(CPU)
