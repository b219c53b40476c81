"""Triton's driver for the machine: a kernel is compiled for a GPU that is not here, and its PTX runs on CPU tensors.

JITFunction, the launchers of kernels/ and everything above are as on a GPU: what differs is who takes the binary and the
arguments. ptxas is not asked.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from simt.emulator import build
from simt.ptx import program
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from smolvla_fast.kernels.common import assume_capability

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have (CUDA C++ Programming Guide, compute capabilities)."""
launched: Counter[str] = Counter()
"""Kernels that have run, by name."""
_first_seed, _capability = 0, 80
rewrite: Any = None
"""A function from PTX to PTX, for tests that plant a fault."""


class Launcher:
    """What ``CudaLauncher`` is to a GPU: takes the arguments of a kernel in their order and runs it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds = list(source.signature.values())
        self._metadata = metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid:
            raise NotImplementedError("clusters and cooperative launches are not emulated")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError("scratch memory is not emulated")

    def __call__(self, x: int, y: int, z: int, stream: Any, function: bytes, *rest: Any) -> None:
        values = rest[-len(self._kinds) :]
        text = function.decode()
        found = program.read(rewrite(text) if rewrite is not None else text)
        machine = build.ptx()
        machine.forget()
        given = [
            (kind, value) for kind, value in zip(self._kinds, values, strict=True) if kind != "constexpr"
        ]
        # Two hidden pointers follow, to scratch memory that nobody has.
        if len(found.parameters) != len(given) + 2:
            raise AssertionError(f"{found.name} has {len(found.parameters)} parameters, not {len(given) + 2}")
        arguments = [(each.file, each.index, 0) for each in found.parameters[-2:]]
        for parameter, (kind, value) in zip(found.parameters, given):  # noqa: B905
            if isinstance(value, Tensor):
                for address, size in extents(value):
                    machine.allow(address, size)
            arguments.append((parameter.file, parameter.index, bits(kind, value)))
        launched[found.name] += 1
        # Every launch in another order; what failed runs again in the order that its error names.
        seed = int(os.environ.get("SMOLVLA_FAST_SEED", _first_seed + launched.total()))
        machine.configure(
            seed=seed, compute_capability=_capability, shared_bytes_per_block=SHARED[_capability]
        )
        try:
            machine.run(
                found.assembled,
                (x, y, z),
                found.threads,
                self._metadata.shared,
                self._metadata.launch_pdl,
                arguments,
            )
        except RuntimeError as error:
            error.add_note(f"in this order again: SMOLVLA_FAST_SEED={seed}")
            raise


def extents(tensor: Tensor) -> list[tuple[int, int]]:
    """What a launch may touch: the bytes between the first and the last element of the tensor."""
    if not tensor.numel():
        return []
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return [(tensor.data_ptr(), (last + 1) * tensor.element_size())]


def bits(kind: str, value: Any) -> int:
    """An argument as a register holds it."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    if kind in ("fp32", "f32"):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if kind.startswith(("i", "u")):
        return int(value) & (1 << (64 if kind.endswith("64") else 32)) - 1
    raise NotImplementedError(f"an argument of type {kind}")


@contextmanager
def machine(capability: int, seed: int = 0) -> Iterator[None]:
    """Inside, Triton's kernels run on CPU tensors as they are compiled for this capability.

    seed  of the orders in which blocks and warps take turns: every launch has another
    """
    global _first_seed, _capability
    before = _first_seed, _capability
    _first_seed, _capability = seed, capability
    # What is compiled here has no binary, so nobody may find it who wants one.
    salt = CUDABackend.hash
    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (None, kernel, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": SHARED[capability]},
    )
    stand_in = SimpleNamespace(
        get_current_device=lambda: capability,  # what is compiled for one is cached apart from the others'
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        launcher_cls=Launcher,
        utils=utils,
    )
    with (
        patch.object(driver, "_active", stand_in),
        patch.object(CUDABackend, "hash", lambda self: f"{salt(self)} without a binary"),
        patch.object(CUDABackend, "make_cubin", lambda self, text, *rest: text.encode()),
        assume_capability(capability),
    ):
        try:
            yield
        finally:
            _first_seed, _capability = before
