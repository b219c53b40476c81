"""What a tile is, its name in a file, and which one a launcher takes: the best guess, or what the caller chose.

A caller that measures asks first, ``with recording() as asked: op(...)``, and then runs the same call with each candidate,
``with using(tile): op(...)``. Both hold for the current thread (context) alone. A backward pass on a GPU runs in a thread of
autograd's: to choose for it, call its launcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

CANDIDATES = 6
"""At most so many tiles of a call are worth measuring."""
MAX_SPLIT = 16


class GemmTile(NamedTuple):
    """A program's tile of the output, its step along K, how many programs share a tile's K, and the launch."""

    rows: int
    cols: int
    depth: int
    split: int
    group: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """As keyword arguments of a kernel."""
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.cols, "BLOCK_K": self.depth}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


class AttentionTile(NamedTuple):
    rows: int
    keys: int
    num_warps: int
    num_stages: int


class ProductTile(NamedTuple):
    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


class PlainTile(NamedTuple):
    rows: int
    cols: int
    num_warps: int


Tile = GemmTile | AttentionTile | ProductTile | PlainTile
T = TypeVar("T", GemmTile, AttentionTile, ProductTile, PlainTile)
KINDS: dict[str, type[Tile]] = {
    "gemm": GemmTile,
    "attention": AttentionTile,
    "product": ProductTile,
    "plain": PlainTile,
}
NAMES = {kind: name for name, kind in KINDS.items()}
COUNTS = ("split", "group", "warps", "stages")
"""Fields that a name has by word; the others are sizes, joined by x."""


def tile_name(tile: Tile) -> str:
    """Its name in a plan: "gemm 64x128x64 split2 group8 warps4 stages3", "attention 64x64 warps4 stages2"."""
    if type(tile) not in NAMES:
        raise ValueError(f"{tile!r} is no tile; accepted are {', '.join(kind.__name__ for kind in NAMES)}")
    fields = [(name.removeprefix("num_"), value) for name, value in tile._asdict().items()]
    sizes = "x".join(str(value) for name, value in fields if name not in COUNTS)
    return " ".join([NAMES[type(tile)], sizes, *(f"{n}{value}" for n, value in fields if n in COUNTS)])


def parse_tile(text: str) -> Tile:
    """The tile of this name. Raises ValueError for any other text, or numbers that no kernel takes."""
    kind = KINDS.get(text.partition(" ")[0]) if isinstance(text, str) else None
    if kind is not None:
        numbers = [int(digits) for digits in re.findall(r"[0-9]{1,9}", text)]
        if len(numbers) == len(kind._fields):
            tile = kind(*numbers)
            if tile_name(tile) == text:
                return _checked(tile)
    examples = " or ".join(repr(tile_name(kind(*[16] * len(kind._fields)))) for kind in KINDS.values())
    raise ValueError(f"{text!r} names no tile; accepted is text like {examples}")


def _checked(tile: Tile) -> Tile:
    """The tile. Raises ValueError for numbers that no kernel takes, whatever its sizes."""
    name = tile_name(tile)
    least = 1 if isinstance(tile, PlainTile) else 16  # what a product on tensor cores needs
    for field, value in tile._asdict().items():
        field = field.removeprefix("num_")
        first, last = {
            "split": (1, MAX_SPLIT),
            "group": (1, 1024),
            "warps": (1, 16),
            "stages": (1, 8),
        }.get(field, (least, 1 << 14))
        power = field not in ("split", "group", "stages")
        if type(value) is not int or not first <= value <= last or (power and value & (value - 1)):
            accepted = f"{'powers of two' if power else 'whole numbers'} from {first} to {last}"
            raise ValueError(f"{name}: {field} is {value!r}; accepted are {accepted}")
    return tile


class Question(NamedTuple):
    """What a launcher asked for: the family, and its candidates, best first."""

    family: str
    tiles: tuple[Tile, ...]


class _Caller(NamedTuple):
    """What the caller of a launcher wants."""

    chosen: dict[type[Tile], Tile]
    asked: tuple[list[Question], ...]


_caller: ContextVar[_Caller | None] = ContextVar("caller_of_launchers", default=None)


@contextmanager
def _calling(chosen: dict[type[Tile], Tile], *asked: list[Question]) -> Iterator[None]:
    before = _caller.get() or _Caller({}, ())
    token = _caller.set(_Caller(before.chosen | chosen, before.asked + asked))
    try:
        yield
    finally:
        _caller.reset(token)


@contextmanager
def using(tile: Tile) -> Iterator[None]:
    """Inside, launchers that take tiles of this type take this one; other launchers take their own.

    Inside another ``using`` with a tile of the same type this one holds. Raises ValueError, here or in the call, where the
    tile cannot serve it.
    """
    with _calling({type(tile): _checked(tile)}):
        yield


@contextmanager
def recording() -> Iterator[list[Question]]:
    """Inside, the list gets a Question for each tile that a launcher asks for, in that order."""
    asked: list[Question] = []
    with _calling({}, asked):
        yield asked


def choice(
    family: str, kind: type[T], ranked: Callable[..., tuple[T, ...]], refusal: Callable[..., str | None]
) -> Callable[..., T]:
    """The function by which launchers ask for their tile: the first of ``ranked(*sizes)``, or what the caller chose.

    refusal(tile, *sizes)  why a chosen tile cannot serve, and what is accepted; None where it can
    """

    def tile(*sizes: int, **more: int) -> T:
        """The tile of a call. Raises ValueError where the one that the caller chose cannot serve it."""
        tiles = ranked(*sizes, **more)
        caller = _caller.get()
        if caller is None:
            return tiles[0]
        for asked in caller.asked:
            asked.append(Question(family, tiles))
        chosen = caller.chosen.get(kind)
        if not isinstance(chosen, kind):
            return tiles[0]
        if chosen not in tiles and (reason := refusal(chosen, *sizes, **more)):
            raise ValueError(f"{family}: {tile_name(chosen)} {reason}")
        return chosen

    return tile


def ranked(best: T, others: Iterable[T], refusal: Callable[[T], str | None]) -> tuple[T, ...]:
    """The best and those of the others that can serve, each once."""
    fit = [best]
    fit += [tile for tile in others if refusal(tile) is None]
    return tuple(dict.fromkeys(fit))[:CANDIDATES]
