"""Rows prepared for a norm without the op that prepares them, and the kernels of CUDA C++ that take no others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from smolvla_fast.ops.cuda.norm_qkv_rope import norm_qkv_rope
from smolvla_fast.ops.cuda.norm_swiglu import norm_swiglu
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.table import Ops


def prepared(x: Tensor, weight: Tensor, part: int = 64) -> NextNorm:
    """In bf16, with sums of squares over so many columns each."""
    width = x.shape[-1]
    hint = NextNorm(weight, torch.bfloat16, (x.float() * weight.float()).bfloat16())
    squares = torch.nn.functional.pad(x.float().square().reshape(-1, width), (0, -width % part))
    hint.squares = squares.unflatten(1, (-1, part)).sum(2).T.contiguous()
    return hint


def by_prepared_rows(ops: Ops, settled: bool = False) -> Ops:
    """The table with both kernels in it, each behind the preparation.

    settled  weights are parameters, as a model's: kernels ask for them before the launches ahead have ended
    """

    def own(weight: Tensor | None) -> Tensor | None:
        return nn.Parameter(weight, requires_grad=False) if settled and weight is not None else weight

    def swiglu(x: Tensor, norm: tuple[Tensor, float], gate_weight: Tensor, up_weight: Tensor) -> Tensor:
        return norm_swiglu(x, norm, own(gate_weight), own(up_weight), normed=prepared(x, norm[0]))

    def qkv_rope(x: Tensor, norm: tuple[Tensor, float], weights: Any, rope: Any, slots: Any) -> Any:
        given = tuple(map(own, weights))
        return norm_qkv_rope(x, norm, given, rope, slots, normed=prepared(x, norm[0]))  # type: ignore[arg-type]

    return replace(ops, norm_swiglu=swiglu, norm_qkv_rope=qkv_rope)
