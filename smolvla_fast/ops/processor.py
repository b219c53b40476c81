"""What the processor can do, as far as kernels and tiers ask.

``ONEDNN_MAX_CPU_ISA``, oneDNN's own variable, holds for everything here: a processor asked to behave as an older one
does so in oneDNN's products, in the features below and in the compiled kernels (csrc/cpu/dispatch.h) alike.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

# Names as Linux gives them, and as people write them.
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "amx_tile": "AMX",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "asimd": "NEON",
    "asimddp": "dot product",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
}

_AVX2 = ("AVX2", "FMA", "F16C")
_BF16 = (*_AVX2, "AVX-512", "AVX512-VNNI", "AVX512-BF16")
# oneDNN's names for a limit, and the features that each leaves; a name that is not here (AMX and later) leaves all.
LIMITS = {
    "SSE41": (),
    "AVX": (),
    "AVX2": _AVX2,
    "AVX2_VNNI": (*_AVX2, "AVX-VNNI"),
    "AVX2_VNNI_2": (*_AVX2, "AVX-VNNI"),
    "AVX512_CORE": (*_AVX2, "AVX-512"),
    "AVX512_CORE_VNNI": (*_AVX2, "AVX-512", "AVX512-VNNI"),
    "AVX512_CORE_BF16": _BF16,
    "AVX512_CORE_FP16": (*_BF16, "AVX512-FP16"),
    "AVX10_1_512": (*_BF16, "AVX512-FP16"),
}


@cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for key, _, value in (line.partition(":") for line in lines):
        fields.setdefault(key.strip(), value.strip())
    return fields


def limit() -> str:
    """The value of ``ONEDNN_MAX_CPU_ISA`` (or of its older name), upper case; empty where it is not set."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


def features() -> list[str]:
    """The processor's vector features that matter to kernels, used by ours or not, below ``limit``; [] where unknown."""
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features", "")).split())
    allowed = LIMITS.get(limit())
    return [
        name for flag, name in _FEATURES.items() if flag in flags and (allowed is None or name in allowed)
    ]


def is_known() -> bool:
    """Whether the system says what features the processor has."""
    return bool(_cpuinfo())


def why_bf16_is_slow() -> str | None:
    """Why this processor does not multiply bf16 faster than fp32, or None where it does (or nothing is known of it)."""
    here, vendor = features(), _cpuinfo().get("vendor_id", "")
    if not is_known() or "AMX-BF16" in here or "BF16" in here:
        return None
    if "AVX512-BF16" not in here:
        return "this processor has no instruction for products of bf16"
    if vendor == "GenuineIntel":
        # Large products of bf16 without AMX were slower than fp32's; `smolvla-fast bench` measures both rates.
        return "this processor has no AMX, and without it multiplies bf16 no faster than fp32"
    return None


def name() -> str:
    """The processor's name, as well as the system knows it."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def model() -> str | None:
    """Family and model numbers: virtual machines often give one name to several generations. None where unknown."""
    fields = _cpuinfo()
    return f"family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else None
