"""Every instruction level of the CPU kernels as a test's parameter; what this processor lacks is skipped by name."""

import pytest

from smolvla_fast import cpu, extension

LEVELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            not cpu.supported(name),
            reason=extension.why_missing("cpu") or f"this processor does not run level {name!r}",
        ),
    )
    for name in cpu.LEVELS
]
