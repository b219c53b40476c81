"""Attention in 8-bit integers on CPU tensors, checked here as in ``kernels.py``, and where it is taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import extension
from ..memory import Memory
from ..memory import empty as _empty
from . import ops as cpu
from .kernels import attention_operands
from .operands import check_one

LEVELS = ("baseline", "avx2", "avx2_vnni", "avx512_vnni", "amx")
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
    most_error  heads with a larger ``error`` are computed in fp32, whatever it is where an operand is not finite or D is
                above ``MOST_DIM``
    returns     out; of the scores of about 16 evenly spaced queries with the keys that they see, spread: the standard
                deviation in a row; error: that of what rounding does to an output, as a share of the values, were these
                independent. Root mean square over the rows, the largest of the query heads; NaN where an operand is not
                finite
    numerics    q by row, k by row without the mean of all keys, v by channel and 64 keys: round(x · 127 / largest).
                Probabilities by row and 64 keys: round(255 · p / largest). Integer sums are exact, the rest is fp32;
                equal bits at every instruction level and for any number of threads
    errors      as ``kernels.attention``
    replaces    as ``kernels.attention``
    """
    check_one("int8 attention", "q", q, torch.float32, "this kernel", q.shape)
    out, operands = attention_operands("int8 attention", q, k, v, mask, out)
    heads = (k.shape[0], k.shape[2])
    error, spread = torch.zeros(2, *heads, dtype=torch.float32, device="cpu")
    if q.numel():
        kernel = extension.load("cpu").int8_attention
        kernel(*operands, torch.get_num_threads(), most_error, error.data_ptr(), spread.data_ptr())
    return Attended(out, error, spread)


def level() -> str:
    """Of ``LEVELS``, what runs at the level in use."""
    return extension.load("cpu").integer_level()


def spread(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, K] fp32: what ``attention`` says of these operands, for any D; attention itself is not computed."""
    _, operands = attention_operands("int8 attention", q, k, v, mask, None, writes=False)
    error, found = torch.zeros(2, k.shape[0], k.shape[2], dtype=torch.float32, device="cpu")
    if q.numel():
        kernel = extension.load("cpu").int8_attention
        kernel(*operands, torch.get_num_threads(), 0.0, error.data_ptr(), found.data_ptr())
    return found


# Where it is taken ----------------------------------------------------------------------------------------------------

MOST_SPREAD = 8.0
"""Spread of the scores of any head up to which integer products serve: what these lose of q and k is multiplied by the size
of the scores. Not far beyond, those of 16 bits break what their tier promises (``tests/acceptance/test_outliers.py``)."""
NEAR = {8: 0.5, 16: 0.9}
"""Share of it from which scores are measured in every chunk, by bits: at the limit 16 bits lose a tenth of what they may."""
MOST_DIM = 256
"""Width of a head that the kernel has room for."""
MARGIN, ROUNDS = 0.95, 3
"""Share of fp32's time from which on integers are taken; alternating rounds of both."""
FIRST, EVERY = 8, 64
"""Where attention is in fp32, scores are measured in so many chunks with the same weights, then in one of so many, unless a
spread was ``NEAR`` the limit."""


def why_slower(integers: Callable[[], Any], in_fp32: Callable[[], Any]) -> str | None:
    """Why attention is left in fp32 here, or None where integers measured ahead: by the least of several rounds of each."""
    best = [float("inf"), float("inf")]
    for _ in range(ROUNDS + 1):  # the first of each warms up
        for i, call in enumerate((integers, in_fp32)):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    if best[0] <= MARGIN * best[1]:
        return None
    return "attention in 8 bits measured no faster than in fp32 on this machine"


@dataclass(frozen=True)
class Seen:
    """What became of heads with one generation of the quantized weights; a head is a KV head with its queries.

    chunks     how many were computed in 8 bits
    all, wide  heads that integers were asked for, and how many of these were computed in fp32 for their error
    spread     the largest of any head that is finite
    others     why integers were not asked for some
    """

    generation: int
    chunks: int = 0
    all: int = 0
    wide: int = 0
    spread: float = 0.0
    others: frozenset[str] = frozenset()

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.generation,
            self.chunks + other.chunks,
            self.all + other.all,
            self.wide + other.wide,
            max(self.spread, other.spread),
            self.others | other.others,
        )


