"""Makes LeRobot's own commands run SmolVLA with smolvla_fast, with no code and no flag, once it is installed.

LeRobot's commands import every installed distribution whose name begins with ``lerobot_policy_``. When LeRobot then imports
SmolVLA's module, this one replaces ``SmolVLAPolicy.from_pretrained`` by a function that patches the loaded policy. With
``SMOLVLA_FAST_TRAINING=1`` policies that ``lerobot-train`` makes are patched too, at their first loss, by the same
replacement of ``SmolVLAPolicy.forward``. Other policies do not change, and a command without SmolVLA pays nothing.

This changes class attributes of LeRobot, which ``smolvla_fast.patch`` never does: you opt in by installing this
distribution, out for one run with ``SMOLVLA_FAST_DISABLE=1``, and out for good by uninstalling it. See
``smolvla_fast/auto_patch.py`` for ``SMOLVLA_FAST_PRECISION``, ``SMOLVLA_FAST_BACKEND``,
``SMOLVLA_FAST_TUNE``, ``SMOLVLA_FAST_WARMUP``, ``SMOLVLA_FAST_TRAINING`` and ``SMOLVLA_FAST_IMAGE_CACHE``.
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
