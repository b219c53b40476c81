"""linear_residual by clusters: bits of its order of sums and a drop-in for Triton's kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.contract import nan_filled_memory
from torch import Tensor, nn

from smolvla_fast.kernels.launch_order import dependent_launches
from smolvla_fast.ops.choice import Choice, choose
from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.cuda.linear_residual import linear_residual
from smolvla_fast.ops.next_norm import NextNorm
from smolvla_fast.ops.plan import Plan
from smolvla_fast.ops.select import backend_ops, select, table
from smolvla_fast.ops.shape_class import CLASSES
from smolvla_fast.tune.candidates import candidates
from smolvla_fast.tune.check import Contract, allowance
from smolvla_fast.tune.recorder import Call, Recorded

CPU = torch.device("cpu")
STEP, ROUND, RANKS = 64, 16, 8
"""Of K: what a block loads at once, and one instruction multiplies; blocks that share it."""
CASES = {
    "one of all": (1, 8, 1),
    "blocks without a step": (5, 72, 33),
    "column tiles": (3, 264, 130),
    "two row tiles": (65, 520, 47),
    "two row tiles, more of K than is in flight": (77, 1608, 8),
    "as much of K as is in flight": (3, 2048, 8),
    "more of K than is in flight": (9, 2632, 8),
}
MORE = {"more rows than an H200 was asked about": (257, 8, 1)}


class Given(NamedTuple):
    x: Tensor
    weight: Tensor
    residual: Tensor
    norm: NextNorm


def inputs(
    case: str, stream: torch.dtype = torch.float32, settled: bool = True, norm: torch.dtype = torch.float32
) -> Given:
    rows, k, outputs = (CASES | MORE)[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator).bfloat16()
    weight = (torch.randn(outputs, k, generator=generator) * k**-0.5).bfloat16()
    weight[0, 0] = 40.0  # an outlier
    residual = (3 * torch.randn(rows, outputs, generator=generator)).to(stream)
    weight = nn.Parameter(weight, requires_grad=False) if settled else weight
    return Given(
        x, weight, residual, NextNorm(torch.randn(outputs, generator=generator).to(norm), torch.bfloat16)
    )


def in_order(given: Given) -> Tensor:
    """The sums as the kernel takes them: 16 of K at a time in each block, the blocks in the order of K, the residual.

    The emulator's products are exact and rounded once a round, so the result has these bits."""
    x, weight = given.x.double(), given.weight.double()
    steps = -(-x.shape[1] // STEP)
    whole = torch.zeros(len(x), len(weight))
    for rank in range(RANKS):
        part = torch.zeros_like(whole)
        stop = min((rank + 1) * steps // RANKS * STEP, x.shape[1])
        for k in range(rank * steps // RANKS * STEP, stop, ROUND):
            some = slice(k, min(k + ROUND, stop))
            part = (part.double() + x[:, some] @ weight[:, some].T).float()
        whole += part
    return (whole + given.residual.float()).to(given.residual.dtype)


def wrong(given: Given) -> str | None:
    """What is not as it should be of a call, or None."""
    norm = given.norm
    with nan_filled_memory(CPU):
        y = linear_residual(given.x, given.weight, given.residual, next_norm=norm)
    assert norm.rows is not None and norm.squares is not None
    if y.dtype != given.residual.dtype or not torch.equal(y, in_order(given)):
        return "other bits than in the order of K"
    if not torch.equal(norm.rows, (y.float() * norm.weight.float()).bfloat16()):
        return "rows for the next norm"
    squares = (
        torch.nn.functional.pad(y.double().square(), (0, -y.shape[1] % 64)).unflatten(1, (-1, 64)).sum(2).T
    )
    # Sums of 64 fp32 squares: each addition rounds once.
    if norm.squares.shape != squares.shape or not torch.allclose(
        norm.squares.double(), squares, rtol=64 * 2**-24, atol=0
    ):
        return "squares for the next norm"
    return None


@pytest.fixture
def hopper(emulator: Any) -> Any:
    emulator.configure(compute_capability=90)
    return emulator


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bits_and_error(hopper: Any, scheduler_seed: int, case: str, stream: torch.dtype) -> None:
    """In the order of K whatever the order of threads; at most twice eager's error to fp64."""
    hopper.configure(compute_capability=90)
    given = inputs(case, stream, settled=scheduler_seed > 0, norm=stream)
    assert wrong(given) is None
    truth = given.residual.double() + given.x.double() @ given.weight.double().T
    eager = given.residual + given.x @ given.weight.T
    error, of_eager = ((y.double() - truth).abs().max().item() for y in (in_order(given), eager))
    print(case, stream, error, of_eager)
    assert error <= 2 * of_eager + allowance(truth, stream, given.x.shape[1])


def test_leading_dimensions_and_views(hopper: Any) -> None:
    """Batches, rows with gaps, and rows that do not begin at multiples of 16 bytes, which are copied first."""
    given = inputs("column tiles")
    want = linear_residual(given.x, given.weight, given.residual)
    wide = torch.full((3, 300), torch.nan, dtype=torch.bfloat16)
    for first in (8, 1):
        wide[:, first : first + 264] = given.x
        residual = torch.full((3, 137), torch.nan)
        residual[:, 3:133] = given.residual
        y = linear_residual(wide[:, first : first + 264], given.weight, residual[:, 3:133])
        assert torch.equal(y, want)
    y = linear_residual(given.x[:, None], given.weight, given.residual[:, None])
    assert torch.equal(y, want[:, None])
    assert linear_residual(given.x[:0], given.weight, given.residual[:0]).shape == (0, 130)


def test_a_nan_stays_in_its_row(hopper: Any) -> None:
    given = inputs("two row tiles")
    given.x[64, 3] = torch.nan
    y = linear_residual(given.x, given.weight, given.residual)
    assert y[64].isnan().all() and not y[:64].isnan().any()


def test_a_weight_that_a_launch_may_write_is_not_read_early(hopper: Any) -> None:
    """A copy that the same chunk makes; ordinary launches read nothing early."""
    given = inputs("column tiles", settled=False)
    for dependent in (True, False):
        with dependent_launches(dependent):
            assert wrong(given) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(x=torch.ones(3, 264)), "x is torch.float32, weight torch.bfloat16; accepted is bfloat16 of both"),
        (dict(weight=(None, None, None)), "weight tuple; accepted is bfloat16"),
        (dict(residual=torch.ones(3, 130, dtype=torch.float64)), "residual is torch.float64; accepted are float32 and"),
        (dict(residual=torch.ones(3, 129)), r"residual has shape \[3, 129\]; accepted is \[3, 130\]"),
        (dict(x=torch.ones(3, 256).bfloat16()), r"x has shape \[3, 256\]; accepted is \[3, 264\]"),
        (dict(weight=torch.ones(130, 12).bfloat16()), "12 inputs; accepted are multiples of 8"),
        (dict(weight=torch.ones(264, 130).bfloat16().T), r"weight has strides \(1, 130\)"),
        (dict(norm=NextNorm(torch.ones(129), torch.bfloat16)), r"next_norm.weight has shape \[129\]"),
    ],
)  # fmt: skip
def test_what_is_refused(hopper: Any, changes: dict[str, Any], said: str) -> None:
    given = inputs("column tiles")._replace(**changes)
    with pytest.raises(ValueError, match=f"linear_residual: .*{said}"):
        linear_residual(given.x, given.weight, given.residual, next_norm=given.norm)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            dict(compute_capability=89),
            "compute capability 8.9 has no clusters of blocks; accepted is 9.0 and later",
        ),
        (
            dict(compute_capability=90, multiprocessors=7),
            "no part of this GPU runs eight blocks as a cluster",
        ),
    ],
)
def test_without_clusters_the_fallback_serves(emulator: Any, settings: dict[str, int], reason: str) -> None:
    """With the reason in the table that `doctor` prints; no plan can choose it there."""
    emulator.configure(**settings)
    ops = select("cuda", CPU, False)
    assert ops.fallback is not None and ops.linear_residual is ops.fallback.linear_residual
    rows = [row for row in table(CPU) if (row.op, row.backend) == ("linear_residual", "cuda")]
    assert [(row.available, row.reason) for row in rows] == [(False, reason)]
    given = inputs("column tiles")
    choice = planned(given).linear_residual
    assert "cuda" not in choice.candidates
    assert choice(given.x, given.weight, given.residual).shape == (3, 130)


