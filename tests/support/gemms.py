"""The Triton kernels around matrix products as tests call them, beside the torch backend's ops."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from smolvla_fast.kernels import tuning
from smolvla_fast.ops.torch import decoder, vision
from smolvla_fast.ops.torch import linear as aten_linear
from support import triton_by
from support.contract import inputs_in, reference_module, to_device
from support.guarded import DEVICE, guarded

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = (
    "linear",
    "linear_residual",
    "norm_swiglu",
    "norm_qkv_rope",
    "cross_kv",
    "pixel_shuffle_linear",
    "patch_embed",
)
# Under Triton's interpreter products of bf16 are broken, so there fp16 stands for both.
DTYPES = pytest.mark.parametrize(
    "dtype",
    [F32, pytest.param(F16, marks=triton_by.FP16), pytest.param(BF16, marks=triton_by.BF16)],
    ids=str,
)
OPS = pytest.mark.parametrize("op", NAMES)
ATEN = SimpleNamespace(
    linear=aten_linear.linear,
    linear_residual=decoder.linear_residual,
    norm_swiglu=decoder.norm_swiglu,
    norm_qkv_rope=decoder.norm_qkv_rope,
    cross_kv=decoder.cross_kv,
    pixel_shuffle_linear=vision.pixel_shuffle_linear,
    patch_embed=vision.patch_embed,
)


def module(op: str) -> ModuleType:
    return importlib.import_module(f"smolvla_fast.kernels.{op}")


def _launcher(op: str) -> Callable[..., Any]:
    """Its outputs and partial sums between guards, its inputs anywhere; keys and values come back where they were."""
    kernel = guarded(getattr(module(op), op))

    def call(*args: Any, **kwargs: Any) -> Any:
        there = to_device(kwargs, DEVICE)
        out = kernel(*args, **there)
        for slot, written in zip(kwargs.get("slots") or (), there.get("slots") or (), strict=True):
            slot.copy_(written)
        return out

    return call


TRITON = SimpleNamespace(**{op: _launcher(op) for op in NAMES})


def with_tile(monkeypatch: pytest.MonkeyPatch, op: str, **changes: int) -> None:
    """Let the launcher take the tuned tile with these changes."""
    chosen = tuning.gemm_tile
    monkeypatch.setattr(
        module(op), "gemm_tile", lambda *args, **kwargs: chosen(*args, **kwargs)._replace(**changes)
    )


def inputs_of(op: str, dtype: torch.dtype = F32, case: dict[str, int] | None = None, **changes: Any) -> Any:
    return {**inputs_in(op, case or reference_module(op).CASES[-1], dtype, seed=3)[0], **changes}


def assert_no_worse(ours: Any, eager: Any, truth: Any, dtype: torch.dtype) -> None:
    """As in ``contract.check``: at most twice eager's worst error, plus a unit in the last place, for eager may be exact."""
    assert ours.keys() == truth.keys()
    for name, want in truth.items():
        error, eager_error = ((x[name].double() - want).abs().max().item() for x in (ours, eager))
        ulp = torch.finfo(dtype).eps * want.abs().max().item()
        assert error <= 2 * eager_error + ulp, f"{name}: {error:.3g} against eager's {eager_error:.3g}"
