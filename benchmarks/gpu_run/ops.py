"""Part ``ops``: single ops, checked against fp64 and then timed back to back in one captured graph over cold inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_run.record import Recorder, Run
from benchmarks.harness.gate import timed
from benchmarks.suites.op_calls import OPS, REAL_FLOPS, check, cold_calls, figures, room
from smolvla_fast.measure.rounds import summary, synchronize
from smolvla_fast.ops import select as backends

ROUNDS, SECONDS = 50, 0.5
DTYPES = (torch.bfloat16, torch.float32)
WARM = 3


def ops(run: Run) -> None:
    names = [run.only] if run.only else ["euler_step"] if run.rehearse else list(OPS)
    # bf16 of every op before fp32 of any: time may run out.
    for dtype in DTYPES:
        for op in names:
            for case in room(op).CASES:
                if room(op).cost(case, 4).flops >= REAL_FLOPS:
                    _one(run, op, case, dtype)


def served(op: str, device: torch.device) -> list[str]:
    """The backends that have a version of their own, and eager torch, which is the reference."""
    return ["reference", *(row.backend for row in backends.table(device) if row.op == op and row.available)]


def _one(run: Run, op: str, case: dict[str, int], dtype: torch.dtype) -> None:
    reference = backends.reference_ops()
    sizes = " ".join(f"{name}={value}" for name, value in case.items())
    short = str(dtype).removeprefix("torch.")
    for backend in served(op, run.device):
        found = reference if backend == "reference" else backends.select(backend, run.device, False)

        def measure(recorder: Recorder, backend: str = backend, found: Any = found) -> None:
            calls = cold_calls(found, op, case, dtype, run.device)

            def green() -> dict[str, Any]:
                if found is not reference:
                    check(reference, found, op, case, dtype, device=run.device)
                return {}

            with torch.no_grad():
                timed(recorder, green, replay(calls, run.device), 3 if run.rehearse else ROUNDS)
            # A round is all copies in turn; figures are of one call.
            data = [1e3 * seconds / len(calls) for seconds in recorder.stats.stats.data]
            recorder.extra_info.update(summary(data), calls_a_round=len(calls))
            p50 = recorder.extra_info["p50_ms"]
            recorder.extra_info.update(figures(op, case, dtype, backend, p50, run.ceilings))

        group = f"op: {op}, {run.device.type}, {short}, {sizes}"
        run.bench(f"{op} {sizes}, {short}, {backend}", group, SECONDS, measure)


def replay(calls: list[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """All calls, one after the other: as one graph on a GPU, where launching one by one would take longer than they."""

    def plain() -> None:
        for call in calls:
            call()
        synchronize(device)

    if device.type != "cuda":
        return plain
    stream = torch.cuda.Stream(device)
    graph: list[torch.cuda.CUDAGraph] = []

    def captured() -> None:
        if not graph:  # after the check: what is red is not captured either
            with torch.cuda.stream(stream):
                for _ in range(WARM):
                    calls[0]()
            torch.cuda.synchronize(device)
            graph.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graph[0], stream=stream):
                for call in calls:
                    call()
        graph[0].replay()
        synchronize(device)

    return captured