def planned(given: Given) -> Any:
    """Triton's table by a plan that has "cuda" serve this call."""
    pytest.importorskip("triton")
    name = f"linear_residual 4 {given.x.shape[1]}>{len(given.weight)} bfloat16"
    return choose(backend_ops("triton"), CPU, "auto", Plan({name: "cuda"}))


def test_a_plan_may_choose_it_in_the_chain_of_tritons_kernels(hopper: Any) -> None:
    """It prepares the rows of the norm behind it, as Triton's kernel does."""
    given = inputs("column tiles")
    choice = planned(given).linear_residual
    assert isinstance(choice, Choice)
    y = choice(given.x, given.weight, given.residual, next_norm=given.norm)
    assert list(choice.served.values()) == ["cuda"] and torch.equal(y, in_order(given))
    assert given.norm.rows is not None and given.norm.squares is not None


def test_tuning_measures_it_beside_the_others(emulator: Any) -> None:
    """It is held to the contract of all candidates; without clusters there is no such candidate."""
    given = inputs("column tiles", torch.bfloat16)
    call = Call(given[:3], {})
    names = []
    for capability in (90, 80):
        emulator.configure(compute_capability=capability)
        choice = choose(backend_ops("torch"), CPU, "auto", Plan()).linear_residual
        recorded = Recorded(choice, CLASSES["linear_residual"](*call.args), calls=[call])
        names.append(candidates(recorded))
        if capability == 90:
            error, allowed, refused = Contract(recorded).judge("linear_residual", choice.function("cuda"))
            assert refused is None and 0 < error <= allowed
    assert set(names[0]) == {*names[1], "cuda"} and "cuda" not in names[1]


