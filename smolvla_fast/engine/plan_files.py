"""Plans on disk: one file for each machine, software, policy's shapes, tier and wish.

A file is data, whoever wrote it: it names candidates and nothing else, and what is not exactly a plan for the key that
was asked is ignored with one line in the log. No file can make a policy fail.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..ops.plan import Plan
from .plan_key import differences, here, short, text

logger = logging.getLogger("smolvla_fast")

CACHE_DIR = "SMOLVLA_FAST_CACHE_DIR"
FORMAT = 1
MAX_BYTES = 4 * 2**20
MAX_CHOICES = 10_000
SHIPPED = Path(__file__).resolve().parents[1] / "plans"
"""Plans that travel with the package."""

# Names, and no more: neither can be a path, an expression or a second line in a log.
_OP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,:;=+*<>()\[\]|-]{0,199}", re.ASCII)
_CANDIDATE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .,:;=+*()-]{0,99}", re.ASCII)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)

# A pipe in a plan's place must not be waited for, and a terminal not taken.
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

_logged: set[tuple[str, str]] = set()


class CannotSave(RuntimeError):
    """A plan cannot be kept; the message says why and what to do."""


class _Unusable(Exception):
    """Why a file is no plan for this key."""


# Where ----------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """``SMOLVLA_FAST_CACHE_DIR``, or the user's cache folder. Nothing is made. Raises CannotSave where there is none."""
    wish = os.environ.get(CACHE_DIR)
    try:
        if wish:
            return Path(wish).expanduser().absolute()
        from platformdirs import user_cache_path

        return user_cache_path("smolvla_fast", appauthor=False)
    except ImportError as error:
        raise CannotSave(
            f"no cache folder is known: platformdirs is not installed; set {CACHE_DIR}"
        ) from error
    except (OSError, RuntimeError) as error:  # no home, or a user that is not there
        raise CannotSave(f"no cache folder is known: {error}; set {CACHE_DIR} to a folder") from error


def _name(key: Mapping[str, Any]) -> str:
    device = re.sub(r"[^a-z0-9]+", "-", str(key["device"]["name"]).lower()).strip("-")[:60].strip("-")
    digest = hashlib.sha256(text(key).encode()).hexdigest()[:16]
    return f"{device or key['device']['type']}-{key.get('tier')}-{digest}.json"


def path_of(key: Mapping[str, Any]) -> Path:
    """Where the user's plan of a key lies, or would lie. Raises CannotSave as ``cache_folder``."""
    return cache_folder() / "plans" / _name(key)


# Reading --------------------------------------------------------------------------------------------------------------


def find(key: Mapping[str, Any]) -> tuple[Plan | None, str | None]:
    """The user's plan of a key, else the shipped one, else None; and what was wrong with a file, or None.

    Never raises. What is ignored is said in the log once.
    """
    try:
        places = [(path_of(key), ""), (SHIPPED / _name(key), "shipped")]
        wrong = None
    except CannotSave as error:
        places, wrong = [(SHIPPED / _name(key), "shipped")], str(error)
    for path, origin in places:
        try:
            theirs, plan = _read(path, origin or str(path))
            apart = differences(theirs, json.loads(text(key)))
            if apart:
                raise _Unusable(f"it is another machine's or policy's: {'; '.join(apart[:3])}")
            return plan, wrong
        except FileNotFoundError:
            continue
        except (_Unusable, RecursionError) as error:
            wrong = wrong or f"{path}: {error}"
            if (str(path), str(error)) not in _logged:
                _logged.add((str(path), str(error)))
                again = "run `smolvla-fast tune` to make it anew"
                logger.warning("smolvla_fast: ignored the plan %s: %s; %s", path, error, again)
    return None, wrong


