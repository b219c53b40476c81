"""Which backend serves which op, and why a cell of the table is empty."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache

import torch

from .availability import PREFERRED, why_not, why_not_auto, why_not_fp8, why_not_int8
from .plan import Plan
from .table import NAMES, Ops, derive

BACKENDS = ("torch", "cpu", "triton", "cuda")
_MODULES = {
    "reference": ("reference.ops", None),
    "torch": ("torch.ops", "reference"),
    "cpu": ("cpu.ops", "torch"),
    "int8": ("cpu.int8_ops", "cpu"),
    "triton": ("triton.ops", "torch"),
}
"""Of each table: the module whose functions are its ops, and the table that serves what this one does not have. A module is
imported when its table is first asked for: nothing has to import Triton to run on a CPU."""


@cache
def backend_ops(name: str) -> Ops:
    """The table of "reference", "torch", "cpu", "int8" (backend ``cpu`` with integer products) or "triton"."""
    path, below = _MODULES[name]
    module = importlib.import_module(f"{__package__}.{path}")
    backend = "cpu" if name == "int8" else name
    return derive(backend, module, None if below is None else backend_ops(below))


def reference_ops() -> Ops:
    return backend_ops("reference")


@cache
def _cuda(fallback: str) -> Ops:
    """CUDA C++ where there is a kernel, all the rest by the backend ``fallback``."""
    from .cuda import masked_attention
    from .cuda import ops as module

    below = backend_ops(fallback)
    attention = masked_attention.masked_attention_or_fallback(below.masked_attention, below.prepare_mask)
    return derive("cuda", module, below, fallback=below, masked_attention=attention)


@dataclass(frozen=True)
class Row:
    """One cell of the table, as ``smolvla-fast doctor`` prints it."""

    op: str
    backend: str
    available: bool
    reason: str


def _ops(backend: str, device: torch.device) -> Ops:
    """The table of a backend that can serve this device."""
    if backend != "cuda":
        return backend_ops(backend)
    return _cuda("triton" if device.type == "cuda" and why_not("triton", device) is None else "torch")


_EIGHT_BITS = {
    "e4m3": ("fp8", "triton", why_not_fp8, "triton"),
    "int8": ("int8", "cpu", why_not_int8, "int8"),
}
"""Of each kind of 8-bit matrices: the tier, the one backend that has kernels for it, why not here, its ops."""


def why_not_eight_bits(device: torch.device) -> dict[str, str | None]:
    """Of each tier with 8-bit matrices: why ``auto`` cannot serve it on this device, or None."""
    return {
        tier: reason(device) or why_not_auto(alone, device) for tier, alone, reason, _ in _EIGHT_BITS.values()
    }


def select(
    backend: str,
    device: torch.device,
    stock_order: bool,
    quantized: str | None = None,
    plan: Plan | None = None,
) -> Ops:
    """The ops for a wish.

    backend      "auto": on a CPU "cpu", on an NVIDIA GPU "triton", and "torch" where these cannot serve or were never
                 measured ahead of it; or a name. "cuda" has to be named: it was never measured to be ahead of Triton
    quantized    "e4m3", the tier ``fp8``, which Triton's kernels alone serve, or "int8", which backend ``cpu`` alone does
    plan         who serves what on this machine, as far as it was measured; not asked by the ``exact`` tier
    stock_order  the ``exact`` tier: the references, which are stock's own ATen calls, on any device
    raises       ValueError for an unknown name, RuntimeError naming the reason where an explicit wish cannot be met
    """
    if backend not in ("auto", *BACKENDS):
        accepted = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend={backend!r} is not a backend; accepted are {accepted}")
    if stock_order:
        if backend not in ("auto", "torch"):
            raise RuntimeError(
                f"precision='exact' runs stock's own ATen calls, backend={backend!r} has other kernels; "
                "accepted are 'auto' and 'torch'"
            )
        return reference_ops()
    if quantized:
        tier, alone, why_not_tier, ops = _EIGHT_BITS[quantized]
        reason = why_not_tier(device)
        if reason is None and backend != alone:
            other = f"backend={backend!r} has no kernels for it"
            reason = why_not_auto(alone, device) if backend == "auto" else other
        if reason:
            raise RuntimeError(
                f"precision={tier!r} cannot serve this policy: {reason}; 'auto' takes what can"
            )
        return backend_ops(ops)
    if backend == "auto":
        ready = (name for name in PREFERRED.get(device.type, ()) if why_not_auto(name, device) is None)
        return _ops(next(ready, "torch"), device)
    reason = why_not(backend, device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot serve this policy: {reason}; 'auto' takes what can")
    return _ops(backend, device)


def table(device: torch.device | None = None) -> list[Row]:
    """Op by op and backend by backend: who can serve it here, and why not. For ``device``, the CPU where not given."""
    device = device or torch.device("cpu")
    rows = []
    for name in NAMES:
        for backend in BACKENDS:
            reason = why_not(backend, device) or _why_empty(name, _ops(backend, device))
            rows.append(Row(name, backend, not reason, reason or ""))
    return rows


def _why_empty(op: str, ops: Ops) -> str | None:
    """Why a backend that can serve has no kernel of its own for an op, or None where it has."""
    if getattr(ops, op) is None:
        return "it runs the denoise loop op by op"
    return None if ops.backend == "torch" else ops.missing.get(op)
