"""Installed, this makes LeRobot's own commands run SmolVLA with smolvla_fast: no code, no flag.

LeRobot imports every installed distribution whose name begins with ``lerobot_policy_`` when one of its commands starts.
This one then waits: only when LeRobot imports SmolVLA's module is ``SmolVLAPolicy.from_pretrained`` replaced by one that
patches what it has loaded. No other policy is touched, and a command without a SmolVLA policy pays nothing.

A class attribute of LeRobot is changed here, which ``smolvla_fast.patch`` itself never does. Installing this distribution
is how you say yes to that; ``SMOLVLA_FAST_DISABLE=1`` says no for one run, uninstalling it says no for good.
``smolvla_fast/auto_patch.py`` has the rest, ``SMOLVLA_FAST_PRECISION``, ``SMOLVLA_FAST_BACKEND`` and ``SMOLVLA_FAST_WARMUP``
among it.
"""

import logging
from typing import Any

import wrapt


@wrapt.when_imported("lerobot.policies.smolvla.modeling_smolvla")
def _patch_as_loaded(module: Any) -> None:
    try:
        from smolvla_fast.auto_patch import patch_as_loaded

        patch_as_loaded(module.SmolVLAPolicy)
    except Exception as error:  # a robot must not stop because smolvla_fast is broken
        logging.getLogger("smolvla_fast").warning("smolvla_fast: off, stock runs: %r", error)
