"""The constants of every prediction, measured: launch gaps in a graph, rates of memory, barriers.

Gaps and rates by Triton kernels; barriers by ``barriers.cu``, which nvcc compiles: Triton has neither clusters nor a poll
without an atomic.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import ROOT
from benchmarks.gpu_run.timing import us_a_launch
from smolvla_fast.kernels.dependent_launch import gdc_launch_dependents, gdc_wait

BARRIERS = ROOT / "build" / "gpu" / "barriers"
"""The program that was brought along."""
SOURCE = Path(__file__).with_name("barriers.cu")
BLOCK = 4096
HBM_BYTES, L2_BYTES, ONE_BYTES = 2**31, 2**24, 2**22
"""Read once, far above L2; and again and again, within L2: by all, by one multiprocessor."""
PASSES = 64
WEIGHT_BYTES = 4 * 10**6
"""Of a launch of the chain: a denoise step's weights over its launches, with room."""


@triton.jit
def _nothing(out_ptr, DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(out_ptr, 1.0)


@triton.jit
def _read(x_ptr, out_ptr, blocks, passes, BLOCK: tl.constexpr):
    """Each program adds up every so manieth block, past L1, so many times over."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(passes):
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            total += tl.load(x_ptr + block * BLOCK + at, cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


@triton.jit
def _link(x_ptr, weight_ptr, out_ptr, blocks, DEPENDENT: tl.constexpr, BLOCK: tl.constexpr):
    """A launch of a chain: its weights, which depend on nobody, then what the launch before it wrote."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        total += tl.load(weight_ptr + block * BLOCK + at)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()  # in the order of ``dependent_launch.await_inputs``
    x = tl.load(x_ptr + tl.program_id(0))
    tl.store(out_ptr + tl.program_id(0), x + tl.sum(total))


def launch_gaps(device: torch.device, dependent: bool) -> dict[str, float]:
    """µs a launch of an empty kernel, and of a chain of kernels that each read weights of their own."""
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    programs = multiprocessors(device)
    out = torch.zeros(2, programs, device=device)
    blocks = (WEIGHT_BYTES if device.type == "cuda" else 4 * BLOCK) // (4 * BLOCK)
    weights = torch.zeros(16, blocks * BLOCK, device=device)

    def link(i: int) -> Any:
        given = (out[i % 2], weights[i], out[1 - i % 2], blocks)
        return lambda: _link[(programs,)](*given, DEPENDENT=dependent, BLOCK=BLOCK, **options)

    empty = [lambda: _nothing[(1,)](out, DEPENDENT=dependent, **options)]
    return {
        "empty_launch_us": us_a_launch(empty, device, 1000),
        "chain_launch_us": us_a_launch([link(i) for i in range(len(weights))], device, 200),
        "chain_weight_mb": 4e-6 * blocks * BLOCK,
    }


def rate(device: torch.device, size: int, passes: int, programs: int, flying: int = BLOCK) -> float:
    """GB/s that so many programs read, of ``size`` bytes ``passes`` times over, each ``flying`` numbers at once."""
    blocks = (size if device.type == "cuda" else 8 * flying) // (4 * flying)
    x, out = torch.zeros(blocks * flying, device=device), torch.zeros(programs, device=device)
    warps = flying // 512
    call = lambda: _read[(programs,)](x, out, blocks, passes, BLOCK=flying, num_warps=warps)  # noqa: E731
    return 4e-3 * blocks * flying * passes / us_a_launch([call], device, 4)


def rates(device: torch.device) -> dict[str, float]:
    many, again = 4 * multiprocessors(device), PASSES if device.type == "cuda" else 1
    return {
        "hbm_gb_per_s": rate(device, HBM_BYTES, 1, many),
        "l2_gb_per_s": rate(device, L2_BYTES, again, many),
        # With as few under way as each of many programs has, one would measure L2's latency: 16 KB in 0.3 us.
        "l2_of_one_multiprocessor_gb_per_s": rate(device, ONE_BYTES, again, 1, flying=4 * BLOCK),
    }


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def compile_barriers(arch: str, program: Path) -> None:
    """arch  as nvcc knows it, e.g. "sm_90a" or "native"      raises  ``ninja_build.Unavailable`` with what nvcc said"""
    from ninja_build import CUDA_FLAGS, nvcc_compiler, run

    program.parent.mkdir(parents=True, exist_ok=True)
    run(nvcc_compiler(), *CUDA_FLAGS, f"-arch={arch}", "-o", str(program), str(SOURCE))


def barriers(rehearsal: bool) -> dict[str, Any]:
    """µs a barrier of the whole grid, and of clusters of 4 and 8 blocks; of a rehearsal what the compiler made."""
    if not BARRIERS.is_file():
        compile_barriers("sm_90a" if rehearsal else "native", BARRIERS)
    if rehearsal:
        return {"compiled_bytes": BARRIERS.stat().st_size}
    done = subprocess.run([BARRIERS], text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{BARRIERS.name} ended with status {done.returncode}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)
