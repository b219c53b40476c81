"""Seeds, saves and restores the random state of a process, to the bit.

The state includes numpy's global generator, from which image transforms and third-party datasets still draw.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """``seed_all`` for the body; the caller's random state returns afterwards."""
    before = collect()
    try:
        seed_all(seed)
        yield
    finally:
        restore(before, here=True)


def seed_all(seed: int | None) -> None:
    """Seeds the generators of python, numpy and torch; None leaves them as they are."""
    from accelerate.utils import set_seed

    if seed is not None:
        set_seed(seed)


def collect() -> dict[str, Tensor]:
    """The state as tensors, under the names of LeRobot's ``rng_state.safetensors``.

    All devices of the accelerator are kept, as ``torch.manual_seed`` seeds them all: the current one under LeRobot's name,
    and each under its number. The normal numbers that python and numpy hold back are kept in fp64 (LeRobot rounds numpy's
    to fp32 and drops python's). LeRobot ignores names it does not know.
    """
    from lerobot.utils.random_utils import serialize_numpy_rng_state, serialize_python_rng_state

    state = {**serialize_python_rng_state(), **serialize_numpy_rng_state()}
    state["torch_rng_state"] = torch.get_rng_state()
    *_, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    state["np_rng_cached_gaussian"] = torch.tensor([gauss], dtype=torch.float64)
    if (held := random.getstate()[2]) is not None:
        state["py_rng_gauss"] = torch.tensor([held], dtype=torch.float64)
    kind, module = _accelerator()
    if module:
        for i in range(module.device_count()):
            state[f"torch_{kind}_rng_state_{i}"] = module.get_rng_state(i)
        state[f"torch_{kind}_rng_state"] = module.get_rng_state(_current(module))
    return state


def restore(state: dict[str, Tensor], *, here: bool = False) -> None:
    """Inverse of ``collect``, for the devices that this machine has. Reads LeRobot's files too.

    here  of this process: each device gets its own. Else the current one gets what was the current one's, for each of
          several processes has a device of its own, and all share the state that one of them has written
    """
    from lerobot.utils.random_utils import deserialize_numpy_rng_state

    held = float(state["py_rng_gauss"]) if "py_rng_gauss" in state else None
    random.setstate((int(state["py_rng_version"]), tuple(state["py_rng_state"].tolist()), held))
    deserialize_numpy_rng_state(state)
    torch.set_rng_state(state["torch_rng_state"])
    kind, module = _accelerator()
    for i in range(module.device_count() if module else 0):
        name = f"torch_{kind}_rng_state" + ("" if i == _current(module) and not here else f"_{i}")
        if name in state:
            module.set_rng_state(state[name], i)


def _accelerator() -> tuple[str | None, Any]:
    """Type and module of the accelerator, such as "cuda" and ``torch.cuda``; None where none is there or in use."""
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device) if device else None
    in_use = module and getattr(module, "is_initialized", module.is_available)()
    return (device.type, module) if device and in_use else (None, None)


def _current(module: Any) -> int:
    return module.current_device() if hasattr(module, "current_device") else 0  # torch.mps has one alone
