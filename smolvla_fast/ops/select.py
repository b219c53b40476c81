"""Which backend serves which op, and why a cell of the table is empty."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch

from .availability import PREFERRED, why_not, why_not_auto, why_not_fp8, why_not_int8, why_not_int16
from .choice import choose
from .plan import LOOP, Plan
from .table import NAMES, Ops, derive, exports

BACKENDS = ("torch", "cpu", "triton", "cuda")
_MODULES = {
    "reference": ("reference.ops", None),
    "torch": ("torch.ops", "reference"),
    "cpu": ("cpu.ops", "torch"),
    "integers": ("cpu.integer_ops", "cpu"),
    "triton": ("triton.ops", "torch"),
}
"""Of each table: the module whose functions are its ops, and the table that serves what this one does not have. A module is
imported when its table is first asked for: nothing has to import Triton to run on a CPU."""


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{_MODULES[name][0]}")


@cache
def backend_ops(name: str) -> Ops:
    """The table of "reference", "torch", "cpu", "integers" (backend ``cpu`` with products of these) or "triton": each op by
    the backend's own function where it has one, whatever the shape."""
    below = _MODULES[name][1]
    backend = "cpu" if name == "integers" else name
    return derive(backend, _module(name), None if below is None else backend_ops(below))


def reference_ops() -> Ops:
    return backend_ops("reference")


def _cuda(device: torch.device, plan: Plan | None) -> Ops:
    """CUDA C++ where there is a kernel, all the rest by Triton, or by torch where that cannot serve."""
    from .cuda import library, linear_residual, masked_attention, prepared_rows
    from .cuda import ops as module

    fallback = "triton" if device.type == "cuda" and why_not("triton", device) is None else "torch"
    below = choose(backend_ops(fallback), device, fallback, plan)
    attention = masked_attention.masked_attention_or_fallback(below.masked_attention, below.prepare_mask)
    product, no_clusters = below.linear_residual, linear_residual.why_no_clusters(device)
    if no_clusters is None:
        product = library.or_fallback(
            linear_residual.linear_residual, linear_residual.why_not_few_rows, product
        )
    ops = derive("cuda", module, below, fallback=below, masked_attention=attention, linear_residual=product)
    if no_clusters is not None:
        ops.missing["linear_residual"] = no_clusters
    if fallback == "triton":
        no_products = prepared_rows.why_no_norm_products(device)
        among = "the kernel of 'triton' serves it, of prepared rows one of CUDA C++ in Triton's table"
        ops.missing.update(dict.fromkeys(("norm_qkv_rope", "norm_swiglu"), no_products or among))
    by_ops = plan is not None and plan.choices.get(LOOP) == "ops"
    return replace(ops, denoise_persistent=None) if by_ops else ops


@dataclass(frozen=True)
class Cell:
    """One cell of the table, as ``smolvla-fast doctor`` prints it."""

    op: str
    backend: str
    available: bool
    reason: str


def _ops(backend: str, device: torch.device, wish: str = "", plan: Plan | None = None) -> Ops:
    """The table of a backend that can serve this device. ``wish``: the backend asked for, where that is not ``backend``."""
    if backend == "cuda":
        return _cuda(device, plan)
    return choose(backend_ops(backend), device, wish or backend, plan)


_QUANTIZED = {
    "e4m3": ("fp8", "triton", why_not_fp8, "triton"),
    "int8": ("int8", "cpu", why_not_int8, "integers"),
    "int16": ("int16", "cpu", why_not_int16, "integers"),
}
"""Of each kind of quantised matrices: the tier, the one backend that has kernels for it, why not here, its ops."""


def why_not_quantized(device: torch.device) -> dict[str, str | None]:
    """Of each tier with quantised matrices: why ``auto`` cannot serve it on this device, or None."""
    return {
        tier: reason(device) or why_not_auto(alone, device) for tier, alone, reason, _ in _QUANTIZED.values()
    }


def check_name(backend: str) -> None:
    """ValueError for an unknown one."""
    if backend not in ("auto", *BACKENDS):
        accepted = ", ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"backend={backend!r} is not a backend; accepted are {accepted}")


def select(
    backend: str,
    device: torch.device,
    stock_order: bool,
    quantized: str | None = None,
    plan: Plan | None = None,
) -> Ops:
    """The ops for a wish.

    backend      "auto": on a CPU "cpu", on an NVIDIA GPU "triton", and "torch" where these cannot serve or were never
                 measured ahead of it; or a name. "cuda" has to be named: it was measured once, and not against what "auto"
                 takes now (docs/gpu.md)
    quantized    "e4m3", the tier ``fp8``, which Triton's kernels alone serve, or "int8" or "int16", which backend ``cpu``
                 alone does
    stock_order  the ``exact`` tier: the references, which are stock's own ATen calls, on any device, whatever the plan
    plan         who computes what, as it was measured; where it says nothing, ``defaults.py``
    raises       ValueError for an unknown name, RuntimeError naming the reason where an explicit wish cannot be met
    """
    check_name(backend)
    if stock_order:
        if backend not in ("auto", "torch"):
            raise RuntimeError(
                f"precision='exact' runs stock's own ATen calls, backend={backend!r} has other kernels; "
                "accepted are 'auto' and 'torch'"
            )
        return reference_ops()
    if quantized:
        tier, alone, why_not_tier, ops = _QUANTIZED[quantized]
        reason = why_not_tier(device)
        if reason is None and backend != alone:
            other = f"backend={backend!r} has no kernels for it"
            reason = why_not_auto(alone, device) if backend == "auto" else other
        if reason:
            raise RuntimeError(
                f"precision={tier!r} cannot serve this policy: {reason}; 'auto' takes what can"
            )
        if ops != "integers":
            return choose(backend_ops(ops), device, alone, plan)
        from .cpu.int8_attention import Heads

        chosen = choose(backend_ops(ops), device, alone, plan, exports(_module(ops)))
        bits = int(quantized.removeprefix("int"))
        return replace(chosen, heads=Heads(bits, chosen.attention, chosen.masked_attention))
    if backend == "auto":
        ready = (name for name in PREFERRED.get(device.type, ()) if why_not_auto(name, device) is None)
        return _ops(next(ready, "torch"), device, "auto", plan)
    reason = why_not(backend, device)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot serve this policy: {reason}; 'auto' takes what can")
    return _ops(backend, device, plan=plan)


def table(device: torch.device | None = None) -> list[Cell]:
    """Op by op and backend by backend: who can serve it here, and why not. For ``device``, the CPU where not given."""
    device = device or torch.device("cpu")
    cells = []
    for name in NAMES:
        for backend in BACKENDS:
            reason = why_not(backend, device) or _why_empty(name, _ops(backend, device))
            cells.append(Cell(name, backend, not reason, reason or ""))
    return cells


def _why_empty(op: str, ops: Ops) -> str | None:
    """Why a backend that can serve has no kernel of its own for an op, or None where it has."""
    if getattr(ops, op) is None:
        apart = "attention and its output projection" if op == "attention_residual" else "the denoise loop"
        return f"it runs {apart} op by op"
    return None if ops.backend == "torch" else ops.missing.get(op)
