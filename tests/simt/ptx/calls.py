"""Every op as the stages call it, with the tiles of SmolVLA's own sizes on smaller ones, under the contract of all backends.

The sizes keep what a compiler specialises on: multiples of 16 stay multiples of 16. Odd ones are for tests/ops.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any
from unittest.mock import patch

import torch
from simt.ptx import launcher
from support.contract import changed, leaves, nan_filled_memory, reference_module, run, widened
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks.compiled import aot
from smolvla_fast.kernels.tiles import Question, recording, using
from smolvla_fast.ops.choice import choose, over
from smolvla_fast.ops.reference.quantize import Quantized, dequantize
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.ops.torch.linear import aten
from smolvla_fast.tune.check import allowance

CPU = torch.device("cpu")
CAPABILITIES = (80, 90)
ORDERS = 5 if os.environ.get("SMOLVLA_FAST_LONG") else 2
"""Of blocks and warps, in which each call is run."""
MOST: dict[str, dict[str, int]] = {
    "linear": dict(rows=80, inputs=320, outputs=144),
    "linear_residual": dict(rows=80, inputs=640, outputs=144),
    "norm_swiglu": dict(rows=80, inputs=320, outputs=144),
    "attention_residual": dict(T=34, S=147, O=144),
    "norm_qkv_rope": dict(T=80, M=320, H=3, K=1),
    "cross_kv": dict(P=80, K=3),
    "pixel_shuffle_linear": dict(side=16, width=96, outputs=144),
    "patch_embed": dict(side=64, width=144),
    "attention": dict(N=1, T=208, H=2),
    "masked_attention": dict(T=48, S=160, H=3, K=1),
    "masked_attention_backward": dict(B=1, T=32, S=80, H=3, K=1),
    "suffix_embed": dict(S=18, E=144, N=3),
    "euler_step": dict(S=5),
    "layer_norm": dict(rows=9),
    "prefix_embed": dict(T=3, L=5, M=272),
    "rope_masks": dict(P=48, S=16),
    "image_prep": dict(h=48, w=64, height=64, width=64),
    "flow_loss": dict(B=2),
}
"""The largest sizes that are run."""


@dataclass(frozen=True)
class Call:
    """One way in which a stage calls an op.

    case    SmolVLA's own sizes      label  what differs from the reference's inputs
    dtypes  as the compiled tables name them
    """

    op: str
    case: tuple[tuple[str, int], ...]
    label: str
    dtypes: str
    capability: int

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.case)
        ways = f" ({self.label})" if self.label else ""
        return f"sm_{self.capability} {self.op} {sizes}{ways} {self.dtypes}"

    def inputs(self, small: bool) -> dict[str, Any]:
        """At SmolVLA's own sizes or at small ones."""
        op, case = self.op, self.case
        found = aot.calls(op, smaller(op, dict(case))) if small else _full_size(op, case)
        return next(given for label, dtypes, given in found if (label, dtypes) == (self.label, self.dtypes))


@lru_cache(maxsize=1)  # one case's calls come one after the other
def _full_size(op: str, case: tuple[tuple[str, int], ...]) -> list[tuple[str, str, dict[str, Any]]]:
    return list(aot.calls(op, dict(case)))


@dataclass(frozen=True)
class Figure:
    """One output: its worst error against fp64, eager's, and what is allowed."""

    output: str
    error: float
    eager: float
    allowed: float


def smaller(op: str, case: dict[str, int]) -> dict[str, int]:
    most = MOST[op]
    if op == "linear" and case["outputs"] > case["inputs"]:  # what has an activation behind it
        most = {**most, "outputs": most["inputs"] + 16}
    if (
        op == "linear_residual" and case["inputs"] == 2048
    ):  # a step of 128 for each of the 8 programs that share K
        most = {**most, "inputs": 1024}
    if op == "masked_attention" and case["T"] == case["S"]:  # a prefix over itself
        most = {**most, "S": most["T"]}
    return {name: min(value, most.get(name, value)) for name, value in case.items()}


def calls(capability: int) -> Iterator[Call]:
    """All of them that have a kernel for this capability."""
    for op, case, _ in aot.tasks(aot.names(), ("90",)):
        for label, dtypes, _ in aot.calls(op, smaller(op, case)):
            if not (dtypes.startswith("fp8") and capability < aot.FIRST_EIGHT_BITS):
                yield Call(op, tuple(case.items()), label, dtypes, capability)


@cache
def questions(call: Call) -> tuple[tuple[Question, ...], bool]:
    """What the launchers ask at SmolVLA's own sizes; whether there is a kernel for these."""
    launched: list[str] = []

    def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(self.__name__)

    with (
        launcher.machine(call.capability), recording() as asked, patch.object(JITFunction, "run", nothing)
    ):  # fmt: skip
        aot.call(call.op, call.inputs(small=False))
    return tuple(asked), bool(launched)


