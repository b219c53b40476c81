"""Part ``denoise``: the denoise stage of backend ``cuda``, whose loop is one launch, beside Triton's, in one process.

``auto`` takes Triton; whether it should is what this part measures.
"""

from __future__ import annotations

from benchmarks.gpu_run.chunk import HEADLINE, make_subject
from benchmarks.gpu_run.record import Run
from benchmarks.gpu_run.stages import one

TIER = "bf16"
ORDER = ("triton", "cuda", "triton")
"""Triton before and after: what the clocks did meanwhile shows as the difference of the two."""
STAND_INS = {"triton": "torch", "cuda": "cpu"}
"""What serves on a CPU, for a rehearsal."""


def denoise(run: Run) -> None:
    cameras, _, layers = HEADLINE
    subject = make_subject(run, None if run.rehearse else layers)
    for batch in (1, 8):
        seen: list[str] = []
        for backend in ORDER:
            serves = STAND_INS[backend] if run.rehearse else backend
            label = f"{TIER}, {serves}" + (" again" if serves in seen else "")
            one(run, subject, TIER, cameras, batch, serves, label)
            seen.append(serves)
