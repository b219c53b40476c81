"""smolvla_fast: LeRobot's SmolVLA, faster and just as right.

    import smolvla_fast
    smolvla_fast.patch(policy)

Importing the package imports torch and nothing heavier: LeRobot, transformers and Triton are met when they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# `patch` and `verify` are functions and module names alike. Importing them here, before anyone imports the modules by
# name, leaves the functions in the package's namespace for good.
from .patch import Status, captured, patch, refresh, status, unpatch
from .verify import Report, verify

if TYPE_CHECKING:
    from .smolvla import SmolVLAConfig, SmolVLAPolicy, make_smolvla_pre_post_processors

__version__ = "0.1.0"

__all__ = [
    "Report",
    "SmolVLAConfig",
    "SmolVLAPolicy",
    "Status",
    "__version__",
    "captured",
    "make_smolvla_pre_post_processors",
    "patch",
    "refresh",
    "status",
    "unpatch",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("SmolVLAConfig", "SmolVLAPolicy", "make_smolvla_pre_post_processors"):
        return getattr(import_module(".smolvla", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
