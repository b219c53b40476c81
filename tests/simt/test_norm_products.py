"""norm_swiglu and norm_qkv_rope of prepared rows: the op contract, and equal bits in every order."""

from __future__ import annotations

from functools import partial
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.contract import inputs_in, nan_filled_memory, widened
from support.prepared import prepared
from torch import Tensor, nn

from smolvla_fast.ops.choice import choose
from smolvla_fast.ops.cuda import library, prepared_rows
from smolvla_fast.ops.cuda.linear_residual import linear_residual
from smolvla_fast.ops.cuda.norm_qkv_rope import norm_qkv_rope
from smolvla_fast.ops.cuda.norm_swiglu import norm_swiglu
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.reference.rope import apply_rope
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.ops.shape_class import CLASSES, PREPARED, Product
from smolvla_fast.ops.table import serving
from smolvla_fast.tune.check import Contract, allowance
from smolvla_fast.tune.recorder import Call, Recorded

CPU = torch.device("cpu")
MANY_PARTS = "more parts than a row's lanes take at once"
SWIGLU = {
    "one of all": dict(rows=1, inputs=8, outputs=4),
    "part of a second tile": dict(rows=5, inputs=72, outputs=20),
    "a width of SmolVLA": dict(rows=50, inputs=720, outputs=36),
    "another width": dict(rows=6, inputs=480, outputs=2),
    "two row tiles": dict(rows=65, inputs=200, outputs=54),
    "a whole cluster": dict(rows=50, inputs=720, outputs=128),
    MANY_PARTS: dict(rows=3, inputs=1024, outputs=4),
}
QKV = {
    "one of all": dict(B=1, T=1, M=8, H=1, K=1, D=4),
    "samples, and a head of more than a tile": dict(B=2, T=7, M=72, H=3, K=2, D=20),
    "a width of SmolVLA": dict(B=1, T=50, M=720, H=1, K=1, D=16),
    "two row tiles": dict(B=5, T=13, M=40, H=1, K=1, D=40),
}
OPS = [*(("norm_swiglu", case) for case in SWIGLU), *(("norm_qkv_rope", case) for case in QKV)]
OF_A_CHUNK = [
    (op, rows, inputs)
    for op in ("norm_swiglu", "norm_qkv_rope")
    for rows in (2, 65)
    for inputs in (480, 720, 960, 1024)
]
"""Every kernel that is compiled for a width of its own, the widest, and with it the most shared memory."""
ONCE = 2**-8
"""Relative: one rounding to bf16 is half of it, and what sums in fp32 leave is far below the other half."""
SUMS = 2**-20
"""Of the sum of an output's terms without their signs: what the fp32 sums of up to 1024 terms may be off, 16 units."""


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
    op: str,
    case: str | dict[str, int],
    settled: bool = True,
    slots: torch.dtype | None = torch.bfloat16,
    queries: bool = True,
) -> Given:
    """A stream in fp32 with outliers and a row of zeros, its rows prepared in bf16, and squares over some columns each."""
    sizes = (SWIGLU if op == "norm_swiglu" else QKV)[case] if isinstance(case, str) else case
    inputs, _ = inputs_in(op, sizes, torch.bfloat16, 0)
    x, (weight, eps) = inputs["x"].float(), inputs["norm"]
    x[..., ::11] *= 50
    x.view(-1, x.shape[-1])[1:2] = 0.0

    def matrix(weight: Tensor) -> Tensor:
        weight[0, 0] = 40.0
        return nn.Parameter(weight, requires_grad=False) if settled else weight

    if op == "norm_swiglu":
        inputs |= {name: matrix(inputs[name]) for name in ("gate_weight", "up_weight")}
    else:
        q, k, v = map(matrix, inputs["weights"])
        inputs["weights"] = (q if queries else None, *((None, None) if slots is None else (k, v)))
        inputs["slots"] = None if slots is None else tuple(each.to(slots) for each in inputs["slots"])
    hint = prepared(x, weight, 40 if case == MANY_PARTS else 64)
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
    names = ("gate_weight", "up_weight") if each.op == "norm_swiglu" else "qkv"
    matrices = [inputs[name] for name in names] if each.op == "norm_swiglu" else inputs["weights"]
    weights = {name: weight for name, weight in zip(names, matrices, strict=True) if weight is not None}
    products = [normed @ weight.T for weight in weights.values()]
    terms = [normed.abs() @ weight.abs().T for weight in weights.values()]
    if each.op == "norm_swiglu":
        (gate, up), (of_gate, of_up) = products, terms
        # The slope of silu is at most 1.1.
        want = {"y": (torch.nn.functional.silu(gate) * up, 1.1 * of_gate * up.abs() + gate.abs() * of_up)}
    else:
        half = inputs["rope"][0].shape[-1]
        want = {
            name: (y if name == "v" else apply_rope(y, *inputs["rope"]), sums + sums.roll(half, -1))
            for name, y, sums in zip(
                weights, *map(partial(heads_of, 2 * half), (products, terms)), strict=True
            )
        }
    found = each.run()
    assert found.keys() == want.keys()
    for name, y in found.items():
        right, sums = want[name]
        off = (y.double() - right).abs()
        if not (off <= ONCE * right.abs() + SUMS * sums).all():  # so written that NaN is found
            return f"{name} is off by {off.max():.3g}"
    return None


