"""`make aot`: every Triton kernel compiled ahead of time for every target and at SmolVLA's real sizes.

The ordinary launchers run on CPU tensors; what they launch is compiled for the target and not run, so no signature stands
here a second time.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from support.contract import changed, leaves, reference_module
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks import ROOT
from benchmarks.compiled.kernels import KIB, Kernel, Rows, parse_log
from smolvla_fast.kernels.common import assume_capability
from smolvla_fast.ops.reference.quantize import quantize_rows

# What one block may have, less the 1 KiB that the driver keeps of it (CUDA C++ Programming Guide, compute capabilities).
SHARED = {"80": 163, "86": 99, "87": 163, "89": 99, "90": 227, "100": 227, "120": 99}
TARGETS = tuple(SHARED)
# Columns of tensor memory that one program may have.
TENSOR_COLUMNS = 512
ONE_REGISTER = "one register, stored before the loop and loaded behind it"
SERIALIZED = (
    "ptxas serialized wgmma (C7515), so loads and products no longer overlap; a loop over K needs "
    "`tl.assume(start < stop)` before it"
)
IN_FP8 = "on sm_89 and sm_120 with 8-bit weights: the gather's offsets beside x in fp32, for a launch a chunk"
EXPECTED: dict[str, tuple[str, ...]] = {}
"""Nothing is asked of the instructions of a kernel."""
SPILLS: dict[str, tuple[int, str]] = {
    "norm_swiglu": (16, "on sm_120 two registers, stored before the loop and loaded behind it"),
    "patch_embed": (8, ONE_REGISTER),
    "pixel_shuffle_linear": (32, IN_FP8),
}
"""Bytes that a thread of an op's kernels may spill where 0 is not kept, each with the reason."""

# Below this a case is one of the odd ones, which exist for correctness.
REAL_BYTES = 60_000
WIDE = ("residual", "pixels", "h", "k_weight", "v_weight")
"""Inputs in fp32 beside bf16 weights: the residual stream, which norms read as x, camera frames, and LeRobot's expert
projections of the cross KV, hence the keys and values of attention that they make."""
EIGHT_BITS = ("linear", "linear_residual", "norm_qkv_rope", "norm_swiglu", "pixel_shuffle_linear")
"""Whose matrices tier ``fp8`` keeps as 8-bit floats, for targets that multiply them."""
FIRST_EIGHT_BITS = 89
_compiled: dict[str, Kernel] = {}


def names() -> list[str]:
    """Every file of kernels/ that has a reference."""
    references, files = ROOT / "smolvla_fast" / "ops" / "reference", sorted((ROOT / "kernels").glob("*.py"))
    return [path.stem for path in files if (references / path.name).is_file()]


def tasks(names: Sequence[str], targets: Sequence[str]) -> list[tuple[Any, ...]]:
    found = [(op, case) for op in names for case in reference_module(op).CASES]
    return [(op, c, targets) for op, c in found if reference_module(op).cost(c, 2).bytes >= REAL_BYTES]


