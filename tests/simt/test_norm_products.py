"""norm_swiglu and norm_qkv_rope of prepared rows: the op contract, equal bits in every order, and nothing that idles."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.contract import inputs_in, nan_filled_memory, widened
from torch import Tensor, nn

from smolvla_fast.ops.cuda.norm_qkv_rope import norm_qkv_rope
from smolvla_fast.ops.cuda.norm_swiglu import norm_swiglu
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.reference.rope import apply_rope
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.tune.check import allowance

CPU = torch.device("cpu")
SWIGLU = {
    "one of all": dict(rows=1, inputs=8, outputs=4),
    "part of a second tile": dict(rows=5, inputs=72, outputs=20),
    "a width of SmolVLA": dict(rows=50, inputs=720, outputs=36),
    "two row tiles": dict(rows=65, inputs=200, outputs=16),
    "more parts than a row's lanes take at once": dict(rows=3, inputs=1024, outputs=4),
}
QKV = {
    "one of all": dict(B=1, T=1, M=8, H=1, K=1, D=4),
    "samples, and a head of half a tile more": dict(B=2, T=7, M=72, H=3, K=2, D=20),
    "a width of SmolVLA": dict(B=1, T=50, M=720, H=1, K=1, D=16),
    "two row tiles": dict(B=5, T=13, M=40, H=1, K=1, D=16),
}
OPS = [*(("norm_swiglu", case) for case in SWIGLU), *(("norm_qkv_rope", case) for case in QKV)]
ONCE = 2**-8
"""Relative: one rounding to bf16 is half of it, and what sums in fp32 leave is far below the other half."""
SUMS = 2**-20
"""Of the sum of all terms' sizes: sums of up to 1024 terms in fp32, whose errors are at most a few units of the largest."""


class Given(NamedTuple):
    op: str
    inputs: dict[str, Any]
    hint: NextNorm

    def run(self) -> dict[str, Tensor]:
        """All that the kernel returns or writes, into memory that holds NaN."""
        inputs = dict(self.inputs)
        with nan_filled_memory(CPU):
            if self.op == "norm_swiglu":
                return {"y": norm_swiglu(**inputs, normed=self.hint)}
            slots = inputs["slots"] and tuple(torch.full_like(slot, torch.nan) for slot in inputs["slots"])
            q = norm_qkv_rope(**{**inputs, "slots": slots}, normed=self.hint)
        found = {} if q is None else {"q": q}
        return found if slots is None else found | {"k": slots[0], "v": slots[1]}


def given(
    op: str, case: str, settled: bool = True, slots: torch.dtype | None = torch.bfloat16, queries: bool = True,
    part: int = 64,
) -> Given:  # fmt: skip
    """A stream in fp32 with outliers, its rows prepared in bf16, and squares over so many columns each."""
    sizes = (SWIGLU if op == "norm_swiglu" else QKV)[case]
    inputs, _ = inputs_in(op, sizes, torch.bfloat16, 0)
    x, (weight, eps) = inputs["x"].float(), inputs["norm"]
    x[..., ::11] *= 50

    def matrix(weight: Tensor) -> Tensor:
        weight[0, 0] = 40.0
        return nn.Parameter(weight, requires_grad=False) if settled else weight

    if op == "norm_swiglu":
        inputs |= {name: matrix(inputs[name]) for name in ("gate_weight", "up_weight")}
    else:
        q, k, v = map(matrix, inputs["weights"])
        inputs["weights"] = (q if queries else None, *((None, None) if slots is None else (k, v)))
        inputs["slots"] = None if slots is None else tuple(each.to(slots) for each in inputs["slots"])
    hint = NextNorm(weight, torch.bfloat16, (x * weight.float()).bfloat16())
    width = x.shape[-1]
    squares = torch.nn.functional.pad(x.square().view(-1, width), (0, -width % part))
    hint.squares = squares.unflatten(1, (-1, part)).sum(2).T.contiguous()
    return Given(op, {**inputs, "x": x, "norm": (weight, eps)}, hint)


def of(ops: Any, each: Given, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What another backend makes of the stream itself."""
    if inputs.get("slots") is not None:
        inputs = {**inputs, "slots": tuple(torch.full_like(slot, torch.nan) for slot in inputs["slots"])}
    y = getattr(ops, each.op)(**inputs)
    if each.op == "norm_swiglu":
        return {"y": y}
    slots = inputs["slots"]
    return ({} if y is None else {"q": y}) | ({} if slots is None else {"k": slots[0], "v": slots[1]})


def wrong(each: Given) -> str | None:
    """What is not as it should be of a call, or None: within one rounding of the truth of the prepared rows."""
    hint, inputs = each.hint, widened(each.inputs)
    assert hint.rows is not None and hint.squares is not None
    rows = hint.rows.double()
    mean = hint.squares.double().sum(0).view(*rows.shape[:-1], 1) / rows.shape[-1]
    normed = rows * (mean + inputs["norm"][1]).rsqrt()
    if each.op == "norm_swiglu":
        weights = {"gate": inputs["gate_weight"], "up": inputs["up_weight"]}
    else:
        weights = {
            name: each for name, each in zip("qkv", inputs["weights"], strict=True) if each is not None
        }
    products = {name: normed @ weight.T for name, weight in weights.items()}
    terms = max(float((normed.abs() @ weight.abs().T).max()) for weight in weights.values())
    if each.op == "norm_swiglu":
        want = {"y": torch.nn.functional.silu(products["gate"]) * products["up"]}
        terms *= max(1.0, float(products["up"].abs().max()), float(products["gate"].abs().max()))
    else:
        heads = {name: y.unflatten(-1, (-1, 2 * inputs["rope"][0].shape[-1])) for name, y in products.items()}
        want = {name: y if name == "v" else apply_rope(y, *inputs["rope"]) for name, y in heads.items()}
    found = each.run()
    assert found.keys() == want.keys()
    for name, y in found.items():
        off = (y.double() - want[name]).abs()
        if not (off <= ONCE * want[name].abs() + SUMS * terms).all():  # so written that NaN is found
            return f"{name} is off by {off.max():.3g}"
    return None


@pytest.fixture
def hopper(emulator: Any) -> Any:
    emulator.configure(compute_capability=90)
    return emulator


@pytest.mark.parametrize(("op", "case"), OPS)
def test_contract(hopper: Any, op: str, case: str) -> None:
    """At most twice eager's error to fp64 of the same stream; within one rounding of the prepared rows' own truth."""
    each = given(op, case)
    assert wrong(each) is None
    want, eager = of(reference_ops(), each, widened(each.inputs)), of(backend_ops("torch"), each, each.inputs)
    for name, y in each.run().items():
        error, of_eager = ((got[name].double() - want[name]).abs().max().item() for got in ({name: y}, eager))
        print(op, case, name, error, of_eager)
        assert error <= 2 * of_eager + allowance(want[name], torch.bfloat16, each.inputs["x"].shape[-1])


@pytest.mark.parametrize(("op", "case"), OPS)
def test_equal_bits_in_every_order(emulator: Any, op: str, case: str) -> None:
    found = []
    for seed in (0, 1):
        emulator.configure(compute_capability=90, seed=seed)
        found.append(given(op, case).run())
    assert all(torch.equal(y, found[1][name]) for name, y in found[0].items())