def heads_of(size: int, rows: list[Tensor]) -> list[Tensor]:
    return [each.unflatten(-1, (-1, size)) for each in rows]


@pytest.fixture
def hopper(emulator: Any) -> Any:
    emulator.configure(compute_capability=90, shared_bytes_per_block=232448)
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


@pytest.mark.parametrize(("op", "rows", "inputs"), OF_A_CHUNK)
def test_every_kernel_is_right(hopper: Any, op: str, rows: int, inputs: int) -> None:
    sizes = dict(rows=rows, inputs=inputs, outputs=26)
    if op == "norm_qkv_rope":
        sizes = dict(B=1, T=rows, M=inputs, H=1, K=1, D=20)
    assert wrong(given(op, sizes)) is None


@pytest.mark.parametrize(("op", "case"), OPS)
def test_equal_bits_in_every_order(emulator: Any, op: str, case: str) -> None:
    found = []
    for seed in (0, 1):
        emulator.configure(compute_capability=90, seed=seed)
        found.append(given(op, case).run())
    assert all(torch.equal(y, found[1][name]) for name, y in found[0].items())


@pytest.mark.parametrize(
    ("op", "case"),
    [
        ("norm_swiglu", "two row tiles"),
        ("norm_swiglu", "a whole cluster"),
        ("norm_qkv_rope", "two row tiles"),
        ("norm_qkv_rope", "a width of SmolVLA"),
    ],
)
def test_the_account_has_its_blocks(hopper: Any, monkeypatch: pytest.MonkeyPatch, op: str, case: str) -> None:
    """What ``make gpu-account`` notes of a launch has as many blocks as the launch."""
    pytest.importorskip("triton")
    from benchmarks.gpu_account.recording import _Kernels

    each, noted = given(op, case), list[tuple[int, ...]]()
    each.run()
    launched = hopper.statistics()["blocks"]
    recorder: Any = SimpleNamespace(note=lambda name, grid, named, pdl: noted.append(grid))
    monkeypatch.setattr(library, "library", lambda device: _Kernels(recorder))
    each.run()
    assert [prod(grid) for grid in noted] == [launched]
    assert _Kernels(recorder).norm_products_shared_bytes() == hopper.norm_products_shared_bytes()


def test_no_heads_at_all(hopper: Any) -> None:
    each = given("norm_qkv_rope", "two row tiles", slots=None)
    q = norm_qkv_rope(
        **{**each.inputs, "weights": (torch.empty(0, 40).bfloat16(), None, None)}, normed=each.hint
    )
    assert q is not None and q.shape == (5, 13, 0, 40)


def by_triton() -> Any:
    """Triton's table as a device has it that the emulator stands for."""
    pytest.importorskip("triton")
    return choose(backend_ops("triton"), CPU, "triton", None)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GATED = Product(64, 720, (2048, 2048), BF16, F32, (PREPARED,))