def calls(op: str, case: dict[str, int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what differs from the reference's inputs, dtypes, inputs): each way in which the stages call an op."""
    attends = "masked_attention" in op or op == "attention_residual"
    stream = ("x",) if "norm" in op else ("k", "v") if attends else WIDE
    layouts = {"bf16": torch.bfloat16, "fp32": torch.float32}
    for layout in layouts if op not in ("suffix_embed", "flow_loss", "rope_masks") else ("fp32",):
        dtype = layouts[layout]
        given = reference_module(op).make_inputs(case, dtype, torch.Generator().manual_seed(0))
        for label, changes in _ways(op, case, dtype).items():
            inputs = changed(given, changes)
            wide = [n for n in stream if isinstance(inputs.get(n), Tensor)]
            # Of attention only cross KV is fp32; the prefix and the suffix see bf16.
            mixed = layout == "bf16" and bool(wide) and not (attends and case["T"] == case["S"])
            if mixed and attends:
                yield label, layout, inputs
            if mixed:
                inputs = changed(inputs, {name: inputs[name].float() for name in wide})
            yield label, "bf16; fp32: " + ", ".join(wide) if mixed else layout, inputs
            if layout == "bf16" and op in EIGHT_BITS:
                parts = leaves(inputs)
                matrices = [n for n, x in parts.items() if "weight" in n and getattr(x, "ndim", 0) == 2]
                said = (f"{n.removeprefix('weights.')}_weight" if "." in n else n for n in matrices)
                quantized = changed(inputs, {name: quantize_rows(parts[name]) for name in matrices})
                yield label, "fp8: " + ", ".join(said), quantized


def _ways(op: str, case: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    if op == "linear":
        if case["outputs"] > case["inputs"]:
            return {"gelu_tanh": {}}
        residual = torch.zeros(case["rows"], case["outputs"], dtype=dtype)
        return {"bias": {"activation": None}, "residual": {"activation": None, "residual": residual}}
    only_q = {"weights.k": None, "weights.v": None, "slots": None}
    ways: dict[str, dict[str, dict[str, Any]]] = {
        "norm_qkv_rope": {"q, k, v": {}, "k, v": {"weights.q": None}, "q": only_q},
        "euler_step": {"guided": {}, "": {"guidance": None}},
        "layer_norm": {"": {"dtype": dtype}},
    }
    return ways.get(op, {"": {}})


def call(op: str, inputs: dict[str, Any]) -> None:
    """The op as the Triton backend serves it: where torch serves a dtype or size, no kernel is launched."""
    from smolvla_fast.ops.choice import choose
    from smolvla_fast.ops.select import backend_ops

    backend = choose(backend_ops("triton"), torch.device("cpu"), "triton", None)
    inputs, module = dict(inputs), importlib.import_module(f"smolvla_fast.kernels.{op}")
    launcher = getattr(backend, op, None) or getattr(module, op)
    if op == "suffix_embed":
        folded = backend.suffix_fold(*(inputs.pop(name) for name in ("times", "action_in", "time_in")))
        launcher(inputs["x"], 0, folded, inputs["time_out"])
    elif op == "flow_loss":
        module.flow_point(inputs["actions"], inputs["noise"], torch.zeros(len(inputs["v"])))
        launcher(**{**inputs, "v": inputs["v"].detach().requires_grad_()}).sum().backward()
    else:
        launcher(**inputs)


@contextlib.contextmanager
def compiling(capability: int) -> Iterator[list[tuple[str, Kernel]]]:
    """Inside, launching a kernel on CPU tensors compiles it for this capability; yields (name, Kernel) of each launch."""
    launched: list[tuple[str, Kernel]] = []
    launch = JITFunction.run
    # Stands for Triton's driver: there is a device, and nothing is ever launched on it.
    stand_in = SimpleNamespace(
        get_current_device=lambda: capability,  # what is compiled for one is cached apart from the others'
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in _compiled:  # ptxas speaks the first time alone
            [found] = parse_log(log.getvalue()).values()
            had = dict(shared=kernel.metadata.shared, tensor=getattr(kernel.metadata, "tmem_size", 0) or 0)
            _compiled[kernel.hash] = replace(found, **had, serialized="serialized" in log.getvalue())
        launched.append((self.__name__.removeprefix("_"), _compiled[kernel.hash]))
        return kernel

    with (
        triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(),
        patch.object(driver, "_active", stand_in),
        patch.object(JITFunction, "run", compile_only), assume_capability(capability),
    ):  # fmt: skip
        # ptxas speaks when it runs, so nothing may come from the cache on disk.
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        yield launched


def compile_task(task: tuple[str, dict[str, int], Sequence[str]]) -> Rows:
    """Every call of an op at one size for every target: its kernels, or what the compiler said where it failed."""
    op, case, targets = task
    found: Rows = {}
    sizes = " ".join(f"{name}={value}" for name, value in case.items())
    for label, dtypes, inputs in calls(op, case):
        where = sizes + (f" ({label})" if label else "")
        for target in targets:
            if dtypes.startswith("fp8") and int(target) < FIRST_EIGHT_BITS:
                continue
            cells: list[tuple[str, Any]]
            try:
                with compiling(int(target)) as cells:
                    call(op, inputs)
            except Exception as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                cells = [("none", f"{type(error).__name__}: {reason}")]
            for name, cell in cells:
                found.setdefault((op, name, where, dtypes), {})[target] = cell
    return found


def beyond(op: str, target: str, kernel: Kernel) -> list[str]:
    """The limits of a program beside its spills that a kernel passes."""
    found = (("bytes of shared memory", kernel.shared, SHARED[target] * KIB),
             ("columns of tensor memory", kernel.tensor, TENSOR_COLUMNS))  # fmt: skip
    wrong = [f"{value} {what}, allowed {limit}" for what, value, limit in found if value > limit]
    return [*wrong, *[SERIALIZED] * kernel.serialized]


def about() -> str:
    shared = ", ".join(f"sm_{target} {kib}" for target, kib in SHARED.items())
    return (
        f"# Kernels compiled ahead of time\n\nMade by `make aot` with Triton {triton.__version__} and its own ptxas, "
        "without a GPU. A cell is registers a thread / bytes a thread spills, stored and loaded / KiB of shared memory a "
        "program; * where ptxas serialized wgmma instructions. Sizes are those of the references' CASES, dtypes and "
        "epilogues those of the stages; where the backend leaves a size to torch, there is no row. "
        "What a GPU's default leaves to a library is here, for a plan may name it.\n\n"
        "Limits: no kernel has serialized wgmma, none spills unless its op's section says so; KiB of shared memory: "
        f"{shared}."
    )


def resources(kernel: Kernel) -> str:
    return f"{kernel.registers} / {kernel.spills} / {kernel.shared / KIB:.1f}" + " *" * kernel.serialized


TABLES = {"kernel, case, dtypes": resources}
