"""Policies patched as they are loaded: for programs of which not a line is the user's, such as LeRobot's commands.

``patch(policy)`` is per object and changes nothing global. Where no code can be written that is not enough, so this
module, and nothing else, replaces methods of one class: ``SmolVLAPolicy.from_pretrained``, through which every
caller of LeRobot loads a checkpoint (``make_policy``, rollout, record, eval, the policy server, the base of a PEFT
adapter). It does so when it is asked to: by the installed plugin, or by ``smolvla-fast serve``. ``lerobot-train`` makes
fresh policies as well, and moves them to their device afterwards; so ``forward``, the loss, is replaced too, and patches
at the first loss where training is asked for. A fleet's replicas load their policies themselves and call
``patch_or_stock``.

Environment, read for each policy:

    SMOLVLA_FAST_DISABLE    1: policies stay stock
    SMOLVLA_FAST_PRECISION  as ``precision`` of ``patch``; "auto" where unset
    SMOLVLA_FAST_BACKEND    as ``backend`` of ``patch``; "auto" where unset
    SMOLVLA_FAST_TUNE       as ``tune`` of ``patch``; "cached" where unset
    SMOLVLA_FAST_WARMUP     1: a first chunk at once, as ``warmup=True`` of ``patch``, so that the first real one waits
                            for no capture
    SMOLVLA_FAST_TRAINING   1: as ``training=True`` of ``patch``, for ``lerobot-train``; fresh policies are patched too,
                            at their first loss. What LeRobot does around the policy (PEFT, accelerate, wandb,
                            evaluation) stays its own
    SMOLVLA_FAST_IMAGE_CACHE  bytes, as ``image_cache`` of ``patch``
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
from .patching.settings import DISABLE, TRAINING, disabled, is_on
from .smolvla.weights_io import check_names

logger = logging.getLogger("smolvla_fast")

PRECISION = "SMOLVLA_FAST_PRECISION"
BACKEND = "SMOLVLA_FAST_BACKEND"
TUNE = "SMOLVLA_FAST_TUNE"
WARMUP = "SMOLVLA_FAST_WARMUP"
IMAGE_CACHE = "SMOLVLA_FAST_IMAGE_CACHE"

_tried: weakref.WeakSet[Any] = weakref.WeakSet()
"""Policies that were patched, or could not be."""


def patch_as_loaded(policy_class: Any) -> None:
    """Have every policy that ``policy_class.from_pretrained`` loads from now on patched, and where ``SMOLVLA_FAST_TRAINING``
    is 1 every other one at its first loss. Asking again changes nothing.

    policy_class  LeRobot's ``SmolVLAPolicy``
    A policy that cannot be patched is handed over as it was made, with one warning that says why.
    """
    stock, loss = policy_class.from_pretrained.__func__, policy_class.forward
    if hasattr(stock, "_smolvla_fast_stock"):
        return

    @functools.wraps(stock)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        policy = stock(cls, *args, **kwargs)
        patch_or_stock(policy)
        return policy

    @functools.wraps(loss)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self not in _tried and is_on(TRAINING):
            patch_or_stock(self)
        return loss(self, *args, **kwargs)

    policy_class.forward = forward
    from_pretrained._smolvla_fast_stock = stock  # type: ignore[attr-defined]
    policy_class.from_pretrained = classmethod(from_pretrained)


def load(path: str) -> Any:
    """LeRobot's policy of a checkpoint. Raises WeightsError where that does not name its weights (``check_names``)."""
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    return check_names(SmolVLAPolicy.from_pretrained(path), path)


def patch_or_stock(policy: Any, precision: str | None = None, backend: str | None = None) -> str | None:
    """``patch``, where nothing may stop for it: a policy that cannot be patched stays as it was loaded, with a warning.

    precision, backend  as ``patch`` takes them; None: as the environment says      returns  why it could not be, or None
    """
    _tried.add(policy)
    try:
        precision = precision or os.environ.get(PRECISION) or "auto"
        backend = backend or os.environ.get(BACKEND) or "auto"
        tune = os.environ.get(TUNE) or "cached"
        patch(
            policy, precision=precision, backend=backend, warmup=is_on(WARMUP), tune=tune, training=is_on(TRAINING),
            image_cache=_bytes(IMAGE_CACHE),
        )  # fmt: skip
        if disabled():
            return f"{DISABLE} is set"
        weakref.finalize(policy.model, _report, runtime_of(policy.model))
        return None
    except Exception as error:  # whatever it is, a robot must not stop for it
        with suppress(Exception):
            unpatch(policy)
        logger.warning("smolvla_fast: off, stock runs: %s", error)
        return str(error)


def _bytes(name: str) -> int:
    wish = os.environ.get(name) or "0"
    if not wish.isdecimal():
        raise ValueError(f"{name}={wish!r}; accepted is a number of bytes such as 8000000000")
    if int(wish) and not is_on(TRAINING):
        raise ValueError(f"{name}={wish} needs {TRAINING}=1")
    return int(wish)


def _report(runtime: Runtime) -> None:
    """Says when a policy goes, or the program ends, who computed its losses and its chunks."""
    losses = runtime.training
    if losses.fast or losses.stock:
        why = f" (the last: {losses.last_fallback})" if losses.stock else ""
        kept = (
            ", image cache: {hits} frames known, {misses} new".format_map(losses.cache)
            if losses.cache
            else ""
        )
        logger.info(
            "smolvla_fast: computed %d losses, left %d to stock%s%s", losses.fast, losses.stock, why, kept
        )
    if runtime.fast or runtime.stock:
        why = f" (the last: {runtime.last_fallback})" if runtime.stock else ""
        logger.info("smolvla_fast: served %d chunks, left %d to stock%s", runtime.fast, runtime.stock, why)
    elif not (losses.fast or losses.stock):
        # Compiled before it was patched, or copied: then its chunks went past this, or are counted by the copy.
        why = runtime.last_fallback or "a copy computed them, or nobody asked for one"
        why += "" if is_on(TRAINING) else f"; to train by the fast path, set {TRAINING}=1"
        logger.info("smolvla_fast: saw no chunk of this policy: %s", why)
