"""A processor that lacks an instruction never meets it: what the compiled kernels contain, and what they do when masked.

The decoder of iced-x86 knows the CPUID feature of every instruction. The level of a function stands in its name.
"""

from __future__ import annotations

import bisect
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.masked import QEMU, masked

from smolvla_fast.ops import extension
from smolvla_fast.ops.cpu import kernels as cpu

X86 = pytest.mark.skipif(
    "x86_64" not in sysconfig.get_platform(), reason="the levels above the baseline are those of x86-64"
)
BUILT = pytest.mark.skipif(not extension.available("cpu"), reason=extension.why_missing("cpu"))

# x86-64 as the psABI defines it, in the names of iced-x86: what every such processor runs.
BASELINE = {"X64", "INTEL8086", "INTEL186", "INTEL286", "INTEL386", "INTEL486", "CMOV", "SSE", "SSE2"}
# No-ops of more than one byte, and marks of branch targets, which are no-ops where they mean nothing. CPUID is how to ask.
BASELINE |= {"MULTIBYTENOP", "CET_IBT", "CPUID"}
AVX2 = BASELINE | {"AVX", "AVX2", "FMA"}
AVX512 = AVX2 | {"AVX512F", "AVX512BW", "AVX512DQ", "AVX512VL"}
ALLOWED = {
    "baseline": BASELINE,
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"AVX512_BF16"},
    # Of products of integers, beside a level of the others.
    "avx2_vnni": AVX2 | {"AVX_VNNI"},
    "avx512_vnni": AVX512 | {"AVX512_VNNI"},
    "amx": AVX512 | {"AVX512_VNNI", "AMX_TILE", "AMX_INT8"},
}
# libgcc's: it asks what the system saves of the registers, once CPUID says that this may be asked.
ASKS = {"get_available_features", "__cpu_indicator_init"}


def level_of(function: str) -> str:
    """The level in a mangled name: of the namespace (``4avx2``) or of the wrapper (``rows_avx2``)."""
    found = re.search("|".join(sorted(ALLOWED, key=len, reverse=True)), function)
    return found[0] if found else "baseline"


def functions(path: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Every function of a shared library, and every section's code that is in none: CPUID features of its instructions."""
    iced = pytest.importorskip("iced_x86", reason="decodes the kernels; pip install iced-x86 pyelftools")
    elf = pytest.importorskip("elftools.elf.elffile")
    names = {number: name for name, number in vars(iced.CpuidFeature).items() if isinstance(number, int)}
    with path.open("rb") as file:
        parsed = elf.ELFFile(file)
        symbols = sorted(
            (symbol["st_value"], symbol["st_size"], symbol.name)
            for symbol in parsed.get_section_by_name(".symtab").iter_symbols()
            if symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_size"]
        )
        starts = [start for start, _, _ in symbols]
        found: dict[str, Counter[str]] = {}
        for section in parsed.iter_sections():
            if not section["sh_flags"] & 4:  # SHF_EXECINSTR
                continue
            for instruction in iced.Decoder(64, section.data(), ip=section["sh_addr"]):
                start, size, name = symbols[max(0, bisect.bisect_right(starts, instruction.ip) - 1)]
                inside = start <= instruction.ip < start + size
                features = found.setdefault(name if inside else section.name, Counter())
                features.update(names[feature] for feature in instruction.cpuid_features())
    yield from found.items()


@X86
@BUILT
@pytest.mark.cpu_kernels
def test_no_function_has_an_instruction_above_its_level() -> None:
    """Static initialisers, the choice of a level, bindings and the C++ library's templates are the baseline's."""
    path = Path(extension.load("cpu").__file__)
    seen: Counter[str] = Counter()
    used: dict[str, set[str]] = {level: set() for level in ALLOWED}
    above = {}
    for name, features in functions(path):
        level = level_of(name)
        seen[level] += 1
        used[level] |= set(features)
        extra = set(features) - ALLOWED[level] - ({"XSAVE"} if name.split(".")[0] in ASKS else set())
        if extra:
            above[name] = sorted(extra)
    print(dict(seen))
    assert not above, above
    # Levels that used nothing of their own, or functions not found, would make this test one that cannot fail.
    assert all(seen[level] > 20 for level in cpu.LEVELS), seen
    assert "SSE2" in used["baseline"] and "AVX2" in used["avx2"] and "FMA" in used["avx2"]
    assert "AVX512F" in used["avx512"] and "AVX512_BF16" in used["avx512_bf16"]
    assert "AVX_VNNI" in used["avx2_vnni"] and "AVX512_VNNI" in used["avx512_vnni"]
    assert "AMX_INT8" in used["amx"]


@X86
@BUILT
@pytest.mark.cpu_kernels
@pytest.mark.skipif(
    not QEMU, reason="no qemu-x86_64 (Debian: qemu-user or qemu-user-static) to mask features with"
)
@pytest.mark.parametrize(
    ("processor", "best"),
    [
        ("core2duo", "baseline"),  # no AVX at all
        ("Haswell,-fma", "baseline"),
        ("Haswell", "avx2"),
    ],
)
def test_a_processor_without_a_feature_runs_the_level_below(processor: str, best: str) -> None:
    """QEMU ends a program at the first instruction that the processor it plays does not have."""
    found, here = masked(processor), masked(None)
    assert found["levels"][-1] == best
    # Sums of up to 192 results below 2^12, added up in another order at every level.
    assert found["results"] == pytest.approx(here["results"], rel=1e-5)


@BUILT
@pytest.mark.cpu_kernels
@pytest.mark.processor
def test_levels_are_known_by_name() -> None:
    here = extension.load("cpu").levels()
    assert here == list(cpu.LEVELS[: len(here)]) and here[0] == "baseline"
