"""Who serves a call: every candidate keeps the op contract, a plan decides, and what it does not say keeps its default."""

from __future__ import annotations

import pytest
import torch
from support.contract import ONE_BACKENDS, OPS, call_of, check, inputs_in, reference_module, to_device
from support.tunings import Everywhere

from smolvla_fast.ops import extension
from smolvla_fast.ops.choice import Choice
from smolvla_fast.ops.plan import Plan
from smolvla_fast.ops.select import reference_ops, select
from smolvla_fast.ops.shape_class import CLASSES
from smolvla_fast.ops.table import Ops

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.processor,
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
MOST = 3e8
"""FLOP of a case: larger ones are seen under the default candidates (test_contract.py)."""


def table(name: str, backend: str = "auto") -> Ops:
    return select(backend, CPU, False, plan=Plan(Everywhere(name)))


def test_every_op_with_a_shape_class_has_several_candidates_here() -> None:
    ops = table("cpu")
    alone = {op for op in set(CLASSES) - ONE_BACKENDS if not isinstance(getattr(ops, op), Choice)}
    assert alone == {"patch_embed"}, "its convolution has one implementation on a CPU"


def candidates(op: str) -> list[str]:
    choice = getattr(table("cpu"), op)
    return [*choice.candidates] if isinstance(choice, Choice) else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS if op in CLASSES for name in candidates(op)]
)
def test_every_candidate_keeps_the_contract(op: str, name: str, dtype: torch.dtype) -> None:
    ops, module = table(name), reference_module(op)
    choice = getattr(ops, op)
    for case in (each for each in module.CASES if module.cost(each, 4).flops < MOST):
        check(reference_ops(), ops, op, case, dtype)
    # Where oneDNN multiplies no bf16 the default serves.
    assert all(served == name or name not in choice.names(shape) for shape, served in choice.served.items())


@pytest.mark.parametrize("name", ["cpu", "onednn", "aten"])
def test_a_plan_decides_one_shape_class_and_no_other(name: str) -> None:
    inputs, _ = inputs_in("linear_residual", dict(rows=50, inputs=48, outputs=32), torch.float32, seed=0)
    more, _ = inputs_in("linear_residual", dict(rows=100, inputs=48, outputs=32), torch.float32, seed=0)
    ops = select("auto", CPU, False, plan=Plan({"linear_residual 64 48>32 float32": name}))
    plain = select("auto", CPU, False)
    for given in (inputs, more):
        call_of(ops, "linear_residual", given)()
        call_of(plain, "linear_residual", given)()
    served, default = ({str(k): v for k, v in each.linear_residual.served.items()} for each in (ops, plain))  # type: ignore[attr-defined]
    assert served["64 48>32 float32"] == name
    assert served["128 48>32 float32"] == default["128 48>32 float32"]


@pytest.mark.parametrize(
    "name", ["cuda", "triton", "cudnn", "", "cpu gemm 64x64x64", "onednn gemm", "__class__"]
)
def test_a_candidate_that_is_not_there_leaves_the_default(name: str) -> None:
    inputs, _ = inputs_in("norm_swiglu", reference_module("norm_swiglu").CASES[-1], torch.float32, seed=0)
    ops, plain = table(name), select("auto", CPU, False)
    got = call_of(ops, "norm_swiglu", inputs)()
    assert torch.equal(got, call_of(plain, "norm_swiglu", inputs)())
    assert ops.norm_swiglu.served == plain.norm_swiglu.served  # type: ignore[attr-defined]


def test_exact_is_untouched_by_plans() -> None:
    assert select("auto", CPU, True, plan=Plan(Everywhere("aten"))) is reference_ops()


def test_a_named_backend_keeps_to_itself_and_torch() -> None:
    choice = table("cpu", "torch").linear
    assert isinstance(choice, Choice) and set(choice.candidates) == {"onednn", "aten"}
    assert isinstance(table("cpu").linear, Choice)


def test_tf32_is_another_shape_class() -> None:
    """Whether fp32 products may round to it is asked at every call, for a caller may change his mind."""
    inputs, _ = inputs_in("linear", reference_module("linear").CASES[-1], torch.float32, seed=0)
    before = torch.get_float32_matmul_precision()
    try:
        shapes = []
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            shapes.append([str(CLASSES["linear"](**to_device(inputs, where))) for where in ("meta", "cpu")])
    finally:
        torch.set_float32_matmul_precision(before)
    (plain, on_cpu), (allowed, still) = shapes
    assert allowed == f"{plain} tf32" and still == on_cpu == plain, (
        "LeRobot's commands allow it: a CPU has none"
    )


def test_a_library_that_refuses_a_call_leaves_a_receipt_and_its_op_to_the_backend() -> None:
    """Its sizes are not all known beforehand: the first call, outside of any capture, tells."""

    def refuses(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("cuDNN: no valid execution plan\nmore")

    calls = []

    def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        calls.append(heads)
        return q

    choice = Choice("attention", {"triton": own, "cudnn": refuses}, lambda shape: "cudnn", {})
    choice.names = lambda shape: ["triton", "cudnn"]  # type: ignore[method-assign]
    q = torch.zeros(1, 8, 16)
    for _ in range(2):
        assert choice(q, q, q, 2) is q
    assert calls == [2, 2] and set(choice.served.values()) == {"triton"}
    [(key, why)] = choice.refused.items()
    assert (
        key.startswith("attention ") and why == "cudnn refused: cuDNN: no valid execution plan; triton serves"
    )


def test_want_of_memory_is_no_refusal() -> None:
    def short(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    choice = Choice("attention", {"triton": short, "cudnn": short}, lambda shape: "cudnn", {})
    choice.names = lambda shape: ["triton", "cudnn"]  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        choice(*[torch.zeros(1, 8, 16)] * 3, 2)
    assert not choice.refused
