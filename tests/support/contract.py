"""What every op must satisfy, on every backend that serves it.

The worst error against the reference in fp64 is at most twice the error of eager torch (the reference itself) in the same
dtype, plus what rounding alone may add (``tune.check.allowance``). Both numbers are shown.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from smolvla_fast.ops.table import NAMES, STAGES
from smolvla_fast.tune.check import allowance
from support import triton_by

# Three are called with another op; attention_with_grad has tests of its own (test_training_ops.py), and so has what only
# one backend has: attention_residual, and denoise_persistent, which is a stage.
ONE_BACKENDS = {"attention_residual", "denoise_persistent"}
HELPERS = {"prepare_mask", "suffix_fold", "attention_with_grad", "flow_point", *ONE_BACKENDS}
OPS = tuple(sorted(set(NAMES) - HELPERS, key=lambda name: (name not in STAGES["denoise"], NAMES.index(name))))
"""Those of the denoise loop first: on a GPU, where time may run out, they are what a chunk waits for."""


RECORDS = {
    "norm": ("weight", "eps"),
    "weights": ("q", "k", "v"),
    "slots": ("k", "v"),
    "action_in": ("weight", "bias"),
    "time_in": ("weight", "bias"),
    "time_out": ("weight", "bias"),
    "action_out": ("weight", "bias"),
    "projection": ("weight", "bias"),
}
"""The inputs of ops that are several values, and what these are called: ``norm.eps``."""


def sizes(case: dict[str, int]) -> str:
    """A case as the name of a test's parameter."""
    return "-".join(f"{name}{value}" for name, value in case.items())


def in_dtypes(cases: Iterable[dict[str, int]], everywhere: Container[dict[str, int]]) -> list[Any]:
    """Parameters (case, dtype): every case in fp32, those that are ``everywhere`` in bf16 as well, or in fp16.

    Other pairs are for `make test-full`: Triton compiles a kernel for each.
    """
    return [
        pytest.param(
            case,
            dtype,
            marks=[
                *(triton_by.BF16 if dtype is torch.bfloat16 else []),
                *(triton_by.FP16 if dtype is torch.float16 else []),
                *[pytest.mark.long] * (dtype is not torch.float32 and case not in everywhere),
            ],
            id=f"{sizes(case)}-{dtype}",
        )
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for case in cases
    ]


def reference_module(op: str) -> Any:
    """The reference module of an op: its function, CASES, make_inputs and cost."""
    return importlib.import_module(f"smolvla_fast.ops.reference.{op}")