def test_other_operands_are_served_by_the_fallback(hopper: Any) -> None:
    ops = select("cuda", CPU, False)
    given = inputs("column tiles")
    assert torch.equal(ops.linear_residual(given.x, given.weight, given.residual, out=None), in_order(given))
    x, weight = given.x.float(), given.weight.float()
    assert ops.fallback is not None
    many = inputs("more rows than an H200 was asked about")
    for call in ((x, weight, given.residual), (many.x, many.weight, many.residual)):
        assert torch.equal(ops.linear_residual(*call), ops.fallback.linear_residual(*call))


@pytest.mark.parametrize(
    "case", ["two row tiles", "two row tiles, more of K than is in flight", "as much of K as is in flight"]
)
def test_the_account_has_its_blocks_and_memory(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """What ``make gpu-account`` notes of a launch, with two, three and four steps of K in flight."""
    pytest.importorskip("triton")
    from benchmarks.gpu_account.recording import Node, _Kernels
    from benchmarks.gpu_account.work import works_of

    each, noted = inputs(case), list[Node]()
    recorder: Any = SimpleNamespace(
        note=lambda name, grid, named, pdl: noted.append(Node("", "", name, grid, named))
    )
    with monkeypatch.context() as recording:
        recording.setattr(library, "library", lambda device: _Kernels(recorder))
        recording.setattr(library, "address", lambda tensor: tensor)
        linear_residual(each.x, each.weight, each.residual)
    [work] = works_of(noted[0])
    hopper.configure(compute_capability=90, shared_bytes_per_block=work.shared)
    linear_residual(each.x, each.weight, each.residual)
    assert hopper.statistics()["blocks"] == work.programs
    hopper.configure(compute_capability=90, shared_bytes_per_block=work.shared - 1)
    with pytest.raises(RuntimeError, match="shared memory; a block has at most"):
        linear_residual(each.x, each.weight, each.residual)