class Heads:
    """Attention of the chunks of one table of tier ``int8``, in integers where that is ahead, or of ``int16``, in fp32, and
    what became of its heads.

    bits                         of the tier's products
    attention, masked_attention  the table's own, where integers do not serve; single layers ask nobody else
    """

    def __init__(
        self, bits: int, attention: Callable[..., Tensor], masked_attention: Callable[..., Tensor]
    ) -> None:
        self.bits, self.attention, self.masked_attention = bits, attention, masked_attention
        self.seen = Seen(0)  # replaced as a whole, so that it is read without the lock
        self._slower: dict[tuple[Any, ...], str | None] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a forked child: the parent's may be held by a thread that is not in the child."""
        self._lock = threading.Lock()

    def chunk(self, generation: int) -> Chunk:
        """Attention of a chunk that is about to be computed with this generation of the weights."""
        seen = self.seen if self.seen.generation == generation else Seen(generation)
        # With 16 bits attention is always in fp32: measuring is all extra.
        first = FIRST if self.bits == 8 else 1
        often = seen.chunks < first or seen.spread > NEAR[self.bits] * MOST_SPREAD
        return Chunk(self, generation, often or seen.chunks % EVERY == 0)

    def add(self, seen: Seen) -> None:
        """What a chunk has seen, at its end; of older weights nothing is kept."""
        with self._lock:
            if seen.generation == self.seen.generation:
                self.seen += seen
            elif seen.generation > self.seen.generation:
                self.seen = seen

    def why_not(
        self, key: tuple[Any, ...], integers: Callable[[], Any], in_fp32: Callable[[], Any]
    ) -> str | None:
        """``why_slower``, timed once for a key."""
        with self._lock:  # two at once would time each other
            if key not in self._slower:
                self._slower[key] = why_slower(integers, in_fp32)
            return self._slower[key]

    def why_too_sharp(self, generation: int) -> str | None:
        """Why products are to be in fp32 with this generation of the weights, or None."""
        seen = self.seen
        if seen.generation != generation or not self.is_sharp(seen):
            return None
        return (
            f"scores of attention spread by {seen.spread:.3g}, {self.bits}-bit products serve up to "
            f"{MOST_SPREAD:g}; chunks are computed in fp32 until the weights change"
        )

    def is_sharp(self, seen: Seen) -> bool:
        return seen.spread > MOST_SPREAD

    @property
    def fallback_reasons(self) -> dict[str, str]:
        """What was not computed in 8 bits with the weights of the last chunk."""
        seen = self.seen
        why = sorted(seen.others)
        if why:
            why.append(f"scores are measured in the first {FIRST} chunks, then in one of {EVERY}")
        if seen.wide:
            cause = f"8-bit scores would move outputs by more than {MOST_ERROR:g} of the values"
            why.append(f"{seen.wide} of {seen.all} heads so far were computed in fp32: {cause}")
        return {"int8 attention": "; ".join(why)} if why else {}


class Chunk:
    """Attention of one chunk, in one thread.

    seen      so far
    measures  whether scores are measured where attention is in fp32: products of sharp attention have to be found out
    """

    def __init__(self, heads: Heads, generation: int, measures: bool) -> None:
        self._heads, self._measures = heads, measures
        self.seen = Seen(generation, chunks=1)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, heads: int, *, memory: Memory | None = None
    ) -> Tensor:
        """See ``reference.attention``."""
        in_fp32 = partial(self._heads.attention, q, k, v, heads, memory=memory)
        q, k, v = (cpu._heads(x).view(*x.shape[:2], heads, -1) for x in (q, k, v))
        return self._attend(q, k, v, None, memory, in_fp32)

    def masked_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, memory: Memory | None = None
    ) -> Tensor:
        """See ``reference.masked_attention``."""
        in_fp32 = partial(self._heads.masked_attention, q, k, v, mask, memory=memory)
        return self._attend(cpu._heads(q), cpu._heads(k), cpu._heads(v), mask, memory, in_fp32)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        memory: Memory | None,
        in_fp32: Callable[[], Tensor],
    ) -> Tensor:
        if q.dtype is not torch.float32 or k.dtype is not torch.float32:
            return in_fp32()
        if self._heads.bits == 16:  # only the scores matter
            self._measure(q, k, v, mask)
            return in_fp32()
        if q.shape[3] > MOST_DIM:
            why: str | None = f"heads are {q.shape[3]} wide, attention in 8 bits has room for {MOST_DIM}"
        else:
            # Counts that change with the prompt are rounded up, so that few are ever timed.
            queries, keys = (1 << max(x.shape[1] - 1, 0).bit_length() for x in (q, k))
            sizes = (queries, keys, *q.shape[::2], *k.shape[2:], mask is None)
            integers = partial(attention, q, k, v, mask, most_error=float("inf"))
            why = self._heads.why_not((level(), torch.get_num_threads(), *sizes), integers, in_fp32)
        if why is None:
            out = _empty(memory, "attention", q.shape, k.dtype)
            found = attention(q, k, v, mask, most_error=MOST_ERROR, out=out)
            wide = int((~(found.error <= MOST_ERROR)).sum())
            self.seen += Seen(self.seen.generation, 0, found.error.numel(), wide, _largest(found.spread))
            return found.out.flatten(2)
        self._measure(q, k, v, mask, why)
        return in_fp32()

    def _measure(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *why: str) -> None:
        """The scores of attention in fp32, and why it is not in integers, where that is to be said."""
        largest = _largest(spread(q, k, v, mask)) if self._measures else 0.0
        self.seen += Seen(self.seen.generation, spread=largest, others=frozenset(why))


def _largest(spread: Tensor) -> float:
    """Of what is finite: an operand that is not says nothing of the weights."""
    return float(spread.nan_to_num(0.0, 0.0, 0.0).amax()) if spread.numel() else 0.0