def call_of(ops: Any, op: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """A call of the op, with everything done that a chunk does once for all its calls; suffix_embed's takes the step."""
    inputs = dict(inputs)
    if op == "suffix_embed":
        folded = ops.suffix_fold(*(inputs.pop(name) for name in ("times", "action_in", "time_in")))
        return lambda step=1: ops.suffix_embed(inputs["x"], step, folded, inputs["time_out"])
    if op == "masked_attention":
        inputs["mask"] = ops.prepare_mask(inputs["mask"])
    return partial(getattr(ops, op), **inputs)


def run(ops: Any, op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """One op of a backend on prepared inputs: every tensor it returns or writes, by name; masks as numbers 0 and 1."""
    if op == "norm_qkv_rope":
        k, v = (torch.full_like(slot, torch.nan) for slot in inputs["slots"])
        return {"q": ops.norm_qkv_rope(**{**inputs, "slots": (k, v)}), "k": k, "v": v}
    call = call_of(ops, op, inputs)
    out = tuple(map(call, range(3))) if op == "suffix_embed" else call()
    if op == "rope_masks":
        out = tuple(each for (sin, cos), mask in out for each in (sin, cos, mask))
    out = out if isinstance(out, tuple) else (out,)
    found = {f"y{i}" if len(out) > 1 else "y": y for i, y in enumerate(out)}
    return {name: y.float() if y.dtype is torch.bool else y for name, y in found.items()}


def inputs_in(
    op: str, case: dict[str, int], dtype: torch.dtype, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same numbers in ``dtype`` and widened to fp64."""
    module = reference_module(op)
    narrow = module.make_inputs(case, dtype, torch.Generator().manual_seed(seed))
    return narrow, widened(narrow)


def widened(value: Any) -> Any:
    """Prepared inputs, or anything in them: the same numbers in fp64."""
    if isinstance(value, dict):
        return {name: widened(each) for name, each in value.items()}
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, tuple):
        kind = type(value)
        items = [widened(item) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    return value


def _terms(inputs: dict[str, Any]) -> int:
    """Of the longest sum: that of a matrix, which is an input called a weight or in a record with its norm or bias."""
    matrices = [value for name, value in inputs.items() if name.endswith("weight")]
    records = [value for value in inputs.values() if isinstance(value, tuple)]
    matrices += [each for record in records for each in record if isinstance(each, Tensor) and each.ndim == 2]
    return max((each.shape[-1] for each in matrices), default=1)


def leaves(inputs: dict[str, Any]) -> dict[str, Any]:
    """Prepared inputs with their records taken apart: ``norm.weight``, ``norm.eps``."""
    found = {name: value for name, value in inputs.items() if name not in RECORDS}
    for record, names in RECORDS.items():
        if inputs.get(record) is not None:
            found |= {f"{record}.{name}": each for name, each in zip(names, inputs[record], strict=True)}
    return found


def changed(inputs: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Prepared inputs with some of their ``leaves`` replaced."""
    found = {name: value for name, value in changes.items() if "." not in name}
    for record, names in RECORDS.items():
        if any(name.startswith(f"{record}.") for name in changes):
            pairs = zip(names, inputs[record], strict=True)
            found[record] = tuple(changes.get(f"{record}.{name}", before) for name, before in pairs)
    return {**inputs, **found}


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


Change = Callable[[Tensor], Tensor]


def mapped(value: Any, floats: Change, others: Change = Tensor.clone) -> Any:
    """The value with every tensor in it changed, floating ones and others, through containers and dataclasses."""
    if isinstance(value, Tensor):
        return floats(value) if value.is_floating_point() else others(value)
    if isinstance(value, dict):
        return {name: mapped(item, floats, others) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(item, floats, others) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{each.name: mapped(getattr(value, each.name), floats, others) for each in fields(value)}
        )
    return value


@contextmanager
def nan_filled_memory(device: torch.device | str) -> Iterator[None]:
    """Inside, memory that torch gives out unwritten holds NaN: what a kernel does not write then shows.

    On a CPU torch fills it (``torch.utils.deterministic.fill_uninitialized_memory``). On a GPU, where that would be a launch
    beside each kernel, NaN is left in the memory that the next allocations get.
    """
    if torch.device(device).type == "cuda":
        for size in (2**12, 2**16, 2**20, 2**24):
            held = [torch.full((size,), torch.nan, device=device) for _ in range(8)]
            del held
        yield
        return
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(
    reference: Any,
    ops: Any,
    op: str,
    case: dict[str, int],
    dtype: torch.dtype,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Assert the contract for one op, backend, case, dtype and device; ``reference`` is the table of the references.

    All three run on the device, the truth in fp64: a GPU computes in milliseconds what takes a CPU seconds.
    """
    narrow, wide = inputs_in(op, case, dtype, seed)
    there, before = to_device(narrow, device), triton_by.launches()
    truth = {name: value.cpu() for name, value in run(reference, op, to_device(wide, device)).items()}
    eager = {name: value.cpu() for name, value in run(reference, op, there).items()}
    with nan_filled_memory(device):
        ours = {name: value.cpu() for name, value in run(ops, op, there).items()}
    with nan_filled_memory(device):
        again = {name: value.cpu() for name, value in run(ops, op, there).items()}
    assert truth.keys() == ours.keys()
    for name, want in truth.items():
        assert ours[name].shape == want.shape
        assert not ours[name].isnan().any(), f"{op}.{name} left memory unwritten"
        assert torch.equal(ours[name], again[name]), f"{op}.{name} gives other bits the second time"
        error, eager_error = ((x[name].double() - want).abs().max().item() for x in (ours, eager))
        # A GPU adds up the K terms of an fp32 product in one chain; MKL, which is eager here, in several: twice the walk.
        chain = 4 if triton_by.launches() > before else 1
        ulp = allowance(want, dtype, chain * _terms(narrow))
        print(f"{op} {case} {dtype} {name}: error {error:.3g}, eager {eager_error:.3g}")
        assert error <= 2 * eager_error + ulp, (
            f"{op}.{name} {case}: {error:.3g} against eager's {eager_error:.3g}"
        )
