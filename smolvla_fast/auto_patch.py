"""Policies patched as they are loaded: for programs of which not a line is the user's, such as LeRobot's commands.

``patch(policy)`` is per object and changes nothing global. Where no code can be written that is not enough, so this
module, and nothing else, replaces one method of one class: ``SmolVLAPolicy.from_pretrained``, through which every
caller of LeRobot loads a checkpoint (``make_policy``, rollout, record, eval, the policy server, the base of a PEFT
adapter). It does so when it is asked to: by the installed plugin, or by ``smolvla-fast serve``. A fleet's
replicas load their policies themselves and call ``patch_or_stock``.

Environment, read at each load:

    SMOLVLA_FAST_DISABLE    1: policies stay stock
    SMOLVLA_FAST_PRECISION  as ``precision`` of ``patch``; "auto" where unset
    SMOLVLA_FAST_BACKEND    as ``backend`` of ``patch``; "auto" where unset
    SMOLVLA_FAST_TUNE       as ``tune`` of ``patch``; "cached" where unset
    SMOLVLA_FAST_WARMUP     1: a first chunk at once, as ``warmup=True`` of ``patch``, so that the first real one waits
                            for no capture
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from contextlib import suppress
from typing import Any

from .patch import patch, unpatch
from .patching.runtime import Runtime, runtime_of
from .patching.settings import DISABLE, disabled

logger = logging.getLogger("smolvla_fast")

PRECISION = "SMOLVLA_FAST_PRECISION"
BACKEND = "SMOLVLA_FAST_BACKEND"
TUNE = "SMOLVLA_FAST_TUNE"
WARMUP = "SMOLVLA_FAST_WARMUP"


def patch_as_loaded(policy_class: Any) -> None:
    """Have every policy that ``policy_class.from_pretrained`` loads from now on patched. Asking again changes nothing.

    policy_class  LeRobot's ``SmolVLAPolicy``
    A policy that cannot be patched is handed over as it was loaded, with one warning that says why.
    """
    stock = policy_class.from_pretrained.__func__
    if hasattr(stock, "_smolvla_fast_stock"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        policy = stock(cls, *args, **kwargs)
        patch_or_stock(policy)
        return policy

    from_pretrained._smolvla_fast_stock = stock  # type: ignore[attr-defined]
    policy_class.from_pretrained = classmethod(from_pretrained)


def patch_or_stock(policy: Any, precision: str | None = None, backend: str | None = None) -> str | None:
    """``patch``, where nothing may stop for it: a policy that cannot be patched stays as it was loaded, with a warning.

    precision, backend  as ``patch`` takes them; None: as the environment says      returns  why it could not be, or None
    """
    try:
        precision = precision or os.environ.get(PRECISION) or "auto"
        backend = backend or os.environ.get(BACKEND) or "auto"
        tune = os.environ.get(TUNE) or "cached"
        patch(policy, precision=precision, backend=backend, warmup=_warmup(), tune=tune)
        if disabled():
            return f"{DISABLE} is set"
        weakref.finalize(policy.model, _report, runtime_of(policy.model))
        return None
    except Exception as error:  # whatever it is, a robot must not stop for it
        with suppress(Exception):
            unpatch(policy)
        logger.warning("smolvla_fast: off, stock runs: %s", error)
        return str(error)


def _warmup() -> bool:
    wish = os.environ.get(WARMUP) or "0"
    if wish not in ("0", "1"):
        raise ValueError(f"{WARMUP}={wish!r}; accepted are 1, and 0 or nothing")
    return wish == "1"


def _report(runtime: Runtime) -> None:
    """Says when a policy goes, or the program ends, who computed its chunks."""
    if not (runtime.fast or runtime.stock):
        # Compiled before it was patched, or copied: then its chunks went past this, or are counted by the copy.
        why = runtime.last_fallback or "a copy computed them, or nobody asked for one"
        logger.info("smolvla_fast: saw no chunk of this policy: %s", why)
        return
    why = f" (the last: {runtime.last_fallback})" if runtime.stock else ""
    logger.info("smolvla_fast: served %d chunks, left %d to stock%s", runtime.fast, runtime.stock, why)
