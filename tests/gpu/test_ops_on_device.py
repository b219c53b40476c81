"""The contract of every op on the GPU, at SmolVLA's own sizes, in the dtypes that only a device can do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.contract import OPS, check, inputs_in, reference_module, run, to_device
from support.tunings import Everywhere

from smolvla_fast.ops.availability import why_not, why_not_library
from smolvla_fast.ops.plan import Plan
from smolvla_fast.ops.select import reference_ops, select
from smolvla_fast.ops.stream_offset import StreamOffset
from smolvla_fast.ops.torch.linear import cublas

pytestmark = pytest.mark.gpu
# ``cuda`` has kernels of its own for three; the rest of its table is Triton's.
SERVED = [(op, name) for op in OPS for name in ("torch", "triton")]
SERVED += [("attention_residual", "triton")]  # nobody else has it
SERVED += [(op, "cuda") for op in ("image_prep", "masked_attention", "euler_step")]
LIBRARIES = {"cublaslt": "linear", "flash-sdpa": "attention", "cudnn": "attention", "flash": "attention"}
SERVED += [(op, name) for name, op in LIBRARIES.items()]
CASES = [
    (op, name, case, dtype)
    for op, name in SERVED
    for case in reference_module(op).CASES
    for dtype in (torch.float32, torch.bfloat16, *[torch.float16] * (name == "cuda" or name in LIBRARIES))
]


def ops_of(backend: str) -> Any:
    device = torch.device("cuda")
    reason = (why_not_library if backend in LIBRARIES else why_not)(backend, device)
    if reason:
        pytest.skip(reason)
    if backend in LIBRARIES:  # where it takes no such dtype or size, torch's own choice serves
        return select("torch", device, stock_order=False, plan=Plan(Everywhere(backend)))
    return select(backend, device, stock_order=False)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("op", "backend", "case", "dtype"), CASES, ids=str)
def test_contract_on_device(
    op: str, case: dict[str, int], backend: str, dtype: torch.dtype, seed: int
) -> None:
    check(reference_ops(), ops_of(backend), op, case, dtype, seed, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case", [case for case in reference_module("linear").CASES if case["rows"] > 512], ids=str
)
def test_cublas_adds_a_product_to_the_stream(case: dict[str, int], dtype: torch.dtype) -> None:
    """In place, whose bias the norm behind it adds: beside one product and one addition by torch."""
    if reason := why_not_library("cublas", torch.device("cuda")):
        pytest.skip(reason)
    given = to_device(inputs_in("linear", case, dtype, 0)[0], "cuda")
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    stream = 100 * torch.randn(case["rows"], case["outputs"], device="cuda")
    truth = stream.double() + torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    eager = (stream + torch.nn.functional.linear(x, weight, bias) - truth).abs().max()
    offset, place = StreamOffset(), stream.data_ptr()
    got = cublas(x, weight, bias, residual=stream, offset=offset)
    assert got.data_ptr() == place and offset.bias is bias
    assert (offset.added_to(got) - truth).abs().max() <= 2 * eager


@pytest.mark.parametrize(("op", "backend"), SERVED)
def test_captured_op_has_the_bits_of_a_plain_call(op: str, backend: str) -> None:
    ops = ops_of(backend)
    inputs = to_device(inputs_in(op, reference_module(op).CASES[0], torch.bfloat16, 0)[0], "cuda")
    plain = run(ops, op, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(ops, op, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(ops, op, inputs)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for name, value in plain.items():
        assert torch.equal(captured[name], value), f"{op}.{name} differs when replayed"
