"""``backend="auto"`` where nothing of ours was measured ahead of torch: torch serves, and the reason is said."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.engine import cuda_graphs as graphs
from smolvla_fast.inference import Engine
from smolvla_fast.measure import system
from smolvla_fast.model.precision import TIERS, resolve_tier
from smolvla_fast.ops import availability, extension
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.defaults import default_rules
from smolvla_fast.ops.shape_class import Product
from smolvla_fast.ops.torch import linear as aten_linear
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy

ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

needs_kernels = pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu"))


def place(name: str = "x86_64", best: str = "avx2", openmp: bool = True) -> Any:
    """All that is asked of a machine, so that this one has no say."""

    def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platform, "machine", lambda: name)
        monkeypatch.setattr(
            extension.load("cpu"), "levels", lambda: ["baseline", *([best] if best != "baseline" else [])]
        )
        monkeypatch.setattr(extension, "build_record", lambda: {"cpu": {"built": True, "openmp": openmp}})

    return elsewhere


PLACES = {
    "Linux on ARM": (place("aarch64"), "its kernels for aarch64 have run in an emulator alone"),
    "Apple": (place("arm64"), "its kernels for arm64 have run in an emulator alone"),
    "POWER": (place("ppc64le"), "this processor is ppc64le"),
    "RISC-V": (place("riscv64"), "this processor is riscv64"),
    "unknown": (place(""), "for x86-64 and ARM alone"),
    "no OpenMP": (place(openmp=False), "compiled without OpenMP and run on threads of their own"),
    "no AVX2": (place(best="baseline"), "from AVX2 on, which this processor has not"),
}


@needs_kernels
@pytest.mark.parametrize("place", PLACES)
def test_auto_leaves_cpu_kernels_that_were_not_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    elsewhere, words = PLACES[place]
    elsewhere(monkeypatch)
    policy = make_policy("tiny", origin="ours")
    with caplog.at_level("INFO", logger="smolvla_fast"):
        smolvla_fast.patch(policy)
    policy.predict_action_chunk(make_observation(policy), noise=make_noise(policy))
    now = smolvla_fast.status(policy)
    assert (now.active, now.backend, now.calls_fast, now.calls_stock) == (True, "torch", 1, 0)
    assert words in now.fallback_reasons["cpu"] and now.fallback_reasons["cpu"] in caplog.text
    assert "backend='cpu' takes them all the same" in now.fallback_reasons["cpu"]
    smolvla_fast.patch(policy, backend="cpu")
    policy.predict_action_chunk(make_observation(policy), noise=make_noise(policy))
    now = smolvla_fast.status(policy)
    assert (now.backend, now.calls_fast, now.fallback_reasons) == ("cpu", 2, {})


@needs_kernels
@pytest.mark.parametrize("tier", ["int8", "int16"])
@pytest.mark.parametrize("place", ["Linux on ARM", "no OpenMP"])
def test_integers_are_refused_there_unless_their_kernels_are_named(
    monkeypatch: pytest.MonkeyPatch, place: str, tier: str
) -> None:
    """It was asked for to be faster; torch has nothing that it could be served by instead."""
    elsewhere, words = PLACES[place]
    elsewhere(monkeypatch)
    monkeypatch.setattr("smolvla_fast.ops.cpu.int8.why_not", lambda device: None)
    with pytest.raises(RuntimeError, match=f"precision='{tier}' cannot serve this policy: .*{words}"):
        backends.select("auto", CPU, False, tier)
    assert words in str(backends.why_not_quantized(CPU)[tier])
    assert backends.select("cpu", CPU, False, tier).backend == "cpu"


@needs_kernels
@pytest.mark.parametrize("place", ["Apple", "no OpenMP"])
def test_doctor_says_what_auto_does_not_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    elsewhere, words = PLACES[place]
    elsewhere(monkeypatch)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "backend='auto' takes torch here" in out
    assert "backend='auto' does not take cpu: " in out and words in out


@needs_kernels
def test_auto_takes_the_kernels_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """An x86-64 with AVX2 and OpenMP, under each name that systems give it."""
    monkeypatch.setattr(extension, "build_record", lambda: {"cpu": {"built": True, "openmp": True}})
    monkeypatch.setattr(extension.load("cpu"), "levels", lambda: ["baseline", "avx2"])
    for name in ("x86_64", "AMD64", "amd64"):
        monkeypatch.setattr(platform, "machine", lambda name=name: name)
        assert (
            backends.select("auto", CPU, False).backend == "cpu" and availability.fallback_reasons(CPU) == {}
        )


@pytest.mark.parametrize("capability", ["DEFAULT", "NO AVX", "NEON", "SVE256", "VSX", "Z VECTOR"])
def test_products_are_stocks_own_call_where_onednn_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert not aten_linear.onednn_serves(torch.float32)
    assert not aten_linear.onednn_serves(torch.bfloat16)


@needs_kernels
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_fp32_products_of_many_rows_are_ours_where_weights_are_packed(
    monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """By the level of our kernels, whatever torch's own loops use."""
    monkeypatch.setattr(extension.load("cpu"), "level", lambda: level)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    rules, packs = default_rules("cpu", CPU), level == "avx2"

    def served(op: str, rows: int, dtype: torch.dtype = torch.float32, end: tuple[Any, ...] = ()) -> str:
        return rules[op](Product(rows, 960, (960,), dtype, dtype, end))

    for op in (
        "linear",
        "cross_kv",
        "pixel_shuffle_linear",
        "norm_swiglu",
        "linear_residual",
        "norm_qkv_rope",
    ):
        assert (served(op, 256) == "cpu") is (served(op, 2048) == "cpu") is packs, op
    assert served("norm_swiglu", 64) == "cpu" and served("norm_swiglu", 256, torch.bfloat16) != "cpu"
    assert served("linear", 2048, end=("gelu_tanh",)) == "cpu"


