"""Finds files of a checkpoint in a local folder or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
WEIGHTS_INDEX_NAME = "model.safetensors.index.json"

SHOWN = 8
"""Most names of a folder that a message lists."""
HUB_OPTIONS = ("force_download", "token", "cache_dir", "local_files_only", "revision")
"""Keyword arguments passed on to ``huggingface_hub.hf_hub_download``."""


def split_hub_options(kwargs: dict[str, Any], where: str) -> dict[str, Any]:
    """The Hub options among ``kwargs``; options of older huggingface_hub are dropped, anything else is a
    TypeError."""
    options = {name: value for name, value in kwargs.items() if name not in ("resume_download", "proxies")}
    unknown = sorted(set(options) - set(HUB_OPTIONS))
    if unknown:
        raise TypeError(f"{where} got unexpected arguments {unknown}; accepted are {list(HUB_OPTIONS)}")
    return options


def is_absent(source: str | Path, name: str, **options: Any) -> bool:
    """Whether a folder or Hub repository is known to have no file ``name``; False if the Hub cannot be reached."""
    try:
        find_file(source, name, **options)
    except FileNotFoundError as error:
        if error.__cause__ is None:
            return True
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        return isinstance(error.__cause__, EntryNotFoundError) and not isinstance(
            error.__cause__, LocalEntryNotFoundError
        )
    return False


def find_file(source: str | Path, name: str, **options: Any) -> Path:
    """The local path of file ``name`` of a folder or Hub repository, downloaded if necessary.

    raises  FileNotFoundError naming the file, the place, and what is accepted
    """
    if not str(source):  # Path("") would be the working directory
        raise FileNotFoundError(f"no {name} of '': give a folder or a Hub repository id 'owner/name'")
    folder = Path(source)
    if folder.is_dir():
        if not (folder / name).is_file():
            held = sorted(p.name for p in folder.iterdir())
            present = ", ".join(held[:SHOWN]) + (
                f" and {len(held) - SHOWN} more" if len(held) > SHOWN else ""
            )
            present = present or "nothing"
            raise FileNotFoundError(f"{name} not found in {folder.resolve()}, which holds {present}")
        return folder / name
    # Imported late: local folders must work where huggingface_hub cannot reach its cache.
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo_id=str(source), filename=name, **options))
    except Exception as error:
        raise FileNotFoundError(
            f"{name} of {str(source)!r} not found: there is no such folder, and the Hugging Face Hub says "
            f"{type(error).__name__}: {error}. Give an existing folder or a Hub repository id 'owner/name'."
        ) from error
