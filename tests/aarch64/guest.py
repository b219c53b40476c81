"""The CPU kernels of another processor, as the module ``smolvla_fast._cpu``: QEMU runs them in a process of its own.

The same csrc/bindings.cpp is compiled for aarch64, and this sends it each call with the memory that its addresses lie in.
As a plugin of pytest (``-p aarch64.guest``) the tests marked ``cpu_kernels`` run on it unchanged: tensors and what a result
is judged by are this processor's, the kernels alone are the other's. ``SMOLVLA_FAST_GUEST`` is the command that runs it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shlex
import subprocess
import threading
from collections.abc import Iterable
from typing import Any

import torch

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu

LEVELS = ("baseline", "neon", "neon_dotprod", "neon_i8mm", "neon_bf16")
_FIRST = 0x20_0000_0000
"""Where operands lie in the guest: far above its program, below its libraries and stack."""
_PAGE = 4096


class Guest:
    """Has the functions of ``smolvla_fast._cpu``; see there."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._storages: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._data_ptr = torch.Tensor.data_ptr

    def levels(self) -> list[str]:
        return self._call("levels").split()

    def close(self) -> None:
        self._process.communicate()

    def install(self) -> None:
        """In the place of the compiled extension, for the rest of the process."""
        load, guest = extension._load, self
        atexit.register(self.close)

        def data_ptr(tensor: torch.Tensor) -> int:
            address = guest._data_ptr(tensor)
            guest._storages[address] = tensor.untyped_storage()
            return address

        torch.Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
        extension._load = lambda kind: (guest, "") if kind == "cpu" else load(kind)  # type: ignore[assignment]
        cpu.LEVELS = LEVELS  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args: self._call(name, *args)

    def _call(self, name: str, *args: Any) -> str:
        with self._lock:
            flat = list(_flat(args))
            # A storage goes over whole, once, so that strides, views and operands in place stay what they are.
            bases: dict[int, tuple[int, int]] = {}
            words, at = [], _FIRST
            for value in flat:
                if value in self._storages and isinstance(value, int):
                    storage = self._storages[value]
                    base, size = storage.data_ptr(), storage.nbytes()
                    if base not in bases:
                        # Its end is the end of a page; behind it is a page that faults.
                        end = -(-(at + size) // _PAGE) * _PAGE
                        bases[base], at = (end - size, size), end + _PAGE
                    value += bases[base][0] - base
                words.append(str(value))
            self._storages.clear()
            places = [f"{address} {size}" for address, size in bases.values()]
            line = " ".join([str(len(bases)), *places, name, *words]) + "\n"
            pipe_in, pipe_out = self._process.stdin, self._process.stdout
            assert pipe_in is not None and pipe_out is not None
            try:
                pipe_in.write(line.encode())
                for base, (_, size) in bases.items():
                    pipe_in.write(_memory(base, size))
                pipe_in.flush()
                said = pipe_out.readline().decode()
            except BrokenPipeError:
                said = ""
            if not said:
                raise RuntimeError(f"{name}: the guest ended with {self._process.wait()}")
            for base, (_, size) in bases.items():
                found = pipe_out.read(size)
                assert len(found) == size, f"{name}: the guest ended within its answer"
                _memory(base, size)[:] = found
        verdict, _, answer = said.rstrip("\n").partition(" ")
        if verdict != "ok":
            raise ValueError(answer)
        return answer


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, tuple | list | torch.Size):
            yield from _flat(value)
        else:
            yield value.hex() if isinstance(value, float) else value


if "SMOLVLA_FAST_GUEST" in os.environ:
    Guest(shlex.split(os.environ["SMOLVLA_FAST_GUEST"])).install()
