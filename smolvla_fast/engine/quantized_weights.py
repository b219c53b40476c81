"""Copies of weights in a form that no checkpoint has: made once, checked at every chunk, made anew where a weight changed.

Every other tier reads live weights. A quantised copy cannot, so it carries a fingerprint of what it was made from: sums
over a sixteenth of the rows, a fraction of the bytes. Loading, training, merging and averaging change every row; who edits
a few elements by hand calls ``refresh``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..ops.cpu import int8, int16
from ..ops.reference.quantize import Quantized, quantize_rows

SAMPLE_STRIDE = 16


def fingerprint(weights: list[Tensor]) -> Tensor:
    """[n] fp32: of the first sixteenth of the rows of each weight the sum of products with fixed numbers, which moves with
    sizes, signs and the order of elements, and not with the number of threads."""
    # Leading rows lie side by side, so that on a GPU a few launches serve all weights.
    samples = [weight[: max(1, len(weight) // SAMPLE_STRIDE)] for weight in weights]
    return (_one_by_one if samples[0].device.type == "cpu" else _together)(samples).nan_to_num()


def _one_by_one(samples: list[Tensor]) -> Tensor:
    """Without the memory that takes longer on a CPU than the sums."""
    rows = [each.reshape(len(each), -1) for each in samples]
    numbers = torch.arange(1, max(max(x.shape) for x in rows) + 1, dtype=torch.float32)
    wave = numbers.sin()
    return torch.stack([torch.mv(x.float(), wave[: x.shape[1]]) @ numbers[: len(x)] for x in rows])


def _together(samples: list[Tensor]) -> Tensor:
    """Of what is positive, less of what is negative, for magnitudes alone are summed in a launch for all."""
    longest, device = max(each.numel() for each in samples), samples[0].device
    wave = torch.arange(1, longest + 1, dtype=torch.float32, device=device).sin()
    waves = {dtype: wave.to(dtype) for dtype in {each.dtype for each in samples}}
    found = torch._foreach_mul(samples, [waves[x.dtype][: x.numel()].view(x.shape) for x in samples])
    both = torch.stack(list(torch._foreach_norm(found, 1, dtype=torch.float32)))
    torch._foreach_clamp_min_(found, 0.0)
    return 2 * torch.stack(list(torch._foreach_norm(found, 1, dtype=torch.float32))) - both


@dataclass(frozen=True)
class Kind:
    """How copies are made, and made anew.

    make      weight, dtype of products with the copy -> copy, with ``nbytes``
    group     norm weight, its bias or None, the weights of the products that read the norm -> ``int8.SmoothQuantGroup``;
              None where norms stay as they are
    rewrite   old copy, new copy -> what is read from now on: the old one with the new numbers where its memory has to stay
    """

    make: Callable[[Tensor, torch.dtype], Any]
    group: Callable[[Tensor, Tensor | None, list[Tensor]], int8.SmoothQuantGroup] | None
    rewrite: Callable[[Any, Any], Any]


def _in_place(old: Quantized, new: Quantized) -> Quantized:
    old.data.copy_(new.data)
    old.scale.copy_(new.scale)
    return old


FLOATS = Kind(quantize_rows, None, _in_place)
"""e4m3 for GPUs: a captured graph reads them where they lie."""


def _integers(pack: Callable[[Tensor], Any]) -> Kind:
    """For CPUs, packed in a layout that only the product knows; nothing is captured there, so memory may move."""
    return Kind(lambda weight, dtype: pack(weight), partial(int8.pack_group, pack), lambda old, new: new)


KINDS = {"e4m3": FLOATS, "int8": _integers(int8.pack), "int16": _integers(int16.pack)}


@dataclass
class _Made:
    """One copy: what it was made of, where that lay, how to make it again, and the fingerprint of then."""

    sources: list[ref[Tensor]]
    addresses: list[int]
    make: Callable[[list[Tensor]], Any]
    copy: Any
    noted: Tensor

    def live(self) -> list[Tensor] | None:
        """The sources, or None where one is gone."""
        found = [source() for source in self.sources]
        return None if any(each is None for each in found) else [each for each in found if each is not None]


class QuantizedWeights:
    """Quantised copies of one model's matrices; threads may share them.

    dtype  of products with them      kind  what is made of a matrix      generation  how often weights were seen to change
    """

    def __init__(self, dtype: torch.dtype, kind: Kind = FLOATS) -> None:
        self._dtype, self.kind = dtype, kind
        self.generation = 0
        self._made: dict[tuple[int, ...], _Made] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a forked child: the parent's may be held by a thread that is not in the child."""
        self._lock = threading.RLock()

    def of(self, weight: Tensor) -> Any:
        """The copy of this weight; of ``FLOATS`` the same memory at every call, so that a captured graph may read it."""
        return self._copy([weight], lambda sources: self.kind.make(sources[0], self._dtype))

    def group(self, weight: Tensor, bias: Tensor | None, readers: list[Tensor]) -> int8.SmoothQuantGroup:
        """The copies of what reads a norm, with the norm that they are made for."""
        smooth = self.kind.group
        assert smooth is not None, "this kind leaves norms as they are"
        first = 1 if bias is None else 2

        def make(sources: list[Tensor]) -> int8.SmoothQuantGroup:
            return smooth(sources[0], sources[1] if first == 2 else None, sources[first:])

        return self._copy([weight, *([] if bias is None else [bias]), *readers], make)

    def _copy(self, sources: list[Tensor], make: Callable[[list[Tensor]], Any]) -> Any:
        key = tuple(map(id, sources))
        with self._lock:
            found = self._made.get(key)
            addresses = [source.data_ptr() for source in sources]
            if found is None or found.live() is None or found.addresses != addresses:
                # Tensors of an inference_mode caller could not be written by a later one outside it.
                with torch.inference_mode(False), torch.no_grad():
                    detached = [source.detach() for source in sources]
                    refs = [ref(source) for source in sources]
                    noted = fingerprint(detached)  # before the copy: what is loaded meanwhile differs from it
                    found = _Made(refs, addresses, make, make(detached), noted)
                self._made[key] = found
            return found.copy

    def refreshed(self) -> bool:
        """Make copies anew if any weight has changed since they were made; whether that was so."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            live = self._live()
            if not live:
                return False
            now = fingerprint([source for sources, _ in live for source in sources])
            if torch.equal(now, torch.cat([made.noted for _, made in live])):
                return False
            self.refresh()
            return True

    def replaced(self) -> None:
        """Parameters of the model may be others now, or lie elsewhere; what is made of these is found when it is read."""
        with self._lock:
            self.generation += 1

    def checked(self) -> int:
        """The generation, after copies have been compared with their weights."""
        self.refreshed()
        return self.generation

    def refresh(self) -> None:
        """Make every copy anew."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for sources, made in self._live():
                noted = fingerprint(sources)
                made.copy = self.kind.rewrite(made.copy, made.make(sources))
                made.noted = noted
                if noted.is_cuda:  # another thread's stream may read it as soon as the lock is free
                    torch.cuda.current_stream(noted.device).synchronize()
            self.generation += 1

    def _live(self) -> list[tuple[list[Tensor], _Made]]:
        """Copies whose weights are still there, with those; the others are dropped."""
        pairs = {key: (made.live(), made) for key, made in self._made.items()}
        self._made = {key: made for key, (sources, made) in pairs.items() if sources is not None}
        return [
            ([s.detach() for s in sources], made) for sources, made in pairs.values() if sources is not None
        ]

    @property
    def bytes(self) -> int:
        return sum(made.copy.nbytes for made in list(self._made.values()))

    @property
    def fallback_reasons(self) -> dict[str, str]:
        """What the kind does without for some weights, with the reason."""
        found = [made.copy for made in list(self._made.values())]
        why = int8.why_two_terms(found) if self.kind is KINDS["int8"] else None
        return {} if why is None else {"int8 in one term": why}


class IntegerCast:
    """Reads a layer's matrices as integers, and its norms as these want them; see ``weights.Cast``.

    plain  what is done with all else: biases, convolutions, the connector
    """

    def __init__(self, copies: QuantizedWeights, plain: Callable[[Tensor], Tensor]) -> None:
        self._copies, self.plain = copies, plain

    def __call__(self, matrix: Tensor) -> Any:
        return self._copies.of(matrix) if matrix.ndim == 2 else self.plain(matrix)

    def group(self, norm: Any, readers: list[Tensor]) -> tuple[Any, list[Any]]:
        """norm, a NamedTuple with weight and maybe bias -> the same with others of these, and packed readers."""
        bias = getattr(norm, "bias", None)
        made = self._copies.group(norm.weight, bias, readers)
        norm = norm._replace(weight=made.weight)
        return (norm if bias is None else norm._replace(bias=made.bias)), list(made.packed)
