"""What the engine relies on in a live model, noted once, so that asking whether all of it still holds is cheap.

``Eligibility`` reads a whole model and takes milliseconds, a chunk on a GPU not many more. So it is asked once, and then
only when something here has moved: an attribute of any module, a submodule, a parameter, a hook, a class's ``forward``.
Values inside a parameter are not looked at, for the engine reads them live.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import is_
from typing import Any

from torch.nn.modules import module as torch_module

_CHILDREN = ("_modules", "_parameters", "_buffers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_READ = ("weight", "bias")
"""What the engine reads of a module; a class that has a property of that name computes it."""


def _code(cls: Any) -> tuple[Any, ...]:
    return (cls.forward, *(getattr(cls, name, None) for name in _READ))


def _settings(model: Any) -> dict[str, Any]:
    """The root's own attributes, but for the RTC processor, which is read and checked at every call."""
    return {name: value for name, value in list(vars(model).items()) if name != "rtc_processor"}


def _held(values: Iterable[Any]) -> tuple[list[Any], list[weakref.ref[Any]]]:
    """Those that can only be held strongly, and weak references to the others."""
    strong, weak = [], []
    for value in values:
        try:
            weak.append(weakref.ref(value))
        except TypeError:
            strong.append(value)
    return strong, weak


class ChangeDetector:
    """Compares by identity and holds a reference to all it compares, so that no address can be taken twice.

    The root, and what hangs on it, is held weakly where Python can: whoever keeps this keeps it by model and must not keep
    the model alive, and an attribute of the root may be one of its own methods.
    """

    def __init__(self, model: Any) -> None:
        modules = list(model.modules())
        self._below = modules[1:]
        self._below_classes = [type(each) for each in self._below]
        self._tables = [vars(each) for each in self._below]
        self._tables += [vars(each)[name] for each in modules for name in _CHILDREN]
        self._lengths, self._values = self._read_tables()
        self._hooks = [vars(each)[name] for each in modules for name in _HOOKS]
        self._codes = [(cls, _code(cls)) for cls in {type(each) for each in modules}]
        settings = _settings(model)
        self._top = {name: id(value) for name, value in settings.items()}
        self._kept, self._lent = _held(settings.values())
        self._root = weakref.ref(modules[0])
        self._parameters = list(model.parameters())
        self._types = [type(each) for each in self._parameters]
        self._pointers = [each.data_ptr() for each in self._parameters]
        self._layouts = self._read_layouts()
        self._use_cache = getattr(model.config, "use_cache", None)

    def same_memory(self) -> bool:
        """Whether every parameter lies where it lay: a captured graph may then be replayed."""
        # The classes first: ``swap_tensors`` makes of a tensor one that may have no address to ask for.
        return [type(each) for each in self._parameters] == self._types and (
            [each.data_ptr() for each in self._parameters] == self._pointers
        )

    def _read_tables(self) -> tuple[list[int], list[Any]]:
        """One list of all values: four times as quick to compare as a list a table."""
        # As lists at once: another thread may add to a table meanwhile.
        values = [list(table.values()) for table in self._tables]
        return [len(each) for each in values], [value for each in values for value in each]

    def _read_layouts(self) -> tuple[list[Any], ...]:
        """What ``parameter.data = parameter.data.T`` changes, or ``[:n]``, where it leaves the pointer as it was."""
        parameters = self._parameters  # one list a question: three times as quick as a tuple a parameter
        return (
            [each.dtype for each in parameters],
            [each.shape for each in parameters],
            [each.is_contiguous() for each in parameters],
            [each.is_neg() for each in parameters],
        )

    def same(self, model: Any) -> bool:
        """Whether modules, parameters, their memory, settings, classes and hooks are those noted, and none is hooked."""
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return False
        root = self._root()
        if (
            root is None
            or root is not model
            or getattr(model.config, "use_cache", None) is not self._use_cache
        ):
            return False
        if any(each() is None for each in self._lent):
            return False
        if {name: id(value) for name, value in _settings(model).items()} != self._top or any(self._hooks):
            return False
        lengths, values = self._read_tables()
        return (
            lengths == self._lengths
            and all(map(is_, values, self._values))
            and [each.__class__ for each in self._below] == self._below_classes
            and self.same_memory()
            and self._read_layouts() == self._layouts
            and all(all(map(is_, _code(cls), code)) for cls, code in self._codes)
        )


def detector_of(model: Any) -> ChangeDetector | None:
    """None of a foreign structure that cannot be noted: it is looked at every time, and the look says what it is."""
    try:
        return ChangeDetector(model)
    except Exception:
        return None
