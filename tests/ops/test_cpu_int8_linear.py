"""Products of bytes on AMX tiles: the bits of the plain product and of what finishes it, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import emulated
from torch import Tensor

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import int8_linear, quantize
from smolvla_fast.ops.memory import Memory
from smolvla_fast.ops.reference.quantize import IntegerRows, IntegerWeight

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu")),
]
# Rows about the squares of 32 and blocks of 64, enough of them for whole rows (256 with two threads) and too few; inputs
# about a step of 64; outputs about a panel of 32; single ones.
SIZES = [
    (1, 1, 1),
    (31, 64, 32),
    (33, 65, 33),
    (50, 720, 70),
    (256, 64, 64),
    (257, 100, 70),
    (300, 192, 31),
    (5, 5000, 17),
]


@pytest.fixture(autouse=True)
def on_tiles() -> Iterator[None]:
    """The processor's where it has them, else emulated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with emulated.integers_at("amx"):
        yield
    torch.set_num_threads(threads)


def operands(
    rows: int, inputs: int, outputs: int, extreme: bool = False
) -> tuple[IntegerRows, IntegerWeight, IntegerWeight, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + inputs)
    data = torch.randint(0, 256, (rows, inputs), generator=generator, dtype=torch.uint8)
    gate, up = (
        torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8) for _ in "gu"
    )
    if extreme:  # -128 · -128 in every place
        data, gate = torch.zeros_like(data), torch.full_like(gate, -128)
    scales = [torch.rand(size, generator=generator) + 0.5 for size in (rows, outputs, outputs, outputs)]
    x = IntegerRows(data, scales[0] * 1e-3)
    residual = torch.randn(rows, outputs, generator=generator)
    return x, IntegerWeight(gate, scales[1]), IntegerWeight(up, scales[2]), scales[3], residual


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_exact(sizes: tuple[int, int, int], extreme: bool) -> None:
    """The sums are integers below 2^31, the scale is one rounding of fp32 more."""
    x, weight, *_ = operands(*sizes, extreme)
    want = ((x.data.long() - 128) @ weight.data.long().t()).float() * weight.scale
    assert torch.equal(int8_linear.matmul(x, int8_linear.pack(weight)), want)


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bits_of_one_after_the_other(sizes: tuple[int, int, int], activation: str | None) -> None:
    x, weight, up, bias, residual = operands(*sizes)
    packed, packed_up = int8_linear.pack(weight), int8_linear.pack(up)

    def sums(of: IntegerWeight = weight) -> Tensor:
        return quantize.int8_matmul(x, of)

    want = quantize.finish(sums(), x.scale, bias, activation, residual)
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        assert torch.equal(int8_linear.linear(x, packed, bias, activation, residual), want)
        rows = int8_linear.linear(x, packed, bias, activation, to_rows=True)
        assert all(map(torch.equal, rows, quantize.finish_rows(sums(), x.scale, bias, activation)))
        rows = int8_linear.linear(x, packed, None, activation, up_weight=packed_up)
        assert all(map(torch.equal, rows, quantize.finish_rows(sums(), x.scale, None, activation, sums(up))))
        into = torch.full_like(residual, torch.nan)
        assert int8_linear.linear(x, packed, bias, activation, residual, out=into) is into
        assert torch.equal(into, want)
        into = residual.clone()  # the residual itself
        assert int8_linear.linear(x, packed, bias, activation, into, out=into) is into
        assert torch.equal(into, want)


def test_memory_is_used_again() -> None:
    x, weight, up, *_ = operands(50, 72, 47)
    packed, packed_up, memory = int8_linear.pack(weight), int8_linear.pack(up), Memory()
    first = int8_linear.linear(x, packed, None, "silu", up_weight=packed_up, memory=memory)
    before = [each.data_ptr() for each in memory.tensors]
    again = int8_linear.linear(x, packed, None, "silu", up_weight=packed_up, memory=memory)
    assert again.data.data_ptr() == first.data.data_ptr()
    assert [each.data_ptr() for each in memory.tensors] == before


def test_refuses_what_it_cannot_do() -> None:
    x, weight, _, bias, _ = operands(3, 9, 5)
    packed = int8_linear.pack(weight)
    with pytest.raises(ValueError, match="unknown activation 'relu'; accepted are None, 'silu', 'gelu_tanh'"):
        int8_linear.linear(x, packed, bias, "relu")
    with pytest.raises(ValueError, match=r"packed weight has shape \[1, 2176\]; accepted is \[1, 4224\]"):
        int8_linear.linear(operands(3, 65, 5)[0], packed)
    with pytest.raises(ValueError, match=r"bias has shape \[4\]; accepted is \[5\]"):
        int8_linear.linear(x, packed, bias[:4])
    with pytest.raises(ValueError, match="data is not contiguous"):
        int8_linear.linear(x._replace(data=x.data.t().contiguous().t()), packed)
    with pytest.raises(ValueError, match=r"accepted is \[O, K\], 0 < K < 2\^17"):
        int8_linear.pack(IntegerWeight(torch.zeros(1, 2**17, dtype=torch.int8), torch.ones(1)))
    empty = IntegerRows(x.data[:0], x.scale[:0])
    assert int8_linear.linear(empty, packed).shape == (0, 5)


def test_without_tiles_it_says_so() -> None:
    x, weight, *_ = operands(3, 9, 5)
    packed = int8_linear.pack(weight)
    with emulated.integers_at("baseline"):
        assert not int8_linear.serves()
        with pytest.raises(RuntimeError, match="int8 linear needs AMX, which is not in use here"):
            int8_linear.linear(x, packed)
