"""Attention in 8-bit integers on CPU tensors, checked here as in ``kernels.py``, and where it is taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..memory import Memory
from ..memory import empty as _empty
from . import kernels
from . import ops as cpu
from .kernels import attention_operands
from .operands import check_one

LEVELS = ("baseline", "avx2", "avx2_vnni", "avx512_vnni")
"""What multiplies 8-bit integers, slowest first; which one, follows from the level of ``kernels.py``."""

MOST_ERROR = 0.0075
"""What rounding the scores of a head to 8 bits may move its outputs by, as a share of the values."""


class Attended(NamedTuple):
    """out  [B, T, H, D] fp32      error, spread  [B, K] fp32: of each KV head with its queries, see ``attention``"""

    out: Tensor
    error: Tensor
    spread: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    most_error: float = MOST_ERROR,
    out: Tensor | None = None,
) -> Attended:
    """``softmax(q·kᵀ / sqrt(D), where mask) · v`` as SageAttention has it (arXiv 2410.02367), with finer probabilities.

    q, k, v     as ``kernels.attention``, fp32; masked keys must be finite or their head is computed in fp32
    mask, out   as ``kernels.attention``
    most_error  heads with a larger ``error`` are computed in fp32, whatever it is where an operand is not finite
    returns     out; spread: the standard deviation of a row's scores; error: that of what rounding does to a score, times
                the root of the sum of squared weights, which normal scores have: what it does to an output, as a share of
                the values. Both take queries and keys for independent, and are NaN or infinite where an operand is
    numerics    q by row, k by row without the mean of all keys, v by channel and 64 keys: round(x · 127 / largest).
                Probabilities by row and 64 keys: round(255 · p / largest). Integer sums are exact, the rest is fp32;
                equal bits at every instruction level and for any number of threads
    errors      as ``kernels.attention``
    replaces    as ``kernels.attention``
    """
    check_one("int8 attention", "q", q, torch.float32, "this kernel", q.shape)
    out, operands = attention_operands("int8 attention", q, k, v, mask, out)
    heads = (k.shape[0], k.shape[2])
    error, spread = torch.zeros(heads), torch.zeros(heads)
    if q.numel():
        kernel = extension.load("cpu").int8_attention
        kernel(*operands, torch.get_num_threads(), most_error, error.data_ptr(), spread.data_ptr())
    return Attended(out, error, spread)


def level() -> str:
    """Of ``LEVELS``, what runs at the level in use."""
    return extension.load("cpu").int8_level()


# Where it is taken ----------------------------------------------------------------------------------------------------

MOST_SPREAD = 8.0
"""Root mean square, over the heads of a layer, of the spread of their scores, up to which 8-bit products serve: what these
lose of q and k, about a hundredth, is multiplied by the size of the scores. Policies of random weights have 1 to 5."""
MARGIN, ROUNDS = 0.95, 5
"""Share of fp32's time from which on integers are taken; alternating rounds of both."""


@dataclass
class Heads:
    """Attention of one table of tier ``int8``, and what became of its heads; a head is a KV head with its queries.

    all, wide  how many were asked for, and how many of these were computed in fp32 for their error
    slower     why no head of some shape was computed in integers
    spread     the largest of any layer so far, see ``MOST_SPREAD``
    """

    all: int = 0
    wide: int = 0
    slower: str = ""
    spread: float = 0.0

    def attention(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        """See ``reference.attention``."""
        if q.dtype is not torch.float32:
            return cpu.attention(q, k, v, heads)
        q, k, v = (cpu._heads(x).view(*x.shape[:2], heads, -1) for x in (q, k, v))
        return self._attend(q, k, v, None, None)

    def masked_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
    ) -> Tensor:
        """See ``reference.masked_attention``."""
        if q.dtype is not torch.float32 or k.dtype is not torch.float32:
            return cpu.masked_attention(q, k, v, mask, memory=memory)
        out = _empty(memory, "attention", q.shape, k.dtype)
        return self._attend(cpu._heads(q), cpu._heads(k), cpu._heads(v), mask, out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor | None) -> Tensor:
        slower = why_slower(q, k)
        # Heads are measured either way: products of sharp attention have to be found out.
        found = attention(q, k, v, mask, most_error=-1.0 if slower else MOST_ERROR, out=out)
        self.all += found.error.numel()
        if slower:
            self.slower = slower
        else:
            self.wide += int((~(found.error <= MOST_ERROR)).sum())
        self.spread = max(self.spread, float(found.spread.square().mean().sqrt()))  # NaN leaves it
        return found.out.flatten(2)

    def why_too_sharp(self) -> str | None:
        """Why products are to be in fp32 with these weights, or None."""
        if self.spread <= MOST_SPREAD:
            return None
        return (
            f"scores of attention spread by {self.spread:.3g}, 8-bit products serve up to {MOST_SPREAD:g}; "
            "chunks are computed in fp32"
        )

    @property
    def fallback_reasons(self) -> dict[str, str]:
        """What was not computed in 8 bits."""
        why = []
        if self.slower:
            why.append(self.slower)
        if self.wide:
            cause = f"8-bit scores would move outputs by more than {MOST_ERROR:g} of the values"
            why.append(f"{self.wide} of {self.all} heads so far were computed in fp32: {cause}")
        return {"int8 attention": "; ".join(why)} if why else {}


def why_slower(q: Tensor, k: Tensor) -> str | None:
    """Why attention of this shape is left in fp32 here, or None where integers measured ahead of it."""
    here = level()
    if not here.endswith("vnni"):
        return f"attention in 8 bits is no faster than in fp32 at level {here}, which has no VNNI"
    # Counts that change with the prompt are rounded up, so that few are ever timed.
    queries, keys = (1 << max(x.shape[1] - 1, 0).bit_length() for x in (q, k))
    sizes = (queries, keys, q.shape[2] // k.shape[2], q.shape[3])
    if _share_of_time(here, torch.get_num_threads(), *sizes) <= MARGIN:
        return None
    return "attention in 8 bits measured no faster than in fp32 on this machine"


@cache
def _share_of_time(level: str, threads: int, queries: int, keys: int, group: int, head_dim: int) -> float:
    """The time of integers over that of fp32, for one KV head; the least of several rounds of each."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, group, head_dim, generator=generator)
    k, v = (torch.randn(1, keys, 1, head_dim, generator=generator) for _ in range(2))
    in_integers: Callable[..., Any] = partial(attention, most_error=float("inf"))
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS + 1):  # the first of each warms up
        for i, call in enumerate((in_integers, kernels.attention)):
            start = time.perf_counter()
            call(q, k, v)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
