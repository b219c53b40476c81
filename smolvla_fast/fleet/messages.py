"""What LeRobot's clients pickle, read without running anything that a message names.

LeRobot's policy server hands these bytes to ``pickle.loads``, which imports and calls whatever they say. Here every name in
a message stands for a plain record of this file or is refused, so reading calls nothing else. Arrays are made after their
element type and the number of their bytes were checked.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, get_origin, get_type_hints

import numpy as np
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation

MAX_INSTRUCTIONS = 2**20
MAX_OBSERVATION = 32 * 2**20
"""Bytes: four cameras of 1920 x 1080 are 25 MB."""
MAX_OPCODES = 20_000
"""Of one message; one of LeRobot's has a few hundred. Bounds how deep a message nests."""

# What pickle writes in protocols 4 and 5 for numbers, texts, bytes, lists, tuples, dicts and objects. No opcode that names
# a place in the memo by itself: a large one makes the reader allocate gigabytes.
_WRITTEN = """
    PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
OPCODES = frozenset(_WRITTEN.split())


class Refused(ValueError):
    """A message or call that is not served. Its text follows the call's name; ``code`` is gRPC's."""

    def __init__(self, reason: str, code: str = "INVALID_ARGUMENT") -> None:
        super().__init__(reason)
        self.code = code


# Stand-ins are classes with a __setstate__, all of them: a BUILD on the class itself then calls it without an instance and
# fails, where a function or a class of another kind would take attributes from the message.
class Record:
    """An object of a class that a message names: its fields, and nothing else of the class."""

    fields: Any = None

    def __setstate__(self, state: Any) -> None:
        self.fields = state


class Observation(Record):
    of = TimedObservation


class Instructions(Record):
    of = RemotePolicyConfig


class ElementType(Record):
    """For ``numpy.dtype``: booleans, integers and floats."""

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8"):
            raise Refused(f"holds an array of {code!r}; accepted are booleans, integers and floats")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(Record):
    """For ``numpy.ndarray`` and what rebuilds one: empty, then filled by its state."""

    value: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


class FilledArray(Array):
    """For numpy's ``_frombuffer``, of pickles in protocol 5."""

    def __init__(self, raw: Any, kind: Any, shape: Any, order: Any) -> None:
        self.value = np.frombuffer(raw, kind.dtype).reshape(shape, order=order)


class Scalar(Array):
    def __init__(self, kind: Any, raw: Any) -> None:
        (self.value,) = np.frombuffer(raw, kind.dtype)


NAMES: dict[tuple[str, str], type[Record]] = {
    (TimedObservation.__module__, TimedObservation.__qualname__): Observation,
    (RemotePolicyConfig.__module__, RemotePolicyConfig.__qualname__): Instructions,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): ElementType,
}
for core in ("numpy._core", "numpy.core"):  # of numpy 2 and 1
    NAMES[f"{core}.multiarray", "_reconstruct"] = Array
    NAMES[f"{core}.multiarray", "scalar"] = Scalar
    NAMES[f"{core}.numeric", "_frombuffer"] = FilledArray


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[Record]:
        if (module, name) not in NAMES:
            raise Refused(f"names {module}.{name}; accepted are LeRobot's messages and numpy arrays in them")
        return NAMES[module, name]


def read_instructions(data: bytes) -> RemotePolicyConfig:
    """What ``RobotClient.start`` sends. Raises ``Refused``."""
    return _read(data, Instructions, MAX_INSTRUCTIONS)


def read_observation(data: bytes) -> TimedObservation:
    """What ``RobotClient.send_observation`` sends: numbers, texts and read-only arrays by name. Raises ``Refused``."""
    read = _read(data, Observation, MAX_OBSERVATION)
    seen = read.observation
    for name, value in seen.items():
        seen[name] = value = value.value if isinstance(value, Array) else value
        if not (isinstance(name, str) and isinstance(value, str | int | float | np.generic | np.ndarray)):
            raise Refused(f"has {name!r:.80} of {type(value).__name__}; accepted are numbers, texts, arrays")
    return read


def _read(data: bytes, wanted: type[Observation | Instructions], most: int) -> Any:
    """The message of LeRobot's class ``wanted.of``, with the fields that the class declares and of their types."""
    if len(data) > most:
        raise Refused(f"has {len(data)} bytes; accepted are {most}", "RESOURCE_EXHAUSTED")
    try:
        for count, (opcode, _, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in OPCODES or count >= MAX_OPCODES:
                raise Refused(f"is a pickle of another kind: {opcode.name} as its opcode {count + 1}")
        found = _Reader(io.BytesIO(data)).load()
        repr(getattr(found, "fields", None))  # fails here where it nests too deeply to be spoken of
    except Refused:
        raise
    except Exception as error:  # each opcode raises its own, for what it found
        raise Refused(f"cannot be read: {type(error).__name__}: {error}") from error
    kinds = {name: get_origin(kind) or kind for name, kind in get_type_hints(wanted.of).items()}
    fields = found.fields if type(found) is wanted and isinstance(found.fields, dict) else {}
    if fields.keys() != kinds.keys():
        has = f"is a {type(found).__name__} of {[*fields]!s:.200}"
        raise Refused(f"{has}; accepted is LeRobot's {wanted.__name__} of {[*kinds]}")
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind):
            raise Refused(f"has {name}={fields[name]!r:.80}; accepted is {kind.__name__}")
    return wanted.of(**fields)
