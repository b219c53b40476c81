"""What every op must satisfy, on every backend that serves it.

The worst error against the reference in fp64 is at most twice the error of eager torch (the reference itself) in the same
dtype, plus one unit in the last place: eager is sometimes exact, and twice nothing is nothing. In fp32 the last term is
sqrt(K)/8 units for a sum of K > 64 terms: oneDNN adds up one chain an output where MKL, which serves eager, adds up
several, and the rounding errors of a chain walk at random. Both numbers are shown.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

OPS = (
    "image_prep",
    "patch_embed",
    "layer_norm",
    "linear",
    "attention",
    "pixel_shuffle_linear",
    "norm_qkv_rope",
    "masked_attention",
    "cross_kv",
    "linear_residual",
    "norm_swiglu",
    "suffix_embed",
    "euler_step",
    "flow_loss",
)


def room(op: str) -> Any:
    """The reference module of an op: its function, CASES, make_inputs and cost."""
    return importlib.import_module(f"smolvla_fast.ops.reference.{op}")


def run(ops: Any, op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """One op of a backend on prepared inputs: every tensor it returns or writes, by name."""
    inputs = dict(inputs)
    if op == "suffix_embed":
        names = ("times", "in_weight", "in_bias", "mlp_in_weight", "mlp_in_bias")
        folded = ops.suffix_fold(*(inputs.pop(name) for name in names))
        x, rest = inputs.pop("x"), inputs.values()
        steps = range(3)
        return {f"y{step}": ops.suffix_embed(x, step, folded, *rest) for step in steps}
    if op == "masked_attention":
        inputs["mask"] = ops.prepare_mask(inputs["mask"])
    if op == "norm_qkv_rope":
        k, v = (torch.full_like(inputs[name], torch.nan) for name in ("k_out", "v_out"))
        return {"q": ops.norm_qkv_rope(**{**inputs, "k_out": k, "v_out": v}), "k": k, "v": v}
    out = getattr(ops, op)(**inputs)
    return {f"y{i}": y for i, y in enumerate(out)} if isinstance(out, tuple) else {"y": out}


def inputs_in(
    op: str, case: dict[str, int], dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same numbers in ``dtype`` and widened to fp64."""
    module = room(op)
    narrow = module.make_inputs(case, dtype, torch.Generator().manual_seed(seed))
    return narrow, {name: _widen(value) for name, value in narrow.items()}


def _widen(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, tuple):
        kind = type(value)
        items = [_widen(item) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value


def _chain(inputs: dict[str, Any]) -> float:
    terms = max(
        (w.shape[-1] for name, w in inputs.items() if name.endswith("weight") and w is not None), default=1
    )
    return max(1.0, terms**0.5 / 8)


def to_device(value: Any, device: torch.device | str) -> Any:
    """Prepared inputs, or anything in them, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        moved = [to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return value


def poison(device: torch.device | str) -> None:
    """Leave NaN in the memory that the next allocations on a GPU get: what a kernel does not write then shows."""
    if torch.device(device).type == "cuda":
        for size in (2**12, 2**16, 2**20, 2**24):
            held = [torch.full((size,), torch.nan, device=device) for _ in range(8)]
            del held


def check(
    reference: Any,
    ops: Any,
    op: str,
    case: dict[str, int],
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Assert the contract for one op, backend, case, dtype and device; ``reference`` is the room-1 backend.

    Ours and eager run on the device, the truth in fp64 on the CPU.
    """
    narrow, wide = inputs_in(op, case, dtype, seed)
    truth, there = run(reference, op, wide), to_device(narrow, device)
    eager = {name: value.cpu() for name, value in run(reference, op, there).items()}
    poison(device)
    ours = {name: value.cpu() for name, value in run(ops, op, there).items()}
    poison(device)
    again = {name: value.cpu() for name, value in run(ops, op, there).items()}
    assert truth.keys() == ours.keys()
    for name, want in truth.items():
        assert ours[name].shape == want.shape
        assert not ours[name].isnan().any(), f"{op}.{name} left memory unwritten"
        assert torch.equal(ours[name], again[name]), f"{op}.{name} gives other bits the second time"
        error, eager_error = ((x[name].double() - want).abs().max().item() for x in (ours, eager))
        ulp = (
            torch.finfo(dtype).eps
            * want.abs().max().item()
            * (_chain(narrow) if dtype is torch.float32 else 1)
        )
        print(f"{op} {case} {dtype} {name}: error {error:.3g}, eager {eager_error:.3g}")
        assert error <= 2 * eager_error + ulp, (
            f"{op}.{name} {case}: {error:.3g} against eager's {eager_error:.3g}"
        )
