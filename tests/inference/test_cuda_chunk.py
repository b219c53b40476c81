"""Backend ``cuda`` in the engine: who is asked, what is said where it cannot serve, and what ``status`` tells of it.

Here a loop of torch's ops stands for the one launch, so that no kernel has to run; tests/simt/test_chunk.py has whole
chunks through the kernels themselves, on the host emulator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, chunk, make_policy
from support.recorder import RecorderDriver
from support.threads import elsewhere, once_after
from torch import Tensor

import smolvla_fast
from smolvla_fast import inference
from smolvla_fast.engine.cuda_graphs import GraphCache
from smolvla_fast.ops import availability, extension
from smolvla_fast.ops import select as backends
from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.cuda import library
from smolvla_fast.ops.select import select, table
from smolvla_fast.ops.table import Ops, serving
from smolvla_fast.patch import engine_of
from smolvla_fast.stages.denoise import denoise
from smolvla_fast.testing.policies import make_noise, make_observation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
pytestmark = LEROBOT_ONLY


class Whole:
    """A table with a loop in one call: torch's own, which serves up to two samples."""

    def __init__(self) -> None:
        self.torch = select("torch", CPU, False)
        self.calls = 0
        self.ops: Ops = dataclasses.replace(
            self.torch, backend="cuda", layer_launches=lambda rows: 5, fallback=self.torch,
            denoise_persistent=self.run, why_not_persistent=self.why_not, euler_step=self.euler_step,
        )  # fmt: skip

    def euler_step(self, *args: Any, **kwargs: Any) -> Any:
        return self.torch.euler_step(*args, **kwargs)

    def run(self, *call: Any) -> Tensor:
        self.calls += 1
        return denoise(self.torch, *call)[0]

    def why_not(
        self, dims: Any, expert: Any, heads: Any, kv: Any, noise: Tensor, times: Tensor, guidance: Any
    ) -> str | None:
        assert times.shape[0] == 3 and len(expert) == len(kv.layers) == dims.layers
        return None if noise.shape[0] <= 2 else f"batch {noise.shape[0]}; accepted are 1 and 2"


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Whole:
    """``backend="cuda"`` gives this table."""
    found = Whole()
    monkeypatch.setattr(availability, "_why_not_cuda", lambda device: None)
    monkeypatch.setattr(backends, "_cuda", lambda device, plan: found.ops)
    return found


def patched(backend: str = "cuda", **settings: Any) -> Any:
    return smolvla_fast.patch(make_policy("tiny", num_steps=3), precision="fp32", backend=backend, **settings)


def compare(policy: Any, plain: Any, batch: int) -> bool:
    given, noise = make_observation(plain, batch=batch), make_noise(plain, batch=batch)
    return torch.equal(chunk(policy, given, noise), chunk(plain, given, noise))


def test_one_launch_where_it_serves_and_a_receipt_where_not(whole: Whole) -> None:
    policy, plain = patched(), patched("torch")
    before = smolvla_fast.status(policy)
    assert (before.backend, before.stages["denoise"], before.fallback_reasons) == ("cuda", "cuda, torch", {})
    assert compare(policy, plain, 1) and whole.calls == 1
    now = smolvla_fast.status(policy)
    assert now.stages == {"vision": "torch", "prefix": "torch", "denoise": "cuda"}
    assert (now.step_launches, now.fallback_reasons, now.calls_stock) == (0, {}, 0)
    assert compare(policy, plain, 3) and whole.calls == 1
    now = smolvla_fast.status(policy)
    assert now.fallback_reasons == {"denoise_persistent": "batch 3; accepted are 1 and 2"}
    assert now.stages["denoise"] == "cuda, torch" and now.step_launches == 2 + 5 * 4
    assert now.calls_stock == 0 and now.last_fallback is None
    assert (
        compare(policy, plain, 2) and whole.calls == 2 and smolvla_fast.status(policy).fallback_reasons == {}
    )


def test_a_watched_loop_runs_step_by_step(whole: Whole) -> None:
    """``verify`` shows every step's velocity, and judges the chunk that the caller gets."""
    policy = patched()
    given, noise = make_observation(policy), make_noise(policy)
    report = smolvla_fast.verify(policy, given, noise=noise)
    assert report.passed and len(report.velocity_rel_l2) == policy.config.num_steps and whole.calls == 1
    run = whole.run
    wrong = dataclasses.replace(whole.ops, denoise_persistent=lambda *call: 1.01 * run(*call))
    engine_of(policy.model).ops = wrong
    assert not smolvla_fast.verify(policy, given, noise=noise).passed


