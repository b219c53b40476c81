"""File operations of a run, with fallbacks for file systems that lack some: vfat, exFAT, SMB, FUSE."""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from .errors import TrainingError, root_cause

LACKING = {errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system that lacks a call."""

TRACKERS = "trackers"
"""Folder of TensorBoard's and wandb's files in that of a run."""

READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def make_folder(folder: Path) -> None:
    """Makes the folder of a run and tries to write a file there. TrainingError where that fails."""
    try:
        for path in (folder, *folder.parents):
            if path.exists() and not path.is_dir():
                raise TrainingError(f"--output_dir={folder} cannot be made: {path} is a file; give another")
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder) as file:
            file.write(b"0")
    except (OSError, ValueError) as error:
        said = f"--output_dir={folder} cannot be written to ({root_cause(error)}); {advice(error)}, or give another"
        raise TrainingError(said) from error


def check_output_dir(folder: Path, new: bool) -> None:
    """TrainingError for a folder that a ``new`` run would overwrite, or that refuses files. Leaves nothing behind."""
    try:
        # Trackers begin before the first step; should that fail, the same command may run again.
        used = folder.is_dir() and any(entry.name != TRACKERS for entry in folder.iterdir())
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    except (OSError, ValueError) as error:
        raise TrainingError(f"--output_dir={folder} cannot be read ({error}); give another") from error
    if used and new:
        resumes = any(folder.glob("checkpoints/[0-9]*"))
        way = ", or --resume=true to go on" if resumes else " (it holds no checkpoint to resume)"
        used_by = f"--output_dir={folder} is there already and would be overwritten"
        raise TrainingError(f"{used_by}; give another{way}")
    try:
        make_folder(folder)
    finally:
        for path in made:
            with suppress(OSError, ValueError):
                path.rmdir()


def advice(error: BaseException) -> str:
    """What to do about a disk that refuses to write."""
    said = re.search(r"os error (\d+)", str(error))  # safetensors has it in its text alone
    number = getattr(error, "errno", None) or (said and int(said[1]))
    if number in READ_ONLY:
        return "make it writable"
    return "free some space" if number in FULL else "mend that"


def replace(source: Path, target: Path) -> None:
    """``os.replace``; on file systems that cannot rename onto an existing file, removes that file first."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno not in LACKING | {errno.EEXIST, errno.EACCES}:
            raise
        target.unlink(missing_ok=True)  # not of a folder, which stays
        os.rename(source, target)


def flush(path: Path) -> None:
    """Writes a file, or the names in a folder, to the disk, where the file system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some systems cannot open folders.
        unsupported = LACKING | ({errno.EACCES, errno.EISDIR, errno.EBADF} if path.is_dir() else set())
        if error.errno not in unsupported:
            raise
