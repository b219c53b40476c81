"""Tensors inside named tuples, tuples and lists, taken out into a flat list and put back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from torch import Tensor


class Rebuild:
    """rebuild(tensors) -> the structure with these tensors in it.

    key   what of the structure is not a tensor: its shape and its plain values; two structures with equal keys differ in
          tensors alone
    """

    def __init__(self, template: Any, key: Hashable) -> None:
        self._template, self.key = template, key

    def __call__(self, tensors: list[Tensor]) -> Any:
        return _fill(self._template, iter(tensors))


def flatten(structure: Any) -> tuple[list[Tensor], Rebuild]:
    """The tensors of a structure in order, and the way back."""
    tensors: list[Tensor] = []
    key = _walk(structure, tensors.append)
    return tensors, Rebuild(structure, key)


def _walk(value: Any, found: Callable[[Tensor], None]) -> Hashable:
    if isinstance(value, Tensor):
        found(value)
        return Tensor
    if isinstance(value, list | tuple):
        return (type(value), *(_walk(item, found) for item in value))
    return value


def _fill(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, list | tuple):
        items = [_fill(item, tensors) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