RESIDUAL = Product(64, 2048, (720,), BF16, BF16)
ATTEND = Product(64, 960, (720,), BF16, BF16, ("15:5", "keys256"))
DEFAULTS = (
    ("norm_swiglu", GATED, "cuda", True),
    ("norm_swiglu", GATED._replace(rows=256, inputs=960, x=BF16), "cuda", True),
    ("norm_swiglu", GATED._replace(rows=512), "triton", True),
    ("norm_swiglu", GATED._replace(end=()), "triton", False),  # behind suffix_embed
    ("norm_swiglu", GATED._replace(inputs=1032), "triton", False),
    ("norm_swiglu", GATED._replace(inputs=724), "triton", False),
    ("norm_swiglu", GATED._replace(dtype=F16), "triton", False),
    ("norm_swiglu", GATED._replace(dtype="quantized"), "triton", False),
    ("norm_qkv_rope", GATED._replace(outputs=(960, 320, 320)), "cuda", True),
    ("norm_qkv_rope", GATED._replace(outputs=(960,), end=()), "triton", False),
    ("linear_residual", RESIDUAL, "cuda", True),
    ("linear_residual", RESIDUAL._replace(rows=256), "cuda", True),
    ("linear_residual", RESIDUAL._replace(rows=512), "triton", False),
    ("linear_residual", RESIDUAL._replace(x=F16, dtype=F16), "triton", False),
    ("attention_residual", ATTEND, "apart", False),
    ("attention_residual", ATTEND._replace(x=F16, dtype=F16), "triton", False),
)


@pytest.mark.parametrize(("op", "shape", "name", "candidate"), DEFAULTS, ids=str)
def test_who_serves_a_hopper(hopper: Any, op: str, shape: Product, name: str, candidate: bool) -> None:
    """Few rows in bf16, of the normed products prepared ones; other GPUs keep what they had, some with a candidate more."""
    assert getattr(by_triton(), op).default(shape) == name
    for capability in (80, 100):
        hopper.configure(compute_capability=capability)
        choice = getattr(by_triton(), op)
        assert choice.default(shape) == "triton"
        assert ("cuda" in choice.names(shape)) == (candidate and capability == 100)


def test_one_that_has_too_little_shared_memory_is_no_candidate(hopper: Any) -> None:
    hopper.configure(compute_capability=120, shared_bytes_per_block=101376)
    ops = by_triton()
    assert "cuda" not in ops.norm_swiglu.candidates and "cuda" in ops.linear_residual.candidates


def test_one_that_runs_no_cluster_says_so(hopper: Any) -> None:
    hopper.configure(multiprocessors=4)
    assert prepared_rows.why_no_norm_products(CPU) == (
        "no part of this GPU runs eight blocks of 231200 bytes of shared memory as a cluster"
    )


@pytest.mark.parametrize("op", ["norm_swiglu", "norm_qkv_rope"])
def test_rows_that_a_cluster_prepared(hopper: Any, op: str) -> None:
    """A chain of the table's own ops: the sum, then the products of what it prepared, with no kernel of Triton's between."""
    each, ops = given(op, "two row tiles"), by_triton()
    x, (weight, _) = each.inputs["x"], each.inputs["norm"]
    width = x.shape[-1]
    generator = torch.Generator().manual_seed(1)
    matrix = nn.Parameter((torch.randn(width, 64, generator=generator) / 8).bfloat16(), requires_grad=False)
    attended = torch.randn(*x.shape[:-1], 64, generator=generator).bfloat16()
    hint = NextNorm(weight, torch.bfloat16)
    y = ops.linear_residual(attended, matrix, x, next_norm=hint)
    following = Given(op, {**each.inputs, "x": y}, hint)
    assert wrong(following) is None
    slots = {"slots": tuple(map(torch.clone, each.inputs["slots"]))} if op == "norm_qkv_rope" else {}
    got = getattr(ops, op)(**{**following.inputs, **slots}, normed=hint)
    assert torch.equal(got, next(iter(following.run().values())))
    for name in ("linear_residual", op):
        assert list(getattr(ops, name).served.values()) == ["cuda"]
    assert serving(ops, "denoise") == "cuda, triton" and serving(ops, "vision") == "triton"
    assert torch.equal(y, linear_residual(attended, matrix, x))


@pytest.mark.parametrize("op", ["norm_swiglu", "norm_qkv_rope"])
def test_tuning_judges_it_by_prepared_rows(hopper: Any, op: str) -> None:
    """Which it is given, since it takes no others; one that is wrong is refused."""
    each = given(op, "two row tiles")
    names = (
        "x",
        "norm",
        *(("gate_weight", "up_weight") if op == "norm_swiglu" else ("weights", "rope", "slots")),
    )
    call = Call(tuple(each.inputs[name] for name in names), {}, {"normed": each.hint})
    choice = getattr(by_triton(), op)
    recorded = Recorded(choice, CLASSES[op](*call.args, **call.hints), calls=[call])
    assert choice.default(recorded.shape) == "cuda"
    contract = Contract(recorded)
    error, allowed, refused = contract.judge(op, choice.function("cuda"))
    assert refused is None and 0 < error <= allowed
    assert each.hint.squares is not None
    each.hint.squares *= 2
    _, _, refused = contract.judge(op, choice.function("cuda"))
    assert refused is not None and "off by" in refused


