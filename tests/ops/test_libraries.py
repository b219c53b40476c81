"""What NVIDIA's libraries compute beside our kernels: who has it, when it serves by default, and that its call is the op's.

Their numerics are a GPU's to judge (tests/gpu/test_ops_on_device.py). Here torch's own CPU code stands under their names.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.contract import check, reference_module
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from smolvla_fast.cli import main
from smolvla_fast.model.weights import Affine, LayerNorm, VisionLayer
from smolvla_fast.ops import choice as choices
from smolvla_fast.ops.availability import why_not_library
from smolvla_fast.ops.choice import Choice, _torch, choose, refused
from smolvla_fast.ops.defaults import BESIDE_TRITON
from smolvla_fast.ops.select import backend_ops, reference_ops
from smolvla_fast.ops.shape_class import Attention, Product
from smolvla_fast.ops.stream_offset import StreamOffset
from smolvla_fast.ops.table import Ops
from smolvla_fast.ops.torch import fused_attention
from smolvla_fast.ops.torch.linear import aten, cublas, cublaslt
from smolvla_fast.stages.vision import vision_layer
from smolvla_fast.tune.candidates import candidates
from smolvla_fast.tune.recorder import Call, Recorded

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VISION = Attention(2, 1024, 1024, "12", 64, BF16, BF16)
LIBRARIES = {"cublas", "cublaslt", "flash-sdpa", "cudnn"}
GPUS = {"A100": (8, 0), "A6000": (8, 6), "4090": (8, 9), "H100": (9, 0), "B200": (10, 0), "5090": (12, 0)}


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """All that is asked of a GPU and of the torch for it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)

    def played(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    played((9, 0))
    return played


def on_a_gpu() -> Ops:
    pytest.importorskip("triton")
    return choose(backend_ops("triton"), CUDA, "triton", None)


# Who has them


@pytest.mark.parametrize("gpu", GPUS)
def test_they_are_candidates_on_a_gpu(nvidia: Callable[..., None], gpu: str) -> None:
    nvidia(GPUS[gpu])
    assert set(dict(_torch(reference_ops(), CUDA))) >= LIBRARIES
    assert not set(dict(_torch(reference_ops(), CPU))) & LIBRARIES


def test_a_reason_says_why_they_are_not(nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_library("flash", CUDA) == "the package flash-attn is not installed"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert why_not_library("flash-sdpa", CUDA) == "this torch was built without FlashAttention"
    monkeypatch.delattr(torch.backends.cuda, "is_flash_attention_available")
    assert why_not_library("flash-sdpa", CUDA) == "this torch was built without FlashAttention"
    old = SimpleNamespace(default=torch.ops.aten._scaled_dot_product_flash_attention.default)
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", old)
        assert why_not_library("cudnn", CUDA) == "this torch's call of it is older than torch 2.6's"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert why_not_library("cudnn", CUDA) == "this torch has no cuDNN"
    assert why_not_library("cublaslt", CUDA) is None
    nvidia((7, 5))
    assert {why_not_library(name, CUDA) for name in LIBRARIES} == {
        "compute capability 7.5 has no bf16 tensor cores; accepted is 8.0 and later"
    }
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert all("AMD's (ROCm 6.4)" in str(why_not_library(name, CUDA)) for name in LIBRARIES)
    assert not set(dict(_torch(reference_ops(), CUDA))) & LIBRARIES


def test_doctor_shows_them(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, total_memory=2**36, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "GELU by cuBLASLt a candidate" in out and "attention by cuDNN a candidate" in out
    assert "attention by torch's FlashAttention this torch was built without FlashAttention" in out


# When they serve


def product(rows: int = 2048, end: tuple[Any, ...] = (), dtype: Any = BF16, x: Any = None) -> Product:
    return Product(rows, 768, (768,), dtype, x or dtype, end)


@pytest.mark.parametrize("gpu", GPUS)
def test_defaults_of_vision(nvidia: Callable[..., None], gpu: str) -> None:
    nvidia(GPUS[gpu])
    ops = on_a_gpu()
    linear, attention = ops.linear, ops.attention
    assert isinstance(linear, Choice) and isinstance(attention, Choice)
    for shape, name in {
        product(): "aten",
        product(dtype=F16): "aten",
        product(end=("gelu_tanh",)): "cublaslt",
        product(end=("gelu_tanh",), dtype=F16): "cublaslt",
        product(512): "triton",  # 257 to 512 rows
        product(512, ("gelu_tanh",)): "triton",
        product(end=(F32,)): "cublas",  # a residual
        product(end=(F32,), dtype=F16): "cublas",
        product(end=(BF16,)): "triton",
        product(512, (F32,)): "triton",
        product(end=("gelu_tanh", F32)): "triton",
        product(end=("silu",)): "triton",
        product(x=F32): "triton",  # it converts on its way
        product(dtype="quantized", x=F32): "triton",
        product(dtype=F32): "aten",
        product(dtype=F32, end=("tf32",)): "triton",
    }.items():
        assert linear.default(shape) == name, shape
    leads = GPUS[gpu][0] in (9, 10)  # as torch prefers it there
    for case, name in {
        VISION: "cudnn" if leads else "flash-sdpa",
        VISION._replace(q=F16, kv=F16): "cudnn" if leads else "flash-sdpa",
        VISION._replace(batch=1): "cudnn" if leads else "triton",  # FlashAttention would take two launches
        VISION._replace(queries=512, keys=512): "triton",
        VISION._replace(q=F32, kv=F32): "triton",
        VISION._replace(head_dim=20): "triton",  # it would be padded
        VISION._replace(batch=64, queries=64, keys=64): "triton",
    }.items():
        assert attention.default(case) == name, case


def test_triton_serves_where_torch_has_no_flash_attention(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia((8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    attention = on_a_gpu().attention
    assert isinstance(attention, Choice) and attention.default(VISION) == "triton"


@pytest.mark.parametrize(("version", "has"), [(91500, True), (None, True), (91900, False)])
def test_flash_attention_serves_a_hopper_without_the_cudnn_that_torch_prefers(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch, version: int | None, has: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: has)
    attention = on_a_gpu().attention
    assert isinstance(attention, Choice) and attention.default(VISION) == "flash-sdpa"


def test_off_a_gpu_triton_keeps_its_defaults() -> None:
    pytest.importorskip("triton")
    ops = choose(backend_ops("triton"), CPU, "triton", None)
    assert isinstance(ops.linear, Choice) and isinstance(ops.attention, Choice)
    assert {ops.linear.default(product(end=end)) for end in ((), ("gelu_tanh",))} == {"triton"}
    assert ops.attention.default(VISION) == "triton"


def test_cudnn_takes_odd_lengths_from_where_they_are_right(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = VISION._replace(queries=1000, keys=1000)
    attention = on_a_gpu().attention
    assert isinstance(attention, Choice)
    assert "cudnn" in attention.names(VISION) and "cudnn" in attention.names(odd)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert "cudnn" in attention.names(VISION) and "cudnn" not in attention.names(odd)
    assert not {"cudnn", "flash-sdpa"} & set(attention.names(VISION._replace(q=F32, kv=F32)))


def test_the_tuner_lists_them(nvidia: Callable[..., None]) -> None:
    ops = on_a_gpu()
    x, weight, bias = torch.zeros(600, 8, dtype=BF16), torch.zeros(16, 8, dtype=BF16), torch.zeros(16)
    for choice, args, kwargs, names in (
        (ops.linear, (x, weight, bias.bfloat16()), dict(activation="gelu_tanh"), ["cublaslt", "triton", "aten"]),
        (ops.attention, (x.expand(2, -1, -1),) * 3, dict(heads=1), ["cudnn", "triton", "sdpa", "flash-sdpa"]),
    ):  # fmt: skip
        assert isinstance(choice, Choice)
        choice.candidates["triton"] = lambda *args, **kwargs: None  # asks for no tile
        shape = choice._shape_of(*args, **kwargs)
        assert candidates(Recorded(choice, shape, calls=[Call(args, kwargs)])) == names


# What a vision layer launches


class Launches(TorchDispatchMode):
    """Counts the calls of torch that are a launch: all but views and memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [each.alias_info for each in func._schema.returns if each.alias_info is not None]
        name = func._schema.name.removeprefix("aten::")
        is_view = any(not each.is_write for each in aliases)
        if func.namespace == "aten" and not is_view and name != "empty":
            self.found[name] += 1
        if func is torch.ops.aten.addmm.dtype_out:  # of which torch's fake tensors take the dtype for beta
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


def launches_of_a_layer(served: Callable[[Ops], None], images: int = 2) -> Counter[str]:
    """Of a SigLIP layer in bf16 beside an fp32 residual stream, on tensors that have a GPU and no data."""
    ops, width, hidden = on_a_gpu(), 768, 3072
    served(ops)

    def counted(op: str) -> Callable[..., Tensor]:
        def one_launch(*args: Any, **kwargs: Any) -> Tensor:
            counter.found["triton"] += 1
            x = args[0]
            outputs = args[1].shape[0] if op == "linear" else width
            dtype = F32 if kwargs.get("residual") is not None else BF16
            if kwargs.get("offset") is not None:
                kwargs["offset"].bias = None  # a norm has added it
            return torch.empty((*x.shape[:-1], outputs), dtype=dtype, device=x.device)

        return one_launch

    for op in ("linear", "attention", "layer_norm"):
        getattr(ops, op).candidates["triton"] = counted(op)

    def empty(*size: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.empty(size, dtype=dtype, device="cuda")

    with FakeTensorMode(), Launches() as counter:
        x = empty(images, 1024, width, dtype=F32)
        norm, square = LayerNorm(empty(width), empty(width), 1e-6), Affine(empty(width, width), empty(width))
        up = Affine(empty(hidden, width), empty(hidden))
        down = Affine(empty(width, hidden), empty(width))
        layer = VisionLayer(norm, square, square, square, square, norm, up, down)
        counter.found.clear()
        y = vision_layer(ops, layer, x, 12, StreamOffset())
    assert y.shape == x.shape and y.dtype is F32 and y.is_contiguous()
    return counter.found


def test_a_vision_layer_launches_no_more_than_by_kernels_of_ours(nvidia: Callable[..., None]) -> None:
    def by_triton(ops: Ops) -> None:
        for op in ("linear", "attention"):
            getattr(ops, op)._rule = None

    assert launches_of_a_layer(by_triton) == {"triton": 9}
    products = {"addmm": 5, "_addmm_activation": 1}
    for images in (1, 2):
        libraries = {"_scaled_dot_product_cudnn_attention": 1, **products}
        assert launches_of_a_layer(lambda ops: None, images) == {"triton": 2, **libraries}
    nvidia((8, 0))
    libraries = {"_scaled_dot_product_flash_attention": 1, **products}
    assert launches_of_a_layer(lambda ops: None) == {"triton": 2, **libraries}
    assert launches_of_a_layer(lambda ops: None, images=1) == {"triton": 3, **products}

    def all_by_aten(ops: Ops) -> None:
        ops.linear._rule = lambda shape: "aten"  # type: ignore[attr-defined]

    # GELU and the two residuals: a launch each, which is why these stay with our kernels.
    assert launches_of_a_layer(all_by_aten).total() == 12


# That their calls are the op's


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()], ids=str)
def test_cublaslt_hands_everything_over(lead: tuple[int, ...]) -> None:
    """On a CPU torch gives this call the erf form of GELU; that it is the tanh form on a GPU is seen there."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=generator) for s in ((*lead, 33), (47, 33), (47,)))
    got = cublaslt(x.double(), weight, bias, "gelu_tanh")
    # A sum of 33 products around 1 in another order.
    torch.testing.assert_close(got, F.gelu(F.linear(x, weight, bias)), rtol=1e-5, atol=1e-5)
    assert got.shape == (*lead, 47) and got.dtype is F32 and got.is_contiguous()
    residual = torch.randn(*lead, 47, generator=generator)
    for rest in ((None, "gelu_tanh"), (bias, None), (bias, "silu"), (bias, "gelu_tanh", residual)):
        assert torch.equal(cublaslt(x, weight, *rest), aten(x, weight, *rest))
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        cublaslt(x, weight, bias, "relu")


@contextmanager
def addmm_on_a_cpu() -> Iterator[list[int]]:
    """Inside, torch's product of 16 bits into fp32 serves CPU tensors. The list gets the address of each result."""
    written: list[int] = []

    def call(self: Tensor, x: Tensor, weight: Tensor, out_dtype: Any, *, out: Tensor, **_: Any) -> Tensor:
        assert x.dtype is weight.dtype and out.data_ptr() == self.data_ptr(), "or it would be a copy more"
        written.append(out.data_ptr())
        return out.copy_(self + x.to(out_dtype) @ weight.to(out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype_out", call, "CPU")
        yield written


def residual_product(lead: tuple[int, ...] = (3, 5)) -> tuple[Tensor, ...]:
    """x, weight, bias, residual"""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(*size, generator=generator) for size in ((*lead, 33), (47, 33), (47,), (*lead, 47))
    )
    return x.bfloat16(), weight.bfloat16(), bias.bfloat16(), 100 * residual


def test_cublas_adds_a_product_to_the_stream_where_it_lies() -> None:
    x, weight, bias, stream = residual_product()
    truth = stream.double() + F.linear(x.double(), weight.double(), bias.double())
    with addmm_on_a_cpu() as written:
        plain = cublas(x, weight, bias, residual=stream)
        assert written != [stream.data_ptr()] and not torch.equal(plain, stream), "a caller's stream is kept"
        offset = StreamOffset()
        assert cublas(x, weight, bias, residual=stream, offset=offset) is stream
    assert offset.bias is bias and offset.vector is None
    for got in (plain, offset.added_to(stream)):
        # fp32 beside sums of 33 products of 16 bits and a stream of some hundreds.
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=4 * 2.0**-24 * truth.abs().max().item())


def test_cublas_leaves_what_is_not_its_own_to_aten() -> None:
    x, weight, bias, stream = residual_product()
    offset = StreamOffset()
    strided = stream.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (
        (x, weight, bias), (x, weight, bias, "gelu_tanh", stream), (x, weight, bias, None, stream.bfloat16()),
        (x.float(), weight, bias, None, stream), (x, weight, bias, None, strided),
    ):  # fmt: skip
        assert torch.equal(cublas(*given, offset=offset), aten(*given))
    assert not offset.terms


def test_a_refused_product_leaves_stream_and_offset_alone(nvidia: Callable[..., None]) -> None:
    """So that the kernel that serves in its place adds product and bias once."""
    x, weight, bias, stream = residual_product()
    linear = on_a_gpu().linear
    assert isinstance(linear, Choice)
    linear.candidates["triton"] = lambda x, weight, bias, residual: aten(x, weight, bias, None, residual)
    linear._rule = lambda shape: "cublas"
    offset, before = StreamOffset(), stream.clone()
    got = linear(x, weight, bias, residual=stream, offset=offset)  # torch has none for a CPU
    assert "cublas refused" in str(linear.refused) and torch.equal(stream, before) and not offset.terms
    assert torch.equal(got, aten(x, weight, bias, None, stream))


def test_who_knows_no_offset_reads_the_whole_stream(nvidia: Callable[..., None]) -> None:
    _, weight, bias, stream = residual_product()
    norm = on_a_gpu().layer_norm
    assert isinstance(norm, Choice)
    norm._rule = lambda shape: "torch"
    offset = StreamOffset(weight[:, 0], bias)
    got = norm(stream, bias, bias, 1e-6, offset=offset)
    want = F.layer_norm(stream + weight[:, 0].float() + bias.float(), (47,), bias.float(), bias.float(), 1e-6)
    torch.testing.assert_close(got, want)
    assert len(offset.terms) == 2, "what stands beside the stream stands there still"


def test_biases_that_no_norm_has_added_are_summed_in_fp32() -> None:
    offset, biases = (
        StreamOffset(),
        [torch.tensor([256.0, 1.0]).bfloat16(), torch.tensor([1.0, 2.0]).bfloat16()],
    )
    for bias in (*biases, biases[0]):
        offset.leave(bias)
    assert torch.equal(offset.added_to(torch.zeros(2)), torch.tensor([513.0, 4.0]))


@contextmanager
def on_a_cpu(name: str) -> Iterator[None]:
    """Inside, torch's call of this name serves CPU tensors, by its plain attention."""

    def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, scale: float) -> tuple[Any, ...]:
        assert q.shape == k.shape == v.shape and q.stride() == k.stride() == v.stride() and not any(args)
        out = (
            F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous().transpose(1, 2)
        )
        none = torch.empty(0)
        return out, none, none, none, 0, 0, none, none, none

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(name, call, "CPU")
        yield


@pytest.mark.parametrize("name", ["flash-sdpa", "cudnn"])
def test_attention_by_torchs_own_calls(name: str) -> None:
    ops = replace(reference_ops(), attention=fused_attention.ATTENTION[name])
    call = "cudnn" if name == "cudnn" else "flash"
    with on_a_cpu(f"_scaled_dot_product_{call}_attention"):
        for case in reference_module("attention").CASES:
            check(reference_ops(), ops, "attention", case, BF16)


def test_flash_attention_is_a_candidate_where_it_is_installed(
    nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package installs beside a GPU only: here its function is written down as its documentation has it."""

    def flash_attn_func(q: Any, k: Any, v: Any, softmax_scale: float) -> Any:
        batch, tokens, heads, head_dim = q.shape  # (batch_size, seqlen, nheads, headdim)
        assert k.shape == v.shape == (batch, tokens, heads, head_dim)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale)
        return found.transpose(1, 2).contiguous()

    name = "flash_attn"
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    ops = replace(reference_ops(), attention=fused_attention.flash)
    for case in reference_module("attention").CASES:
        check(reference_ops(), ops, "attention", case, torch.bfloat16)
    assert "flash" in dict(_torch(reference_ops(), torch.device("cuda")))
    assert "flash" not in dict(_torch(reference_ops(), CPU))
    attention = on_a_gpu().attention
    assert isinstance(attention, Choice)
    fits = [VISION, VISION._replace(q=F32, kv=F32), VISION._replace(head_dim=512)]
    assert ["flash" in attention.names(each) for each in fits] == [True, False, False]
    monkeypatch.delitem(sys.modules, name)
    assert "flash" not in dict(_torch(reference_ops(), torch.device("cuda")))


# Kernels of CUDA C++ in the place of Triton's


@pytest.mark.parametrize("error", [RuntimeError("invalid argument"), ValueError("x is strided")], ids=str)
def test_a_kernel_that_fails_leaves_its_op_to_tritons(error: Exception) -> None:
    """At its first call, and with a receipt: not the whole chunk to stock."""
    calls: list[str] = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append("cuda")
        raise error

    def serving(*args: Any, **kwargs: Any) -> str:
        calls.append("triton")
        return "triton's"

    op = Choice("linear_residual", {"triton": serving, "cuda": failing}, lambda shape: "cuda", {})
    given = [torch.zeros(*size, dtype=BF16) for size in ((5, 16), (8, 16), (5, 8))]
    assert [op(*given) for _ in range(2)] == ["triton's"] * 2 and calls == ["cuda", "triton", "triton"]
    assert list(op.served.values()) == ["triton"]
    assert list(op.refused.values()) == [f"cuda refused: {error}; triton serves"]


def test_a_device_that_cannot_be_asked_has_tritons_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from smolvla_fast.ops.cuda import beside_triton

    def failing(device: torch.device) -> Any:
        raise RuntimeError("cudaOccupancyMaxActiveClusters: out of memory")

    monkeypatch.setattr(choices, "why_not", lambda name, device: None)
    monkeypatch.setattr(beside_triton, "why_no_clusters", failing)
    found, unserved = choices.beside_triton(CUDA)
    assert not found and set(unserved) == set(BESIDE_TRITON)
    assert all("out of memory" in reason for reason in unserved.values())


def test_a_hopper_without_them_says_why(nvidia: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """In ``status``, as what its default does without; another GPU never had them by default."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choices, "beside_triton", lambda device: ({}, {"norm_swiglu": "not compiled"}))
    for capability, said in (((9, 0), True), ((8, 0), False)):
        nvidia(capability)
        assert ("not compiled" in str(refused(on_a_gpu()))) is said
