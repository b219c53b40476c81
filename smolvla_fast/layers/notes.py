"""What is made once for a cache: the expert's cross KV, buffers with slots for the suffix, weights in the tier's dtype."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..engine.cuda_graphs import capture_of_user
from ..model.kv_cache import LayerKV
from .caches import anchor

Mark = tuple[Any, ...]


def mark(*tensors: Tensor) -> Mark | None:
    """Where tensors are and how often they were written; None where torch does not count (under inference_mode).

    A write through ``.data`` is not counted: whoever changes weights or a cache so between two steps makes a new cache.
    """
    if any(each.is_inference() for each in tensors):
        return None
    return tuple((id(each), each.data_ptr(), each._version) for each in tensors)


class CacheNotes:
    """Of one cache: things made of some tensors, each made anew when one of those has changed."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Mark, list[ref[Tensor]], Any]] = {}

    def get(self, name: Any, of: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` made of these tensors under this name. They are held weakly, so that an address taken again by
        another tensor is not taken for them."""
        now, found = mark(*of), self._made.get(name)
        if now is None:
            return make()
        if found is not None and found[0] == now and all(each() is not None for each in found[1]):
            return found[2]
        # What is made under inference_mode could not be written by a later step outside it.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._made[name] = now, [ref(each) for each in of], made
        return made

    @contextmanager
    def borrowed(self, name: Any, of: tuple[Tensor, ...], make: Callable[[], LayerKV]) -> Iterator[LayerKV]:
        """A buffer that ``make`` made of these tensors, until the block ends; a concurrent caller gets another."""
        free: list[LayerKV] = self.get(name, of, list)
        try:
            kv = free.pop()
        except IndexError:
            with torch.inference_mode(False), torch.no_grad():
                kv = make()
        try:
            yield kv
        finally:
            free.append(kv)

    @property
    def bytes(self) -> int:
        made = [found for _, _, found in list(self._made.values())]
        kvs = [kv for each in made for kv in (each if isinstance(each, list) else [each])]
        return sum(kv.k.nbytes + kv.v.nbytes for kv in kvs)


class Notebook:
    """The notes of every cache that is alive, and the converted weights of the one that was used last."""

    def __init__(self) -> None:
        self._notes = WeakIdKeyDictionary()
        self._weights: tuple[Any, dict[int, tuple[Mark, ref[Tensor], Any]]] = (None, {})
        self.renew_lock()

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def of(self, cache: Any) -> CacheNotes:
        with self._lock:
            return self._notes.setdefault(anchor(cache), CacheNotes())

    def converted(self, notes: CacheNotes | None, matrix: Tensor, convert: Callable[[Tensor], Any]) -> Any:
        """A matrix in the tier's dtype, kept while one cache is used."""
        with self._lock:
            if self._weights[0] is None or self._weights[0]() is not notes:
                self._weights = ref(notes), {}
            kept = self._weights[1]
        now, found = mark(matrix), kept.get(id(matrix))
        if now is not None and found is not None and found[0] == now and found[1]() is matrix:
            return found[2]
        with torch.inference_mode(False), torch.no_grad():
            made = convert(matrix)
        if made is not matrix and now is not None:
            kept[id(matrix)] = now, ref(matrix), made
        return made

    @property
    def bytes(self) -> int:
        with self._lock:
            notes, owner, kept = list(self._notes.values()), self._weights[0], list(self._weights[1].values())
        weights = sum(made.nbytes for *_, made in kept) if owner is not None and owner() is not None else 0
        return sum(each.bytes for each in notes) + weights


def notebook_of_call(own: Notebook) -> Notebook:
    """The notebook of the captured function that runs now, else one's own: what a graph reads is made inside it."""
    capture = capture_of_user()
    return own if capture is None else capture.setdefault(id(own), Notebook())
