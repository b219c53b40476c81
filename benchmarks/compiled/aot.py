"""`make aot`: every Triton kernel compiled ahead of time, with no GPU, for every target and at SmolVLA's real sizes.

The ordinary launchers run on CPU tensors; what they launch is compiled for the target and not run, so no signature stands
here a second time. Writes benchmarks/results/aot.md: registers a thread, spilled bytes and shared memory, by op, case and
target. Exits with 1 where a limit is passed or a kernel does not compile. Nothing in the file depends on the day or the
machine, so what a fresh run writes is compared with what is committed (tests/bench/test_aot.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from support.contract import changed, leaves
from torch import Tensor

from benchmarks.compiled.triton_kernels import KIB, Cell, Rows, compiling
from smolvla_fast.ops.reference.quantize import quantize_rows

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (80, 86, 87, 89, 90, 100, 120)
# What one block may have, less the 1 KiB that the driver keeps of it (CUDA C++ Programming Guide, compute capabilities).
SHARED = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# Columns of tensor memory that one program may have.
TENSOR_COLUMNS = 512
ONE_REGISTER = "one register, stored before the loop and loaded behind it"
IN_FP8 = "on sm_89 with 8-bit weights: the gather's offsets beside x in fp32, for a launch a chunk"
SPILLS: dict[str, tuple[int, str]] = {
    "norm_swiglu": (8, ONE_REGISTER),
    "patch_embed": (8, ONE_REGISTER),
    "pixel_shuffle_linear": (20, IN_FP8),
}
"""Bytes that a thread of an op's kernels may spill where 0 is not kept, each with the reason."""

# Below this a case is one of the odd ones, which exist for correctness.
REAL_BYTES = 60_000
WIDE, NARROW = torch.float32, torch.bfloat16
RESIDUAL = {
    "layer_norm": ("x",),
    "linear": ("residual",),
    "linear_residual": ("residual",),
    "norm_qkv_rope": ("x",),
    "norm_swiglu": ("x",),
    "patch_embed": ("pixels",),
    "cross_kv": ("k_weight", "v_weight"),
    "masked_attention": ("k", "v"),
    "masked_attention_backward": ("k", "v"),
    "euler_step": ("h",),
}
"""What is fp32 beside bf16 weights: the residual stream, camera frames, and LeRobot's expert projections of the cross KV."""
EIGHT_BITS = {
    "linear": ("weight",),
    "linear_residual": ("weight",),
    "norm_qkv_rope": ("weights.q", "weights.k", "weights.v"),
    "norm_swiglu": ("gate_weight", "up_weight"),
    "pixel_shuffle_linear": ("weight",),
}
"""The matrices that tier ``fp8`` keeps as 8-bit floats, for targets that multiply them."""
FIRST_EIGHT_BITS = 89


def ops() -> list[str]:
    """Every file of kernels/ that has a launcher of its own name and a reference with CASES."""
    found = []
    for path in sorted((ROOT / "kernels").glob("*.py")):
        launcher = getattr(importlib.import_module(f"smolvla_fast.kernels.{path.stem}"), path.stem, None)
        if callable(launcher) and (ROOT / "smolvla_fast" / "ops" / "reference" / path.name).is_file():
            found.append(path.stem)
    return found


def room(op: str) -> Any:
    return importlib.import_module(f"smolvla_fast.ops.reference.{op}")


def cases(op: str) -> list[dict[str, int]]:
    return [case for case in getattr(room(op), "CASES", ()) if room(op).cost(case, 2).bytes >= REAL_BYTES]


