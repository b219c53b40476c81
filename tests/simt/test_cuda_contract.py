"""Every op that backend ``cuda`` has a kernel for, as the engine's table has it, under the contract of all backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import every_kernel
from support.contract import OPS, check, reference_module

from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.select import reference_ops, select

CPU = torch.device("cpu")
MORE = {
    "image_prep": [dict(B=1, h=24, w=32, height=16, width=16, channels_last=1)],
    "masked_attention": [dict(B=2, T=5, S=21, H=6, K=2, D=64), dict(B=1, T=17, S=40, H=3, K=3, D=32)],
    "euler_step": [dict(B=3, S=5, E=33, A=7)],
    "linear_residual": [dict(rows=1, inputs=8, outputs=1), dict(rows=3, inputs=520, outputs=70)],
}
CAPABILITY = 90
"""Of the imaginary GPU: the first that has every kernel."""
CASES = [
    (op, case)
    for op in MORE
    for case in [*reference_module(op).CASES, *MORE[op]]
    if reference_module(op).cost(case, 4).flops < 3e5
]


def test_every_kernel_of_the_table_is_here(emulator: Any) -> None:
    """And has small cases; what the table takes from its fallback is checked with that."""
    emulator.configure(compute_capability=CAPABILITY)
    assert why_not("cuda", CPU) is None
    ops = select("cuda", CPU, False)
    assert ops.fallback is not None
    own = {name for name in OPS if getattr(ops, name) is not getattr(ops.fallback, name)}
    assert own == set(MORE) and own <= {op for op, _ in CASES}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "case"), CASES, ids=lambda v: v if isinstance(v, str) else str(v))
def test_contract(op: str, case: dict[str, int], dtype: torch.dtype, emulator: Any) -> None:
    emulator.configure(compute_capability=CAPABILITY)
    check(reference_ops(), select("cuda", CPU, False), op, case, dtype)


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
    monkeypatch.setattr(every_kernel, "SMALL_FLOPS", 1e5)
    emulator.configure(compute_capability=CAPABILITY, shared_bytes_per_block=232448)
    ops = select("cuda", CPU, False)
    every_kernel.single_ops(ops, CPU)
    every_kernel.normed_products(ops, CPU)
    every_kernel.whole_loop(ops, CPU)
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        every_kernel.overrun(CPU)
