"""The processors that the suite plays: this one, and lesser ones by leaving out what they lack.

``ONEDNN_MAX_CPU_ISA`` limits oneDNN, our kernels and what a tier asks of the processor; torch's
own loops and MKL have variables of their own. All are read when a process starts: ``make test-cpus`` runs the tests marked
``processor`` once under each of MASKS that this processor carries, and says which these were. No mask
changes what kernels of Triton and CUDA compute on the host: ``make test`` has these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest

from smolvla_fast.ops import extension, processor
from smolvla_fast.ops.cpu import kernels as cpu
from support import emulated


class Mask(NamedTuple):
    """One processor to play.

    onednn, aten, mkl  values of ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and MKL_ENABLE_INSTRUCTIONS
    needs              what this processor must have to play it
    """

    onednn: str
    aten: str
    mkl: str
    needs: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "ATEN_CPU_CAPABILITY": self.aten,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
        }


MASKS = {
    "baseline": Mask("SSE41", "default", "SSE4_2", ()),
    "AVX2": Mask("AVX2", "avx2", "AVX2", ("AVX2", "FMA")),
    "AVX2 + VNNI": Mask("AVX2_VNNI", "avx2", "AVX2", ("AVX2", "FMA", "AVX-VNNI")),
    "AVX-512": Mask("AVX512_CORE", "avx512", "AVX512", ("AVX-512",)),
    "AVX-512 + VNNI": Mask("AVX512_CORE_VNNI", "avx512", "AVX512", ("AVX-512", "AVX512-VNNI")),
    "AVX-512 + VNNI + bf16": Mask("AVX512_CORE_BF16", "avx512", "AVX512", ("AVX512-VNNI", "AVX512-BF16")),
    "AMX": Mask("AVX512_CORE_AMX", "avx512", "AVX512", ("AMX-BF16", "AMX-INT8")),
}


def supported(level: str) -> bool:
    """Whether the kernels were compiled and this processor runs them at a level."""
    return extension.available("cpu") and level in extension.load("cpu").levels()


def why_not(level: str, emulable: bool) -> str:
    """Why the kernels cannot run at a level here, or emulated where that will do; "" where they can."""
    x86 = level.startswith("avx") and emulated.HERE and not processor.limit()
    if supported(level) or (extension.available("cpu") and emulable and x86):
        return ""
    return extension.why_missing("cpu") or f"this processor does not run level {level!r}"


def _levels(emulable: bool) -> list[Any]:
    reasons = {name: why_not(name, emulable) for name in cpu.LEVELS}
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name, reason in reasons.items()
    ]


LEVELS = _levels(emulable=False)
"""Every instruction level of the CPU kernels as a test's parameter; what this processor lacks is skipped by name."""
LEVELS_EMULATED = _levels(emulable=True)
"""The same for kernels that are written in a level's own instructions: what this processor lacks is emulated."""


@contextmanager
def at_level(name: str) -> Iterator[None]:
    """Inside, the CPU kernels run at this level in the whole process, emulated where this processor lacks it."""
    with nullcontext() if supported(name) else emulated.instead():
        kernels = extension.load("cpu")
        before = kernels.level()
        kernels.set_level(name)
        try:
            yield
        finally:
            kernels.set_level(before)


# Flags of /proc/cpuinfo, as far as kernels ask for them, of processors that the suite has run on or that users have.
_HASWELL = "avx2 fma f16c"
_SKYLAKE = f"{_HASWELL} avx512f avx512bw avx512dq avx512vl"
SEEN = {
    "Core 2": ("GenuineIntel", "sse2 ssse3"),
    "Zen 1": ("AuthenticAMD", _HASWELL),
    "Alder Lake": ("GenuineIntel", f"{_HASWELL} avx_vnni"),
    "Skylake-X": ("GenuineIntel", _SKYLAKE),
    "Cascade Lake": ("GenuineIntel", f"{_SKYLAKE} avx512_vnni"),
    "Cooper Lake": ("GenuineIntel", f"{_SKYLAKE} avx512_vnni avx512_bf16"),
    "Zen 4": ("AuthenticAMD", f"{_SKYLAKE} avx512_vnni avx512_bf16"),
    "Zen 5": ("AuthenticAMD", f"{_SKYLAKE} avx512_vnni avx512_bf16 avx_vnni"),
    "Sapphire Rapids": (
        "GenuineIntel", f"{_SKYLAKE} avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_tile amx_bf16 amx_int8",
    ),
    "Neoverse V1": ("", "asimd asimddp bf16 i8mm sve"),
    "unknown": ("", ""),
}  # fmt: skip


def play(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Lets decisions be taken as on a processor of SEEN, whatever this one is. Products and kernels stay this one's."""
    vendor, flags = SEEN[name]
    fields = {"vendor_id": vendor, "flags" if vendor else "Features": flags} if flags else {}
    monkeypatch.setattr(processor, "_cpuinfo", lambda: fields)
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)


def carried() -> list[str]:
    """The names of MASKS that this processor can play. Exits where a limit is set."""
    if processor.limit():
        raise SystemExit(f"ONEDNN_MAX_CPU_ISA={processor.limit()}: unset it, the masks set it themselves")
    here = processor.features()
    return [name for name, mask in MASKS.items() if all(feature in here for feature in mask.needs)]


def main() -> int:
    """Run the tests marked ``processor`` once under each mask; arguments are pytest's."""
    names, failed, said = carried(), False, []
    for name in names:
        print(f"--- as a processor with {name}", flush=True)
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "processor and not (gpu or triton or simt)",
            *sys.argv[1:],
        ]
        with subprocess.Popen(
            command, env={**os.environ, **MASKS[name].environment}, stdout=subprocess.PIPE, text=True
        ) as run:
            lines = []
            for line in run.stdout or ():
                lines.append(line.rstrip())
                if line.startswith(("FAILED", "ERROR", "E  ")):
                    print(line, end="", flush=True)
        closing = next(
            (line for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), "no test ran"
        )
        failed |= run.returncode != 0
        said.append(f"{name}: {closing.strip('= ')} ({time.perf_counter() - start:.0f} s)")
        print(said[-1], flush=True)
    lacking = [name for name in MASKS if name not in names]
    print(f"\nOn {processor.name()}, masked as", *said, sep="\n  ")
    if lacking:
        print(f"not carried by this processor: {', '.join(lacking)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
