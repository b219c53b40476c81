"""Image tokens of a dataset's frames in one mapped file, a row a frame: what is known is not decoded again.

    DIR/KEY/about.json   what the tokens depend on
    DIR/KEY/tokens       rows of a checksum (0: not known) and the tokens of all cameras

A checksum is written after its tokens. So a process killed at any point leaves rows that are not known, never wrong ones;
several processes may write at once, for a row has the same bytes whoever makes it; each reserves room by itself.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ABOUT, ROWS = "about.json", "tokens"
LEFT = 2**30
"""Bytes of a disk that are left for checkpoints and logs."""
RESULT = "preparation of frames or arithmetic"
"""Of ``about``: a digest of the tokens of a fixed noise frame, which resizing, scaling, weights and arithmetic decide. So a
warning names it only where nothing else differs."""


class TokenStore:
    """Rows of a file that has room for them. Pickles as the file's name: workers map the same bytes.

    path   the file      rows  of it to use, from frame 0 on
    shape  [C, tokens, M] of a row      dtype  of tokens      held  kept open as long as the store
    """

    def __init__(
        self, path: Path, rows: int, shape: tuple[int, ...], dtype: torch.dtype, held: Any = None
    ) -> None:
        self._given, self._held = (path, rows, shape, dtype), held
        self.path, self.shape, self.dtype = path, shape, dtype
        self._rows = np.memmap(path, row_of(shape, dtype), "r+", shape=(rows,))

    def __reduce__(self) -> Any:
        return TokenStore, self._given

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, frame: int) -> Tensor | None:
        """The tokens of a frame, or None where they are not known, torn or damaged."""
        if frame >= len(self._rows) or not (checksum := int(self._rows[frame]["checksum"])):
            return None
        data = self._rows[frame]["tokens"].copy()  # then summed: another process may be writing this row
        return torch.from_numpy(data).view(self.dtype).view(self.shape) if _sum(data) == checksum else None

    def write(self, frame: int, tokens: Tensor) -> None:
        """Keeps the tokens of a frame where there is room for it."""
        if frame < len(self._rows):
            row = self._rows[frame]
            data = tokens.contiguous().view(-1).view(torch.uint8).numpy()
            row["checksum"] = 0
            row["tokens"] = data
            row["checksum"] = _sum(data)


def row_of(shape: tuple[int, ...], dtype: torch.dtype) -> np.dtype:
    # Eight bytes for four keep rows aligned.
    return np.dtype([("checksum", "<u8"), ("tokens", "u1", math.prod(shape) * dtype.itemsize)])


def _sum(data: np.ndarray) -> int:
    return zlib.crc32(data.data) or 1


def open_store(
    folder: Path | None, limit: int, frames: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype,
    about: dict[str, Any],
) -> tuple[TokenStore, str]:  # fmt: skip
    """A store with room for frames, and its size in words.

    folder  in which each key has a folder; None: memory
    limit   bytes to use, for the first frames that fit; 0: as many as all need
    frames  indices in the dataset, ascending
    about   what the tokens depend on, by names for a message: its digest is the key
    raises  OSError where there is no room, before a large part of it is taken, or where no file can be made
    """
    width = row_of(shape, dtype).itemsize
    kept = frames[: limit // width] if limit else frames
    words = (
        f"{len(frames):,} frames x {width:,} bytes ({shape[0]} cameras) = {len(frames) * width / 1e9:.3g} GB"
        + (f", room for the first {len(kept):,}" if len(kept) < len(frames) else "")
    )
    if not len(kept):
        raise OSError(errno.ENOSPC, f"{words}; not one fits into {limit} bytes")
    place = None if folder is None else _place(folder, about)
    # Without O_APPEND: where a file system cannot reserve space, glibc writes in places, which would then be its end.
    file = os.memfd_create(ROWS) if place is None else os.open(place / ROWS, os.O_RDWR | os.O_CREAT, 0o666)
    held = os.fdopen(file, "r+b")
    free = _free_memory() if place is None else shutil.disk_usage(place).free - LEFT
    if len(kept) * width - os.fstat(file).st_blocks * 512 > free:
        raise OSError(errno.ENOSPC, f"{words}; {free / 1e9:.3g} GB are free")
    try:
        for run in np.split(kept, np.flatnonzero(np.diff(kept) != 1) + 1):
            # A full disk would kill a process that writes to a map of what it has no room for.
            os.posix_fallocate(file, int(run[0]) * width, len(run) * width)
    except OSError as error:
        raise OSError(error.errno, f"{words}; {error.strerror}") from error
    path = Path(f"/proc/{os.getpid()}/fd/{file}") if place is None else place / ROWS
    return TokenStore(path, int(kept[-1]) + 1, shape, dtype, held), f"{words}, in {place or 'memory'}"


def _free_memory() -> int:
    """Bytes, of the machine or what a container may still take."""
    import psutil  # of the extra "train", as all callers

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{each}").read_text() for each in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or one without a limit
        return free


def _place(folder: Path, about: dict[str, Any]) -> Path:
    """The folder of these tokens. Warns of what differs from the nearest other folder."""
    place = folder / blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=12).hexdigest()
    if not (place / ABOUT).exists():
        place.mkdir(parents=True, exist_ok=True)
        found = [other for other in sorted(folder.glob(f"*/{ABOUT}")) if other.parent != place]
        others = [(_differences(other, about), other.parent) for other in found]
        aside = place / f".{ABOUT}.{os.getpid()}"
        aside.write_text(json.dumps(about, indent=4), encoding="utf-8")
        os.replace(aside, place / ABOUT)
        if others:
            unlike, other = min(others, key=lambda each: len(each[0]))
            causes = [name for name in unlike if name != RESULT] or unlike
            logger.warning("not the same %s as in %s: frames are encoded anew", " and ".join(causes), other)
    return place


def _differences(path: Path, about: dict[str, Any]) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [name for name, value in about.items() if found.get(name) != value]
    except (OSError, ValueError, AttributeError):
        return list(about)
