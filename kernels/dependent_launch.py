"""Programmatic dependent launch (CUDA C++ Programming Guide): a launch begins while the one ahead of it still runs.

Its programs compute addresses and prefetch their weights, which no launch writes, wait for every earlier launch, and only
then let the next one begin: one launch waits behind a running one, and all ahead of that one have ended. Beside a torch
kernel nothing overlaps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch_order import take_may_begin_early

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # before Triton 3.4
    gdc_launch_dependents = gdc_wait = None


def dependent_launch(cc: int) -> dict[str, bool]:
    """Keyword arguments of a launch that may begin while the one ahead still runs: from 9.0 on. Called once a launch."""
    early = take_may_begin_early() and cc >= 90 and gdc_wait is not None
    return {"DEPENDENT": True, "launch_pdl": True} if early else {"DEPENDENT": False}


@triton.jit
def prefetch_weight(rows, start, stop, mine, DEPENDENT: tl.constexpr):
    """Ask L2 for columns start <= k < stop of rows of a weight. rows: pointers to k = 0, [1, BLOCK_N], none of them beyond
    the last row. mine: false in programs that share the rows with another, which prefetches them."""
    if DEPENDENT:
        LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
        for first in range(start, tl.where(mine, stop, start), 4 * LINE):
            k = tl.minimum(first + tl.arange(0, 4) * LINE, stop - 1)
            # Inline assembly has an output; nothing reads it.
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; // $0", "=r,l", [rows + k[:, None]], tl.int32, is_pure=False, pack=1
            )


@triton.jit
def load_weight(pointers, mask):
    """Load what no kernel of ours writes, before ``await_inputs``: a torch kernel that wrote it has ended, as ours alone let
    the next launch begin, and they have waited. These loads alone name their cache operator, the default: tests know it."""
    return tl.load(pointers, mask=mask, other=0.0, cache_modifier=".ca")


@triton.jit
def await_inputs(DEPENDENT: tl.constexpr):
    """Called before any read of another launch's output, and before any write."""
    if DEPENDENT:
        gdc_wait()
        # The launch behind this one may begin, and prefetch, in places that this one leaves idle. Not before the wait: every
        # launch let in would let the next one in, and those that wait would take the places of those that run.
        gdc_launch_dependents()
