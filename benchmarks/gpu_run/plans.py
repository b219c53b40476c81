"""The parts of a visit to a GPU, in their order: what matters most comes first."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from importlib.util import find_spec

from benchmarks.gpu_run.stage import stage_command
from benchmarks.harness.run import Part, pytest_of, suite
from smolvla_fast.model.precision import TIERS
from smolvla_fast.ops import extension
from smolvla_fast.ops.table import STAGES

SANITIZED = "tests/gpu/test_sanitizer.py"
CHUNKS = "tests/gpu/test_chunk_on_device.py"
OPS = "tests/gpu/test_ops_on_device.py"
REHEARSED = ("--device=cpu", "--size=tiny", "--layout=mixed", "--steps=2", "--rounds=3", "--threads=1")
BY_TRITON = tuple(dict.fromkeys([*STAGES["denoise"], *STAGES["prefix"], *STAGES["vision"], "image_prep"]))
"""The ops that a chunk launches; those of the denoise loop first."""
REHEARSED_OPS = ("euler_step", "linear_residual")
NOT_COMPILED = "a rehearsal compiles nothing"
ON_A_GPU = tuple(name for name, tier in TIERS.items() if tier.quantized in (None, "e4m3"))
HEADLINE = ("policy", "policy-torch")


def stage(
    name: str, limit: float, least: float, *words: str, label: str = "", rehearse: bool = False
) -> Part:
    """A stage of ``stages.py``."""
    return Part(label or name, limit, least, stage_command(name, *words, rehearse=rehearse), measures=True)


def tests(
    name: str,
    limit: float,
    least: float,
    *arguments: str,
    marks: str = "gpu and not slow",
    rehearse: bool = False,
) -> Part:
    """Tests on the device, with a line for each; a rehearsal collects them."""
    collect = ("--collect-only",) if rehearse else ()
    return Part(name, limit, least, pytest_of(*collect, "-m", marks, *arguments))


def denoise_contracts(rehearse: bool, limit: float = 40, least: float = 0) -> Part:
    named = " or ".join(f"test_contract_on_device[{op}-triton" for op in STAGES["denoise"])
    return tests("contract", limit, least, OPS, "-k", f"({named}) and bfloat16", rehearse=rehearse)


def build(kind: str, limit: float, least: float, not_run: str) -> Part:
    command = (sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--only", kind)
    return Part("build", limit, least, command, not_run=not_run)


def contact(args: argparse.Namespace) -> list[Part]:
    """Contact 1, within seven minutes with the machine's start, then by name what a second contact asks (``--part``).

    After the headline nothing is kept back for anybody: the order is the order of worth.
    """
    dry = args.rehearse
    ops = {op: stage_command("op", op, rehearse=dry) for op in (REHEARSED_OPS if dry else BY_TRITON)}
    brought = "brought along" if extension.available("cuda") else ""
    first = [
        stage("machine", 30, 15, rehearse=dry),
        Part("ops", 80, 30, each=ops, measures=True),
        stage("policy", 75, 50, "triton", rehearse=dry),
        stage("policy", 60, 30, "torch", label="policy-torch", rehearse=dry),
        stage("trace", 30, 0, "triton", rehearse=dry),
        stage("stages", 30, 0, "triton", rehearse=dry),
        stage("lerobot", 40, 15, rehearse=dry),
        stage("tune", 80, 0, rehearse=dry),
        stage("profile", 60, 0, "triton", rehearse=dry),
        build("cuda", 60, 0, NOT_COMPILED if dry else brought),
        stage("loop", 40, 0, "full", label="loop", rehearse=dry),
        stage("constants", 30, 0, rehearse=dry),
        stage("barriers", 20, 0, rehearse=dry),
        denoise_contracts(dry),
    ]
    if not args.part:
        return first
    tiers = [
        stage("policy", 60, 0, "triton", each, label=each, rehearse=dry) for each in ("fp8", "fp32", "exact")
    ]
    sizes = [("1-camera", "1", "1"), ("3-cameras", "3", "1"), ("batch-8", "2", "8")]
    more = [stage("policy", 60, 0, "triton", "bf16", c, b, label=name, rehearse=dry) for name, c, b in sizes]
    chosen = {"streams": "streams or another_user", "memory": "memory", "tiers": "test_tiers", "rtc": "rtc"}
    named = [tests(name, 90, 0, CHUNKS, "-k", words, rehearse=dry) for name, words in chosen.items()]
    flags = (
        "--device=cuda",
        "--cameras=2",
        "--with-compile",
        "--compile-mode=default",
        "--choose=stock or bf16",
    )
    compiled = replace(suite("chunk", 200, 0, *flags, label="compiled"), not_run=NOT_COMPILED * dry)
    return [
        *first,
        *tiers,
        *more,
        *named,
        compiled,
        tests("sanitizer", 120, 0, SANITIZED, marks="gpu", rehearse=dry),
    ]


def report(args: argparse.Namespace) -> list[Part]:
    """The chunk in bf16 first. A variant has a process of its own: an illegal access costs the others nothing.

    ``--batch`` of a rehearsal is enough to see more than one.
    """
    dry = args.rehearse
    device = REHEARSED if dry else ("--device=cuda",)
    headline, breadth = ("--cameras=2", "--batch=1,2"), ("--cameras=1", "--batch=1")
    stages, ops = ("--batch=1,2",), ("--choose=euler_step",)
    if not dry:
        headline = ("--cameras=2", "--batch=1", "--layers=16", "--rounds=1000")
        breadth = ("--cameras=2,1,3", "--batch=1,8", "--layers=16,32", "--rounds=300")
        stages, ops = ("--batch=1,8", "--rounds=200"), ("--rounds=50",)
    only = (f"--choose={args.only}",) if args.only else ()
    nothing = NOT_COMPILED * dry
    several = ("-n", "4") if find_spec("xdist") and not dry else ()

    def chunk(tier: str, limit: float, least: float, *flags: str) -> Part:
        return suite("chunk", limit, least, *device, *flags, f"--choose=stock or {tier}")

    return [
        chunk("bf16", 75, 60, *headline),
        build("cpu", 60, 0, nothing),
        build("cuda", 100, 20, nothing),
        suite("stages", 100, 60, *device, *stages, "--choose=not int8 and not int16"),
        suite("ops", 90, 45, *device, *ops, *only),
        *(chunk(tier, 50, 25, *headline) for tier in ON_A_GPU if tier != "bf16"),
        chunk("bf16", 60, 0, *breadth),
        denoise_contracts(dry, 60, 20),
        tests("tests", 100, 15, CHUNKS, rehearse=dry),
        tests("tests", 100, 0, *several, f"--ignore={CHUNKS}", f"--ignore={SANITIZED}", rehearse=dry),
        tests("sanitizer", 120, 0, SANITIZED, marks="gpu", rehearse=dry),
    ]


def peers(args: argparse.Namespace) -> list[Part]:
    """Each mode of the compiler in a process of its own: compiling can take longer than there is time."""
    flags = ("--device=cuda", "--layers=16", "--rounds=1000", "--cameras=2")
    nothing = "a rehearsal compiles nothing: it takes minutes on a CPU" if args.rehearse else ""

    def compiled(mode: str, limit: float) -> Part:
        chosen = ("--with-compile", f"--compile-mode={mode}", "--choose", "stock or bf16 or fp32")
        return replace(suite("chunk", limit, 90, *flags, *chosen, label=f"compiled-{mode}"), not_run=nothing)

    beside = (*REHEARSED, "--cameras=2") if args.rehearse else flags
    return [
        suite("chunk", 90, 60, *beside, label="beside"),
        compiled("default", 150),
        compiled("max-autotune", 300),
    ]


PLANS = {"contact": contact, "report": report, "peers": peers}
MINUTES = {"contact": 6.0, "report": 7.5, "peers": 7.5}
"""For all parts. A contact has seven with the machine's start; of a report's eight the rest is for the page."""