def calls(op: str, case: dict[str, int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(what differs from the reference's inputs, dtypes, inputs): each way in which the stages call an op."""
    layouts = [("fp32", WIDE)] if op in ("suffix_embed", "flow_loss") else [("bf16", NARROW), ("fp32", WIDE)]
    for layout, dtype in layouts:
        given = room(op).make_inputs(case, dtype, torch.Generator().manual_seed(0))
        for label, changes in _ways(op, case, dtype).items():
            inputs = changed(given, changes)
            wide = [n for n in RESIDUAL.get(op, ()) if isinstance(inputs.get(n), Tensor)]
            mixed = layout == "bf16" and bool(wide)
            attends = op.startswith("masked_attention")
            if attends:  # only cross KV is fp32; the prefix sees bf16, and so does the suffix
                mixed = mixed and case["T"] != case["S"]
            if mixed:
                inputs.update({name: inputs[name].float() for name in wide})
            if mixed and attends:  # only cross KV is fp32; the prefix and the suffix see bf16
                yield label, layout, changed(given, changes)
            yield label, "bf16; fp32: " + ", ".join(wide) if mixed else layout, inputs
            parts = leaves(inputs)
            narrow = [n for n in EIGHT_BITS.get(op, ()) if isinstance(parts.get(n), Tensor)]
            if layout == "bf16" and narrow:
                quantized = changed(inputs, {name: quantize_rows(parts[name]) for name in narrow})
                names = [f"{n.removeprefix('weights.')}_weight" if "." in n else n for n in narrow]
                yield label, "fp8: " + ", ".join(names), quantized


def _ways(op: str, case: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    if op == "linear":
        if case["outputs"] > case["inputs"]:
            return {"gelu_tanh": {}}
        residual = torch.zeros(case["rows"], case["outputs"], dtype=dtype)
        return {"bias": {"activation": None}, "residual": {"activation": None, "residual": residual}}
    if op == "norm_qkv_rope":
        parts = {"q, k, v": {}, "k, v": {"weights.q": None}}
        return {**parts, "q": {"weights.k": None, "weights.v": None, "slots": None}}
    if op == "euler_step":
        return {"guided": {}, "": {"guidance": None}}
    if op == "layer_norm":
        return {"": {"dtype": dtype}}
    return {"": {}}


def call(op: str, inputs: dict[str, Any]) -> None:
    """The op as the Triton backend serves it: where torch serves a dtype or size, no kernel is launched."""
    from smolvla_fast.ops.torch.suffix import suffix_fold

    inputs = dict(inputs)
    launcher = getattr(importlib.import_module(f"smolvla_fast.kernels.{op}"), op)
    with contextlib.suppress(ImportError):
        fused = importlib.import_module("smolvla_fast.ops.triton.ops")
        launcher = getattr(fused, op, launcher)
    if op == "suffix_embed":
        folded = suffix_fold(*(inputs.pop(name) for name in ("times", "action_in", "time_in")))
        launcher(inputs["x"], 0, folded, inputs["time_out"])
    elif op == "flow_loss":
        from smolvla_fast.kernels.flow_loss import flow_point

        flow_point(inputs["actions"], inputs["noise"], torch.zeros(len(inputs["v"])))
        launcher(**{**inputs, "v": inputs["v"].detach().requires_grad_()}).sum().backward()
    elif op == "linear":
        launcher(*(inputs[name] for name in ("x", "weight", "bias", "activation", "residual")))
    else:
        launcher(**inputs)


def compile_case(op: str, case: dict[str, int], targets: tuple[int, ...] = TARGETS) -> Rows:
    """Every call of an op at one size for every target: its cells, or what the compiler said where it failed."""
    found: Rows = {}
    sizes = " ".join(f"{name}={value}" for name, value in case.items())
    for label, dtypes, inputs in calls(op, case):
        where = sizes + (f" ({label})" if label else "")
        for target in targets:
            if dtypes.startswith("fp8") and target < FIRST_EIGHT_BITS:
                continue
            try:
                with compiling(target) as launched:
                    call(op, inputs)
            except Exception as error:
                reason = (str(error).strip() or "no message").splitlines()[0]
                found.setdefault((op, "none", where, dtypes), {})[target] = (
                    f"{type(error).__name__}: {reason}"
                )
                continue
            for kernel, cell in launched:
                found.setdefault((op, kernel, where, dtypes), {})[target] = cell
    return found


def passed_limits(rows: Rows) -> list[str]:
    """A line for each cell that passes a limit or is none."""
    found = []
    for key, cells in rows.items():
        for target, cell in cells.items():
            where = f"{', '.join(key)}, sm_{target}"
            if isinstance(cell, str):
                found.append(f"{where}: does not compile: {cell}")
                continue
            bound = SPILLS.get(key[0], (0, ""))[0]
            if cell.spills > bound:
                found.append(f"{where}: {cell.spills} bytes spilled, allowed {bound}")
            if cell.shared > SHARED[target] * KIB:
                found.append(f"{where}: {cell.shared} bytes of shared memory, allowed {SHARED[target] * KIB}")
            if cell.tensor > TENSOR_COLUMNS:
                found.append(f"{where}: {cell.tensor} columns of tensor memory, allowed {TENSOR_COLUMNS}")
    return found


def markdown(rows: Rows, targets: tuple[int, ...] = TARGETS) -> str:
    """The whole file."""
    shared = ", ".join(f"sm_{target} {SHARED[target]}" for target in TARGETS)
    parts = [
        "# Kernels compiled ahead of time",
        f"Made by `make aot` with Triton {triton.__version__} and its own ptxas, without a GPU. A cell is registers a "
        "thread / bytes a thread spills, stored and loaded / KiB of shared memory a program; * where ptxas serialized "
        "wgmma instructions. Sizes are those of the references' CASES, dtypes and epilogues those of the stages; where "
        "the backend leaves a size to torch, there is no row.",
        f"Limits: no kernel spills unless its op's section says so; KiB of shared memory: {shared}.",
    ]
    for op in dict.fromkeys(key[0] for key in rows):
        bound, reason = SPILLS.get(op, (0, ""))
        parts.append(f"## {op}")
        parts.append(f"Spilled bytes allowed: {bound}" + (f" ({reason})." if reason else "."))
        lines = ["| kernel | case | dtypes | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
        lines.append("| --- | --- | --- |" + " ---: |" * len(targets))
        for key, cells in rows.items():
            if key[0] == op:
                found = [cells.get(target) for target in targets]
                texts = [
                    cell.text() if isinstance(cell, Cell) else "does not compile" if cell else "–"
                    for cell in found
                ]
                lines.append("| " + " | ".join([*key[1:], *texts]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _no_interpreter() -> None:
    # Kernels read it when they are imported; interpreted ones never compile.
    os.environ.pop("TRITON_INTERPRET", None)


def _own_cache(folder: str) -> None:
    _no_interpreter()
    # ptxas speaks when it runs, so no process may find what another compiled.
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
    torch.set_num_threads(1)


def _task(task: tuple[str, dict[str, int], tuple[int, ...]]) -> tuple[Rows, float]:
    start = time.perf_counter()
    return compile_case(*task), time.perf_counter() - start


def compile_all(names: list[str], targets: tuple[int, ...], processes: int) -> Rows:
    tasks = [(op, case, targets) for op in names for case in cases(op)]
    rows: Rows = {}
    with tempfile.TemporaryDirectory(prefix="smolvla-aot-") as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(processes, _own_cache, (folder,)) as pool:
            for task, (found, seconds) in zip(tasks, pool.imap(_task, tasks), strict=True):
                sizes = " ".join(f"{name}={value}" for name, value in task[1].items())
                print(
                    f"{task[0]} {sizes}: {len(found)} kernels, {seconds:.0f} s", file=sys.stderr, flush=True
                )
                rows.update(found)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="OP,OP", help="these ops alone (needs --out)")
    parser.add_argument("--targets", metavar="90,100", help="these targets alone (needs --out)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/aot.md")
    parser.add_argument(
        "--processes", type=int, default=2, help="compile with so many processes (default: 2)"
    )
    args = parser.parse_args(arguments)
    _no_interpreter()
    known = ops()
    names = args.only.split(",") if args.only else known
    targets = tuple(map(int, args.targets.split(","))) if args.targets else TARGETS
    wrong = [name for name in names if name not in known] + [str(t) for t in targets if t not in TARGETS]
    if wrong:
        parser.error(
            f"no such op or target: {', '.join(wrong)}; ops are {', '.join(known)}; targets {TARGETS}"
        )
    if (args.only or args.targets) and args.out is None:
        parser.error("a part would replace the whole file; name another by --out")
    rows = compile_all(names, targets, args.processes)
    out = args.out or ROOT / "benchmarks" / "results" / "aot.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markdown(rows, targets))
    print(f"wrote {out}")
    missed = [
        f"{op}: no kernel was launched; its call has changed"
        for op in names
        if op not in {k[0] for k in rows}
    ]
    red = missed + passed_limits(rows)
    for line in red:
        print(line)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
