"""What is made once for a cache: the expert's cross KV, and its weights in the dtype of the tier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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
        if (
            now is not None
            and found is not None
            and found[0] == now
            and all(each() is not None for each in found[1])
        ):
            return found[2]
        made = make()
        if now is not None:
            self._made[name] = now, [ref(each) for each in of], made
        return made

    @property
    def bytes(self) -> int:
        kvs = [made for _, _, made in list(self._made.values()) if isinstance(made, LayerKV)]
        return sum(each.k.nbytes + each.v.nbytes for each in kvs)


class Notebook:
    """The notes of every cache that is alive."""

    def __init__(self) -> None:
        self._notes = WeakIdKeyDictionary()
        self.renew_lock()

    def renew_lock(self) -> None:
        self._lock = threading.Lock()

    def of(self, cache: Any) -> CacheNotes:
        with self._lock:
            return self._notes.setdefault(anchor(cache), CacheNotes())

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(each.bytes for each in self._notes.values())
