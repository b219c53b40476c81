"""The calls of a chunk that have several candidates, with operands to call them again."""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..measure.rounds import synchronize
from ..ops.choice import Choice, apart
from ..ops.memory import Memory
from ..ops.next_norm import HINTS, NextNorm
from ..ops.shape_class import CLASSES, Shape
from ..ops.stream_offset import StreamOffset
from ..ops.table import Ops

KEPT, KEPT_ON_GPU = 4, 16
"""Calls of a shape class that are kept: of as many layers, so that weights come from memory as they do in a chunk. The last
cache of a GPU holds the weights of several layers."""


@dataclass
class Call:
    """Operands of one call; tensors that are no parameters are copies, taken before the call.

    hints  what the ops ahead have prepared, and what this one is to prepare: a result is right without, but a time is not
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hints: dict[str, Any] = field(default_factory=dict)

    def fresh(self) -> Call:
        """The same numbers in tensors of their own."""
        return Call(*copied((self.args, self.kwargs, self.hints), {}))

    def as_in_a_chunk(self, function: Callable[..., Any]) -> Any:
        """The call with its hints, which it may fill in: each time as they were."""
        return function(*self.args, **self.kwargs, **{name: copy(each) for name, each in self.hints.items()})


@dataclass
class Recorded:
    """One shape class of one op.

    count  of its calls in a chunk      seconds  that these took by the default
    """

    choice: Choice
    shape: Shape
    count: int = 0
    seconds: float = 0.0
    calls: list[Call] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.choice.key(self.shape)


class Recorder:
    """A table of ops that notes what it is asked.

    found  shape classes by their names in a plan, in the order in which a chunk asks for them
    """

    def __init__(self, device: torch.device) -> None:
        self.found: dict[str, Recorded] = {}
        self._device = device
        self._kept = KEPT if device.type == "cpu" else KEPT_ON_GPU

    def table(self, ops: Ops) -> Ops:
        choices = {op: getattr(ops, op) for op in CLASSES}
        noting: dict[str, Any] = {
            op: partial(self._note, each, each) for op, each in choices.items() if isinstance(each, Choice)
        }
        fused = choices["attention_residual"]
        if isinstance(fused, Choice):  # the two ops that it is without one launch are noted as well
            two = partial(apart, noting["masked_attention"], noting["linear_residual"])
            noting["attention_residual"] = partial(self._note, fused, fused.with_candidate("apart", two))
        # A loop in one launch asks for no op.
        return replace(ops, denoise_persistent=None, **noting)

    def _note(self, choice: Choice, run: Choice, *args: Any, **kwargs: Any) -> Any:
        shape = CLASSES[choice.op](*args, **kwargs)
        plain = {name: each for name, each in kwargs.items() if name not in HINTS}
        hints = {name: each for name, each in kwargs.items() if name in HINTS}
        found = self.found.setdefault(choice.key(shape), Recorded(choice, shape))
        found.count += 1
        if len(found.calls) < self._kept:
            found.calls.append(Call(args, plain, hints).fresh())
        synchronize(self._device)
        started = time.perf_counter()
        result = run(*args, **kwargs)
        synchronize(self._device)
        found.seconds += time.perf_counter() - started
        return result


def copied(value: Any, made: dict[int, Any]) -> Any:
    """The value with every tensor in it copied but parameters, and fresh memory; what was one tensor stays one."""
    if isinstance(value, nn.Parameter) or value is None:
        return value
    if isinstance(value, Memory):
        return made.setdefault(id(value), Memory())
    if isinstance(value, Tensor):
        if id(value) not in made:
            made[id(value)] = value.detach().clone()
        return made[id(value)]
    if isinstance(value, (NextNorm, StreamOffset)):
        return replace(
            value, **{each.name: copied(getattr(value, each.name), made) for each in fields(value)}
        )
    if isinstance(value, dict):
        return {name: copied(each, made) for name, each in value.items()}
    if isinstance(value, tuple):
        items = [copied(each, made) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