def test_the_receipt_is_of_the_graph_that_was_replayed(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay runs no Python: what is said of it was noted when it was captured."""
    plain = patched("torch")
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())
    policy = patched()
    for _ in range(2):
        assert compare(policy, plain, 1)
        now = smolvla_fast.status(policy)
        assert (now.step_launches, now.fallback_reasons, now.stages["denoise"]) == (0, {}, "cuda")
        assert compare(policy, plain, 3)
        now = smolvla_fast.status(policy)
        assert now.step_launches == 22 and "batch 3" in now.fallback_reasons["denoise_persistent"]
    assert now.graphs == 2 and whole.calls == 2, "asked while warming up and while recording, not at a replay"


@pytest.fixture
def shapes(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A captured policy, chunks of it of 1 and 3 samples, and what status says of each."""
    monkeypatch.setattr(inference, "driver_for", lambda device: RecorderDriver())
    policy = patched()
    said: dict[int, Any] = {}

    def run(batch: int) -> None:
        chunk(policy, make_observation(policy, batch=batch), make_noise(policy, batch=batch))

    def status() -> Any:
        now = smolvla_fast.status(policy)
        return now.step_launches, now.stages["denoise"], now.fallback_reasons

    for batch in (1, 3):
        run(batch)
        said[batch] = status()
    assert said[1][0] == 0 and said[3][0] == 22
    return run, status, said


@pytest.mark.check(47)
def test_status_reports_the_chunk_that_ended_last(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's chunk of another shape ends between this one's work and its end."""
    run, status, said = shapes
    once_after(monkeypatch, GraphCache, "run", lambda: run(3))
    run(1)
    assert status() == said[1]


@pytest.mark.check(47)
def test_status_reports_one_chunk_alone(shapes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's chunk of another shape ends while it is asked."""
    run, status, said = shapes
    run(1)
    nodes: Any = GraphCache.__dict__["nodes"]
    monkeypatch.setattr(
        GraphCache, "nodes", property(lambda self: (elsewhere(lambda: run(3)), nodes.fget(self))[1])
    )
    assert status() in said.values()


def test_the_log_says_who_serves(whole: Whole, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="smolvla_fast"):
        patched()
        patched("torch")
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("backend cuda for its ops (vision: torch; prefix: torch; denoise: cuda, torch)")
    assert said[1].endswith("backend torch for all stages")


def test_stages_are_named_by_who_serves_their_ops() -> None:
    torch_ops = select("torch", CPU, False)
    own = dataclasses.replace(
        torch_ops, backend="cuda", fallback=torch_ops, masked_attention=lambda *a: None, image_prep=lambda *a: None
    )  # fmt: skip
    assert [serving(own, stage) for stage in ("vision", "prefix", "denoise")] == [
        "torch",
        *2 * ["cuda, torch"],
    ]
    assert serving(torch_ops, "denoise") == "torch"
    every = {
        name: lambda *a: None
        for name in ("patch_embed", "layer_norm", "linear", "attention", "pixel_shuffle_linear")
    }
    assert serving(dataclasses.replace(own, **every), "vision") == "cuda"


Make = Callable[..., Any]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU as far as the table asks for one; what the compiled library says of it is ``says``."""
    said = {
        "code_version": 90,
        "ptx_version": 90,
        "compute_capability": 90,
        "shared_bytes_per_block": 232448,
    }
    found = SimpleNamespace(capability=(9, 0), missing="", says=lambda index: said, clusters=16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found.capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(extension, "why_missing", lambda kind: found.missing)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    library_of_it = SimpleNamespace(
        device=lambda index: found.says(index),
        linear_residual_clusters=lambda: found.clusters,
        norm_products_shared_bytes=lambda: 231200,
        norm_products_clusters=lambda: found.clusters,
    )
    monkeypatch.setattr(extension, "load", lambda kind: library_of_it)
    monkeypatch.setattr(extension, "build_record", lambda: {"cuda": {"archs": ["80", "90a"]}})
    library._why_no_code.cache_clear()
    yield found
    library._why_no_code.cache_clear()


def test_why_not_on_a_gpu(gpu: Any) -> None:
    assert why_not("cuda", CUDA) is None and why_not("cuda", torch.device("cuda", 1)) is None
    library._why_no_code.cache_clear()

    def refuses(index: int) -> Any:
        raise RuntimeError("no code in this build fits the GPU: no kernel image is available")

    gpu.says = refuses
    reason = (
        "smolvla_fast._cuda does not run on this GPU: no code in this build fits the GPU: no kernel image is available; "
        "it was compiled for sm_80, sm_90a"
    )
    assert why_not("cuda", CUDA) == reason
    gpu.capability = (7, 5)
    assert (
        why_not("cuda", CUDA) == "compute capability 7.5 has no bf16 tensor cores; accepted is 8.0 and later"
    )
    gpu.missing = "smolvla_fast._cuda was not compiled: no nvcc"
    assert why_not("cuda", CUDA) == gpu.missing
    with pytest.raises(
        RuntimeError, match=r"backend='cuda' cannot serve this policy: .*no nvcc; 'auto' takes"
    ):
        select("cuda", CUDA, stock_order=False)


def test_why_not_without_a_gpu() -> None:
    reason = "its kernels run on an NVIDIA GPU, the policy is on cpu"
    assert why_not("cuda", CPU) == reason
    assert why_not("cuda", torch.device("mps")) == reason.replace("cpu", "mps")
    policy = make_policy("tiny")
    before = dict(policy.model.__dict__), type(policy.model)
    with pytest.raises(
        RuntimeError, match=f"backend='cuda' cannot serve this policy: {reason}; 'auto' takes"
    ):
        smolvla_fast.patch(policy, backend="cuda")
    assert (dict(policy.model.__dict__), type(policy.model)) == before
    with pytest.raises(RuntimeError, match="precision='exact' runs stock's own ATen calls"):
        smolvla_fast.patch(policy, precision="exact", backend="cuda")


def test_fp8_is_not_for_it(gpu: Any) -> None:
    with pytest.raises(RuntimeError, match="precision='fp8' .*backend='cuda' has no kernels for it"):
        select("cuda", CUDA, stock_order=False, quantized="e4m3")


def test_kernels_without_the_code_for_clusters(gpu: Any) -> None:
    """linear_residual is Triton's there, with the reason; all else is as ever. GPUs without clusters: tests/simt."""
    pytest.importorskip("triton")
    said = gpu.says(0)
    gpu.says = lambda index: said | dict(ptx_version=80)
    ops = select("cuda", CUDA, False)
    assert ops.fallback is not None and ops.linear_residual is ops.fallback.linear_residual
    assert ops.masked_attention is not ops.fallback.masked_attention
    reasons = {row.op: row.reason for row in table(CUDA) if row.backend == "cuda"}
    for op in ("linear_residual", "norm_swiglu"):
        assert "`SMOLVLA_CUDA_ARCHS=90a pip install .` compiles it" in reasons[op]


def test_the_table_says_who_serves_a_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU Triton's table with the kernels in it; without Triton torch's. ``auto`` takes Triton."""
    pytest.importorskip("triton")
    ops = select("cuda", CUDA, False)
    triton = ops.fallback
    assert triton is not None and triton.backend == "triton"
    own = ("image_prep", "masked_attention", "euler_step", "linear_residual", "denoise_persistent")
    for name in backends.NAMES:  # Triton's fused attention would pass over the kernel here
        assert (getattr(ops, name) is not getattr(triton, name)) == (name in (*own, "attention_residual")), (
            name
        )
    assert ops.layer_launches is triton.layer_launches
    assert select("auto", CUDA, False).backend == "triton"
    rows = {(row.op, row.backend): row for row in table(CUDA)}
    assert all(rows[name, "cuda"].available for name in (*own, "prepare_mask"))
    assert rows["cross_kv", "cuda"].reason == "the kernel of 'triton' serves it"
    assert rows["norm_qkv_rope", "cuda"].reason.endswith("of prepared rows one of CUDA C++ in Triton's table")
    assert backends.backend_ops("cpu").missing["suffix_fold"] == "torch's own call serves it"
    for backend in ("torch", "triton"):
        assert rows["denoise_persistent", backend].reason == "it runs the denoise loop op by op"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fallback = select("cuda", CUDA, False).fallback
    assert fallback is not None and fallback.backend == "torch"
    rows = {(row.op, row.backend): row for row in table(CPU)}
    assert (
        rows["denoise_persistent", "cuda"].reason == "its kernels run on an NVIDIA GPU, the policy is on cpu"
    )
