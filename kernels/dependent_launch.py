"""Programmatic dependent launch (CUDA C++ Programming Guide): a launch begins while the one ahead of it still runs.

Its programs find their places and prefetch their weights, which no launch changes, and then wait for all that is ahead. A
launch behind a torch kernel, or ahead of one, is as ever.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch_order import may_begin_early

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before Triton 3.4
    gdc_launch_dependents = gdc_wait = None


def dependent_launch(cc: int) -> dict[str, bool]:
    """Keyword arguments of a launch that may begin while the one ahead of it still runs: from 9.0 on."""
    early = may_begin_early() and cc >= 90 and gdc_wait is not None
    return {"DEPENDENT": True, "launch_pdl": True} if early else {"DEPENDENT": False}


@triton.jit
def prefetch_weight(rows, start, stop, mine, DEPENDENT: tl.constexpr):
    """Ask L2 for columns start <= k < stop of rows of a weight. rows: pointers to k = 0, [1, BLOCK_N], none of them beyond
    the last row. mine: of the programs that share them, one asks."""
    if DEPENDENT:
        LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
        for first in range(start, tl.where(mine, stop, start), 4 * LINE):
            k = tl.minimum(first + tl.arange(0, 4) * LINE, stop - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; // $0", "=r,l", [rows + k[:, None]], tl.int32, is_pure=False, pack=1
            )


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Behind it stands all that reads what another launch has written, and all that writes."""
    if DEPENDENT:
        # The launch behind this one may begin: what it does before its own wait takes nothing from this one but idle places.
        gdc_launch_dependents()
        gdc_wait()