REFUSED = (
    ("norm_swiglu", dict(normed=None), "no rows of x were prepared in bfloat16"),
    ("norm_swiglu", dict(gate_weight=torch.ones(16, 200)), "a weight is torch.float32; accepted is bfloat16"),
    ("norm_swiglu", dict(up_weight=(None, None)), "a weight is tuple; accepted is bfloat16"),
    ("norm_swiglu", dict(gate_weight=torch.ones(5, 200).bfloat16()), "5 outputs; accepted are even numbers"),
    ("norm_swiglu", dict(up_weight=torch.ones(12, 200).bfloat16()), r"up_weight has shape \[12, 200\]; accepted is"),
    ("norm_swiglu", dict(gate_weight=torch.ones(200, 16).bfloat16().T), r"a weight has strides \(1, 16\)"),
    ("norm_swiglu", dict(x=torch.ones(65, 204)), "204 inputs; accepted are multiples of 8 up to 1024"),
    ("norm_swiglu", dict(x=torch.ones(64, 200)), r"prepared rows have shape \[65, 200\]; accepted is \[64, 200\]"),
    ("norm_swiglu", dict(norm=(torch.ones(200), 1e-5)), "the rows were prepared for another norm"),
    ("norm_qkv_rope", dict(weights=(None, None, None)), "needs a weight of q, or weights and slots of k and v"),
    ("norm_qkv_rope", dict(rope=2 * (torch.ones(1, 13, 1, 7),)), "heads of 14; accepted are multiples of 4"),
    ("norm_qkv_rope", dict(rope=2 * (torch.ones(2, 13, 1, 8),)), r"rope has shape .* accepted is \[5, 13, 1, 8\]"),
    ("norm_qkv_rope", dict(slots=2 * (torch.ones(5, 13, 1, 16).half(),)), "accepted are float32 and bfloat16, one"),
    ("norm_qkv_rope", dict(slots=2 * (torch.ones(5, 13, 2, 16),)), r"slots.k has shape \[5, 13, 2, 16\]"),
    ("norm_qkv_rope", dict(slots=2 * (torch.ones(5, 13, 1, 17)[..., :16],)), "slots have strides .* even ones"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("op", "changes", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_refused(hopper: Any, op: str, changes: dict[str, Any], said: str) -> None:
    each = given(op, "two row tiles")
    run = norm_swiglu if op == "norm_swiglu" else norm_qkv_rope
    with pytest.raises(ValueError, match=said):
        run(**{**each.inputs, "normed": each.hint, **changes})


@pytest.mark.parametrize(
    ("queries", "slots"), [(True, None), (True, torch.float32), (False, torch.float32)], ids=str
)
def test_queries_alone_and_a_cache_in_fp32(hopper: Any, queries: bool, slots: torch.dtype | None) -> None:
    """Or keys and values alone, of the last layer of the prefix; the cache is a view with room between tokens."""
    each = given("norm_qkv_rope", "samples, and a head of more than a tile", slots=slots, queries=queries)
    assert wrong(each) is None
    if slots is not None:
        cache = torch.full((2, 2, 9, 2, 20), torch.nan)
        into = (cache[0, :, 2:], cache[1, :, 2:])
        norm_qkv_rope(**{**each.inputs, "slots": into}, normed=each.hint)
        found = each.run()
        assert torch.equal(into[0], found["k"]) and torch.equal(into[1], found["v"])
        assert cache[:, :, :2].isnan().all()


@pytest.mark.parametrize("op", ["norm_swiglu", "norm_qkv_rope"])
def test_a_nan_stays_in_its_row(hopper: Any, op: str) -> None:
    each = given(op, "two row tiles")
    assert each.hint.rows is not None
    each.hint.rows.view(65, -1)[64, 3] = torch.nan
    for y in each.run().values():
        rows = y.flatten(0, -2 if op == "norm_swiglu" else 1).flatten(1)
        assert rows[64].isnan().all() and not rows[:64].isnan().any()


def test_gates_of_any_size(hopper: Any) -> None:
    """Where e^-x is infinite, or 0, silu is 0, or x."""
    each = given("norm_swiglu", "part of a second tile")
    with torch.no_grad():
        each.inputs["gate_weight"] *= 1000
    y = each.run()["y"]
    assert y.isfinite().all() and wrong(each) is None
