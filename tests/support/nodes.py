"""The nodes that a captured chunk would have: launches and ATen calls of one run, each with the op that made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from smolvla_fast.ops.table import NAMES, Ops

# They launch nothing: memory of the caching allocator, and questions of dtypes.
NO_NODES = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "promote_types", "detach")


class Node(NamedTuple):
    """op    of the table, inside which it was made, or None
    name  of an ATen call, or of a kernel, which begins with an underscore"""

    op: str | None
    name: str


class Nodes(TorchDispatchMode):
    """Inside, Triton's kernels do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Node] = []
        self._op: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        made = [each.alias_info for each in func._schema.returns]
        is_view = any(each is not None and not each.is_write for each in made)
        if not is_view and name not in NO_NODES:
            self.found.append(Node(self._op, name))
        return func(*args, **(kwargs or {}))

    def named(self, ops: Ops) -> Ops:
        """The table, with the nodes of each op noted as that op's."""

        def within(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                before, self._op = self._op, op
                try:
                    return function(*args, **kwargs)
                finally:
                    self._op = before

            return call

        own = {op: getattr(ops, op) for op in NAMES}
        return replace(
            ops, **{op: within(op, function) for op, function in own.items() if function is not None}
        )

    def launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        self.found.append(Node(self._op, kernel.__name__))


@contextmanager
def nodes_of(engine: Any) -> Iterator[list[Node]]:
    """Inside, the engine's chunks note their nodes in the list, and give numbers that mean nothing."""
    nodes, ops, chunk = Nodes(), engine.ops, engine._chunk

    def noted(*args: Any, **kwargs: Any) -> Any:
        nodes.found.clear()
        with nodes, torch.no_grad():
            return chunk(*args, **kwargs)

    with (
        patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: nodes.launch(kernel)),
        patch.object(engine, "ops", nodes.named(ops)),
        patch.object(engine, "_chunk", noted),
        patch.object(engine, "graphs", None),
    ):
        yield nodes.found