@pytest.fixture(params=[(9, 4), (9, 0), (11, 0), (12, 0)], ids=["gfx942", "gfx90a", "gfx1100", "gfx1201"])
def rocm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A torch built for AMD's GPUs, which calls them "cuda" and gives them capabilities that look like NVIDIA's."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return "its kernels run on an NVIDIA GPU, this torch is built for AMD's (ROCm 6.4.43482)"


def test_auto_takes_torch_on_an_amd_gpu(rocm: str) -> None:
    assert backends.select("auto", CUDA, False).backend == "torch"
    assert backends.select("auto", CUDA, True).backend == "reference"
    assert availability.fallback_reasons(CUDA) == {"triton": rocm}
    assert {row.reason for row in backends.table(CUDA) if row.backend in ("triton", "cuda")} == {rocm}


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_an_nvidia_backend_is_refused_on_an_amd_gpu(rocm: str, backend: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        backends.select(backend, CUDA, False)
    assert rocm in str(refused.value) and "'auto' takes what can" in str(refused.value)


def test_8_bits_are_refused_on_an_amd_gpu(rocm: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        backends.select("auto", CUDA, False, "e4m3")
    assert rocm in str(refused.value)
    assert backends.why_not_quantized(CUDA)["fp8"] == rocm
    assert "the policy is on cuda" in str(backends.why_not_quantized(CUDA)["int8"])


@pytest.mark.parametrize("precision", ["auto", "exact", "bf16"])
def test_no_graph_is_captured_on_an_amd_gpu(rocm: str, precision: str) -> None:
    assert graphs.driver_for(CUDA) is None
    engine = Engine(resolve_tier(precision, torch.float32), "auto", CUDA)
    assert engine.graphs is None and "ops run one by one" in engine.report()["fallback_reasons"]["graph"]
    assert engine.ops.backend == ("reference" if TIERS.get(precision) is TIERS["exact"] else "torch")


def test_doctor_shows_an_amd_gpu(
    rocm: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = SimpleNamespace(
        name="AMD Instinct MI300X",
        major=9,
        minor=4,
        total_memory=2**37,
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=304,
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    assert system.gpus()[0]["compute_capability"] == card.gcnArchName
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "backend='auto' takes torch here" in out and f"does not take triton: {rocm}" in out


BROKEN = {
    "does not import": "raise ImportError('libtriton.so: wrong ELF class')",
    "is a stub": "__version__ = '0.0.1'",
}
ASK = """
import sys, torch
from smolvla_fast.ops import availability
from smolvla_fast.ops import select as backends
torch.cuda.get_device_capability = lambda device=None: (9, 0)
cuda, before = torch.device("cuda"), set(sys.modules)
assert "triton" not in before
for sys.path[0] in sys.argv[1:]:
    print(backends.select("auto", cuda, False).backend)
    print(availability.fallback_reasons(cuda)["triton"])
    for name in set(sys.modules) - before:
        if name.startswith(("triton", "smolvla_fast")):
            del sys.modules[name]
"""


def test_torch_serves_a_gpu_where_triton_is_broken(tmp_path: Path) -> None:
    for fault, source in BROKEN.items():
        (tmp_path / fault / "triton").mkdir(parents=True)
        (tmp_path / fault / "triton" / "__init__.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", ASK, *(str(tmp_path / fault) for fault in BROKEN)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert said[::2] == ["torch", "torch"]
    assert all(reason.startswith("Triton is installed and does not load (") for reason in said[1::2])
    assert ["wrong ELF class" in reason for reason in said[1::2]] == [True, False]
