"""The random state of a process: seeded for a run and given back after it, saved and restored to the bit.

numpy's global generator among it: image transforms and third-party datasets still draw from it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """``seed_all`` for what is inside; whoever called gets their random state back."""
    before = collect()
    try:
        seed_all(seed)
        yield
    finally:
        restore(before)


def seed_all(seed: int | None) -> None:
    """Seeds python's, numpy's and torch's generators; None leaves them."""
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)


def collect() -> dict[str, Tensor]:
    """The state as tensors, under the names of LeRobot's ``rng_state.safetensors``.

    numpy's held-back normal number is kept in fp64 (LeRobot rounds it to fp32). Of several GPUs the current one.
    """
    version, words, _ = random.getstate()
    _, keys, index, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "py_rng_version": torch.tensor([version]),
        "py_rng_state": torch.tensor(words),
        "np_rng_state_values": torch.tensor(np.asarray(keys, dtype=np.int64)),
        "np_rng_state_index": torch.tensor([index]),
        "np_rng_has_gauss": torch.tensor([has_gauss]),
        "np_rng_cached_gaussian": torch.tensor([gauss], dtype=torch.float64),
        "torch_rng_state": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["torch_cuda_rng_state"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Tensor]) -> None:
    """Inverse of ``collect``."""
    random.setstate((int(state["py_rng_version"]), tuple(state["py_rng_state"].tolist()), None))
    np.random.set_state(  # noqa: NPY002
        (
            "MT19937",
            state["np_rng_state_values"].numpy().astype(np.uint32),
            int(state["np_rng_state_index"]),
            int(state["np_rng_has_gauss"]),
            float(state["np_rng_cached_gaussian"]),
        )
    )
    torch.set_rng_state(state["torch_rng_state"])
    if "torch_cuda_rng_state" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch_cuda_rng_state"])