def run_of(call: Call) -> Hashable:
    """All that a run depends on: where it is equal, calls of different sizes are one run at the sizes that are run."""
    asked, has_kernel = questions(call)
    sizes = smaller(call.op, dict(call.case))
    tiles = tuple((type(each.tiles[0]), each.tiles[0]) for each in asked)
    return call.op, tuple(sizes.items()), call.label, call.dtypes, call.capability, tiles, has_kernel


def judged(call: Call) -> list[Figure]:
    """Runs a call in several orders. Empty where torch serves it.

    raises  AssertionError where bits differ, memory is left unwritten, or an error is more than twice eager's and what
            rounding alone may add
    """
    asked, has_kernel = questions(call)
    if not has_kernel:
        return []
    with launcher.machine(call.capability), ExitStack() as stack:
        for question in reversed(asked):
            stack.enter_context(using(question.tiles[0]))
        inputs = call.inputs(small=True)
        wide = widened(changed(inputs, {n: dequantize(x, torch.float64) for n, x in _eight_bits(inputs)}))
        # Eager rounds rows that are wider than their weight to its dtype; of 8-bit weights the reference has the emulation.
        eager_ops = reference_ops() if _eight_bits(inputs) else _torch()
        truth, eager = _run(reference_ops(), call.op, wide), _run(eager_ops, call.op, inputs)
        ours, *others = (_poisoned(call.op, inputs) for _ in range(ORDERS))
    found = []
    for name, want in truth.items():
        got = ours[name]
        assert got.shape == want.shape and not got.isnan().any(), f"{name} has memory that was not written"
        if not _eight_bits(inputs):  # whose reference works in fp32
            assert got.dtype == eager[name].dtype, f"{name} is {got.dtype}, eager's is {eager[name].dtype}"
        for other in others:
            assert torch.equal(got, other[name]), f"{name} has other bits in another order"
        error, plain = ((x[name].double() - want).abs().max().item() for x in (ours, eager))
        # A GPU adds up the K terms of an fp32 product in one chain; MKL, which is eager here, in several: twice the walk.
        allowed = 2 * plain + allowance(want, got.dtype, 4 * _terms(inputs))
        assert error <= allowed, (
            f"{name} is off by {error:.3g}, eager by {plain:.3g}, allowed is {allowed:.3g}"
        )
        found.append(Figure(name, error, plain, allowed))
    return found


def _torch() -> Any:
    return replace(backend_ops("torch"), **over(aten))


def _run(ops: Any, op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    if op == "flow_loss":
        v = inputs["v"].detach().clone().requires_grad_()
        loss = ops.flow_loss(**{**inputs, "v": v})
        (gradient,) = torch.autograd.grad(loss.sum(), [v])
        return {"loss": loss.detach(), "gradient": gradient}
    if op == "masked_attention_backward":
        from smolvla_fast.kernels import masked_attention_backward as kernels
        from smolvla_fast.ops.reference.masked_attention_backward import masked_attention_backward

        own = ops.backend == "triton"
        function = kernels.masked_attention_backward if own else masked_attention_backward
        return dict(zip(("dq", "dk", "dv"), function(**inputs), strict=True))
    if op == "norm_qkv_rope":
        slots = inputs["slots"] and tuple(torch.full_like(each, torch.nan) for each in inputs["slots"])
        q = ops.norm_qkv_rope(**{**inputs, "slots": slots})
        named = {"q": q, **dict(zip("kv", slots or (), strict=False))}
        return {name: each for name, each in named.items() if each is not None}
    if (
        getattr(ops, op) is None
    ):  # one backend alone has it: its reference is what the others do, in their dtypes
        ops = replace(ops, **{op: getattr(reference_module(op), op)})
    with torch.no_grad():
        return run(ops, op, inputs)


def _poisoned(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    with nan_filled_memory("cpu"):
        return _run(choose(backend_ops("triton"), CPU, "triton", None), op, inputs)


def _eight_bits(inputs: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, x) for name, x in leaves(inputs).items() if isinstance(x, Quantized)]


def _terms(inputs: dict[str, Any]) -> int:
    """Of all sums that meet in an output: gate and up are two."""
    matrices = [x for name, x in leaves(inputs).items() if "weight" in name]
    widths = [x.shape[-1] for x in matrices if isinstance(x, Tensor) and x.ndim == 2]
    together = 2 if {"gate_weight", "up_weight"} <= inputs.keys() else 1
    return together * max(widths, default=1)
