"""The op contract, on this device and these operands: the worst error against fp64 is at most twice eager torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..ops.choice import over
from ..ops.reference import ops as reference
from ..ops.shape_class import Attention, Product, Rows, Shape
from ..ops.torch import suffix, vision
from ..ops.torch.linear import aten
from ..ops.torch.masked_attention import visible
from .recorder import Call, Recorded

Outputs = dict[str, Tensor]


def allowance(want: Tensor, dtype: torch.dtype, terms: int) -> float:
    """What rounding alone may add to twice eager's error: one unit in the last place of the largest value.

    terms  K of the longest sum      dtype  that results are rounded to
    Eager is sometimes exact, and twice nothing is nothing. In fp32 it is sqrt(K)/8 units for K > 64: oneDNN adds up one
    chain an output where MKL, which serves eager, adds up several, and the rounding errors of a chain walk at random.
    """
    chain = max(1.0, terms**0.5 / 8) if dtype is torch.float32 else 1.0
    return float(torch.finfo(dtype).eps * want.abs().max() * chain) if want.numel() else 0.0


class Contract:
    """Of one shape class: the truth, and what a candidate may be off.

    A quantised product has no truth in fp64: eager torch with the same integers or floats stands in, and a candidate may be
    twice as far from it as the default.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._shape, self._call = recorded.shape, recorded.calls[0]
        choice, shape = recorded.choice, recorded.shape
        self._default = outputs(choice.op, choice.function(choice.default(shape)), self._call, prepared=True)
        quantised = isinstance(shape, Product) and not isinstance(shape.dtype, torch.dtype)
        # Rows of another dtype than their weight are no operands of eager torch: its linear is given them rounded.
        mixed = isinstance(shape, Product) and not quantised and shape.x != shape.dtype
        plain = over(aten).get(choice.op) if mixed else None
        eager = outputs(choice.op, plain or _reference(choice.op), self._call)
        if quantised:
            self._truth, measured = eager, self._default
        else:
            self._truth, measured = outputs(choice.op, _reference(choice.op), _widened(self._call)), eager
        dtype, terms = _narrowest(shape), shape.inputs if isinstance(shape, Product) else 1
        self._allowed = {
            name: 2 * _off(measured[name], want) + allowance(want, dtype, terms)
            for name, want in self._truth.items()
        }

    def judge(self, op: str, function: Callable[..., Any]) -> tuple[float, float, str | None]:
        """error, allowed and why it is refused: of the output that is worst beside what it may be off."""
        found = outputs(op, function, self._call, prepared=True)
        worst = (0.0, 0.0, None)
        for name, want in self._truth.items():
            got, default = found[name], self._default[name]
            if got.shape != want.shape or got.dtype != default.dtype:
                wanted = f"{tuple(want.shape)} {default.dtype}"
                return float("nan"), 0.0, f"{name} is {tuple(got.shape)} {got.dtype}, not {wanted}"
            error, allowed = _off(got, want), self._allowed[name]
            if not error <= allowed:  # so written that NaN is refused
                return error, allowed, f"{name} is off by {error:.2g}, allowed is {allowed:.2g}"
            if error * worst[1] >= worst[0] * allowed:
                worst = (error, allowed, None)
        return worst


def outputs(op: str, function: Callable[..., Any], call: Call, prepared: bool = False) -> Outputs:
    """All that a call returns or writes, on the CPU; its operands stay as they are.

    prepared  with the rows that were prepared of x, where there are: some candidates take no others
    """
    call = call.fresh()
    kwargs = {name: each for name, each in call.kwargs.items() if name not in ("memory", "out")}
    if prepared:
        kwargs |= {name: each for name, each in call.hints.items() if name == "normed"}
    found = function(*call.args, **kwargs)
    named = {f"y{i}": each for i, each in enumerate(found if isinstance(found, tuple) else (found,))}
    slots = call.args[4] if op == "norm_qkv_rope" else None
    if slots is not None:
        named |= {"k": slots[0], "v": slots[1]}
    return {name: each.detach().cpu() for name, each in named.items() if isinstance(each, Tensor)}


def _reference(op: str) -> Callable[..., Any]:
    if op == "suffix_embed":
        # The fold is the backend's own; after it the plain product is as good a truth.
        return partial(suffix.suffix_embed, linear=aten)
    if op == "layer_norm":
        return vision.layer_norm  # torch's own, which takes a weight of another dtype than x too
    function = getattr(reference, op)
    if op not in ("masked_attention", "attention_residual"):
        return function
    return lambda q, k, v, mask, *more: function(q, k, v, visible(mask), *more)


def _widened(call: Call) -> Call:
    return Call(*tree_map(_wide, (call.args, call.kwargs)))


def _wide(value: Any) -> Any:
    """In fp64 and on the CPU: not every device has fp64."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.double() if value.is_floating_point() else value
    if isinstance(value, torch.dtype):
        return torch.float64
    return value


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max()) if want.numel() else 0.0


def _narrowest(shape: Shape) -> torch.dtype:
    """The dtype that results are rounded to, at the least exact."""
    dtypes: tuple[Any, ...] = (torch.float32,)
    if isinstance(shape, Product):
        dtypes = (shape.dtype, shape.x)
    elif isinstance(shape, Attention):
        dtypes = (shape.q, shape.kv)
    elif isinstance(shape, Rows):
        dtypes = (shape.out,)
    floats = [each for each in dtypes if isinstance(each, torch.dtype) and each.is_floating_point]
    return max((*floats, torch.float32), key=lambda each: torch.finfo(each).eps)