def _read(path: Path, origin: str = "") -> tuple[dict[str, Any], Plan]:
    """The key, which may be anybody's, and the plan of a file. Raises FileNotFoundError, _Unusable."""
    try:
        handle = os.open(path, _READ)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _Unusable("it is no file")
        with open(handle, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _Unusable(f"it cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MAX_BYTES:
        raise _Unusable(f"it has more than {MAX_BYTES // 2**20} MiB")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _Unusable("it is torn, or no JSON") from error
    if not isinstance(found, dict):
        raise _Unusable(f"it holds a {type(found).__name__}; accepted is an object")
    if type(found.get("format")) is not int or found["format"] != FORMAT:
        raise _Unusable(f"its format is {short(found.get('format'))}; accepted is {FORMAT}")
    if not isinstance(found.get("key"), dict):
        raise _Unusable("it has no key")
    return found["key"], _plan(found, origin)


def _plan(found: dict[str, Any], origin: str) -> Plan:
    choices, measured = found.get("choices"), found.get("measured")
    if not isinstance(choices, dict) or len(choices) > MAX_CHOICES:
        raise _Unusable(f"its choices are no object of at most {MAX_CHOICES:,} names")
    for op, candidate in choices.items():
        if not (_OP.fullmatch(op) and isinstance(candidate, str) and _CANDIDATE.fullmatch(candidate)):
            raise _Unusable(f"its choice {short(op)}: {short(candidate)} is not of two names")
    try:
        if not (isinstance(measured, str) and _DATE.fullmatch(measured)):
            raise ValueError
        datetime.date.fromisoformat(measured)
    except ValueError:
        raise _Unusable(f"its date is {short(measured)}; accepted is YYYY-MM-DD") from None
    return Plan(choices, origin, measured)


# Writing --------------------------------------------------------------------------------------------------------------


def save(key: Mapping[str, Any], plan: Plan, record: Mapping[str, Any]) -> Path:
    """Writes the user's plan of a key: whoever reads meanwhile finds the old one or the new one, whole.

    plan    without a date: today's      record  how it was measured, as JSON values
    raises  CannotSave naming the folder and the variable that chooses another; ValueError for what ``find`` would refuse
    """
    measured = plan.measured or today().isoformat()
    found = {"format": FORMAT, "key": dict(key), "choices": dict(plan.choices), "measured": measured}
    try:
        _plan(found, "")
    except _Unusable as error:
        raise ValueError(f"this is no plan: {error}") from error
    data = json.dumps({**found, "record": record}, indent=1, allow_nan=False).encode()
    if len(data) > MAX_BYTES:
        data = json.dumps(found, indent=1, allow_nan=False).encode()
    path = path_of(key)
    _write(path, data)
    return path


def check_writable() -> Path:
    """Refuses a cache folder that cannot be written before work is done for it. Returns it. Raises CannotSave."""
    folder = cache_folder() / "plans"
    _write(folder / f".{secrets.token_hex(8)}", b"", keep=False)
    return folder


def _write(path: Path, data: bytes, keep: bool = True) -> None:
    """Aside in the same folder, then renamed."""
    # Not tempfile's: those are the user's alone, and a folder may be shared.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if keep:
                os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        with suppress(OSError):  # not every system opens folders
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, ValueError) as error:
        place, why = path if keep else path.parent, getattr(error, "strerror", None) or error
        raise CannotSave(
            f"cannot write {place}: {why}; set {CACHE_DIR} to a folder that can be written"
        ) from error


# Telling --------------------------------------------------------------------------------------------------------------


def today() -> datetime.date:
    return datetime.datetime.now(datetime.timezone.utc).date()


def age(measured: str) -> str:
    days = (today() - datetime.date.fromisoformat(measured)).days
    if days < 0:
        return "dated after this machine's clock"
    return "today" if days == 0 else "1 day old" if days == 1 else f"{days} days old"


def describe(plan: Plan) -> str:
    """``plan of 2026-11-29 (3 days old), 14 choices, /path``."""
    when = f"plan of {plan.measured} ({age(plan.measured)})" if plan.measured else "plan without a date"
    count = len(plan.choices)
    return f"{when}, {count} choice{'' if count == 1 else 's'}" + (f", {plan.origin}" if plan.origin else "")


LISTED = 200


def listing() -> tuple[list[dict[str, Any]], str | None]:
    """Every plan that is there, the user's and the shipped, and why the user's folder cannot be looked through, or None.

    Of each: file, tier, backend, measured, age, choices, and reason: why it does not fit this machine, software and number
    of threads, or None. Whether it fits a policy's shapes is the policy's to say.
    """
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    machines = [json.loads(text(here(each))) for each in devices]
    found, trouble, paths = [], None, []
    try:
        paths = sorted((cache_folder() / "plans").glob("*.json"))
    except (CannotSave, OSError) as error:
        trouble = str(error)
    if len(paths) > LISTED:
        trouble = f"{len(paths):,} files are there; the first {LISTED} are named"
    for path in [*paths[:LISTED], *sorted(SHIPPED.glob("*.json"))]:
        row: dict[str, Any] = dict.fromkeys(("tier", "backend", "measured", "age", "choices"))
        row["file"] = str(path)
        try:
            key, plan = _read(path)
            apart = min((differences({n: key.get(n) for n in each}, each) for each in machines), key=len)
            row.update(
                tier=short(key.get("tier")), backend=short(key.get("backend")), choices=len(plan.choices)
            )
            row.update(measured=plan.measured, age=age(plan.measured))
            row["reason"] = "; ".join(apart[:3]) or _misnamed(path, key)
        except (OSError, _Unusable, RecursionError) as error:
            row["reason"] = str(error)
        found.append(row)
    return found, trouble


def _misnamed(path: Path, key: Mapping[str, Any]) -> str | None:
    """A file is looked for by the name that its key gives it."""
    return None if path.name == _name(key) else "its name is not its key's, so nobody looks for it"
