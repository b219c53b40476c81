"""The stages of a contact that measure: each is called with its ``Stage`` and its words, in a process of its own.

Policies are of smolvla_fast's own class, which needs no LeRobot. In a rehearsal a recorder stands for CUDA graphs.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from support.contract import call_of, check, reference_module, sizes

import smolvla_fast
from benchmarks.gpu_run.bring import compiled_kernels
from benchmarks.gpu_run.stage import Stage, stage_command
from benchmarks.gpu_run.timing import gpu, us_a_launch
from smolvla_fast import inference
from smolvla_fast.measure import system
from smolvla_fast.measure.rounds import summary, timed_ms
from smolvla_fast.ops import extension
from smolvla_fast.ops.availability import why_not
from smolvla_fast.ops.select import backend_ops, reference_ops, select
from smolvla_fast.patch import engine_of
from smolvla_fast.patching.tuning import tune_policy
from smolvla_fast.testing.policies import make_noise, make_observation, make_policy
from smolvla_fast.verify import rel_l2

DEVICE_SECONDS = 3.0
TUNING_SECONDS = 60.0
PROFILE_FROM, PROFILED = 500, 10
"""Launches of an eager chunk that are passed over, deep in the denoise loop, and that are counted."""
TINY: dict[str, Any] = dict(num_steps=2, num_vlm_layers=2)
REHEARSED_FLOPS = 2e6
"""Of an op in a rehearsal: what Triton's interpreter does in a second."""
SHOWN_NODES = 12


def machine(stage: Stage) -> None:
    """Whether the machine is usable at all: versions, what was brought along, a trivial kernel."""
    found = system.facts()
    names = [name for name in found if name.endswith("_version")] + ["machine", "driver"]
    stage.add(**{name: found.get(name) for name in names}, nvcc=system.nvcc())
    stage.add(
        cuda_extension=extension.why_missing("cuda") or "ready",
        kernels_brought=compiled_kernels(),
    )
    with stage.attempt("nvidia-smi"):
        stage.add(nvidia_smi=None if stage.rehearsal else system.first_line(["nvidia-smi", "-L"]))
    if not stage.rehearsal and not extension.why_missing("cuda"):
        # The account takes as many as whole clusters of eight go into the multiprocessors.
        with stage.attempt("clusters at once"):
            kernels = extension.load("cuda")
            stage.add(clusters_at_once=[kernels.linear_residual_clusters(), kernels.norm_products_clusters()])
    with stage.attempt("a product by torch"):
        stage.add(
            product=float(
                (torch.ones(64, 64, device=stage.device) @ torch.ones(64, 1, device=stage.device)).sum()
            )
        )
    with stage.attempt("a kernel by Triton"):
        from benchmarks.gpu_run import constants

        out = torch.zeros(1, device=stage.device)
        start = time.perf_counter()
        constants._nothing[(1,)](out, DEPENDENT=False)
        stage.add(kernel=out.item(), kernel_seconds=round(time.perf_counter() - start, 2))


def op(stage: Stage, name: str, backend: str = "triton") -> None:
    """An op at its real sizes in bf16: right by the contract, truth on the GPU; then, alone, µs a launch beside torch."""
    dtype = torch.float32 if stage.rehearsal else torch.bfloat16
    module, tables = (
        reference_module(name),
        # The backend's own functions: what a choice would hand to a library is measured as torch's.
        {backend: backend_ops(backend), "torch": select("torch", stage.device, False)},
    )
    by_flops = sorted(module.CASES, key=lambda case: -module.cost(case, 4).flops)
    large = [case for case in by_flops if module.cost(case, 4).flops >= REHEARSED_FLOPS]
    cases = [case for case in by_flops if case not in large] if stage.rehearsal else large or by_flops[:1]
    right = []
    with gpu(alone=False), torch.no_grad():
        for case in cases[: 1 if stage.rehearsal else None]:
            with stage.attempt(sizes(case)):
                start = time.perf_counter()
                check(reference_ops(), tables[backend], name, case, dtype, device=stage.device)
                right.append(case)
                stage.add(**{sizes(case): {"right": True, "seconds": round(time.perf_counter() - start, 2)}})
    with gpu(alone=True), torch.no_grad():
        for case in right:
            with stage.attempt(f"{sizes(case)}, timed"):
                from benchmarks.suites.ops import cold_inputs

                us = {}
                for each, ops in tables.items():
                    if getattr(ops, name) is None:  # torch has two ops in its place
                        continue
                    inputs = cold_inputs(name, case, dtype, stage.device)
                    us[f"{each}_us"] = us_a_launch(
                        [call_of(ops, name, given) for given in inputs], stage.device
                    )
                    stage.add(**{sizes(case): {**stage.figures[sizes(case)], **us}})


def constants(stage: Stage) -> None:
    from benchmarks.gpu_run import constants

    with stage.attempt("rates"):
        stage.add(**constants.rates(stage.device))
    with stage.attempt("launch gaps"):
        stage.add(plain=constants.launch_gaps(stage.device, dependent=False))
    if not stage.rehearsal:  # the interpreter has no such launch
        with stage.attempt("launch gaps, programmatic dependent launch"):
            stage.add(dependent=constants.launch_gaps(stage.device, dependent=True))


def barriers(stage: Stage) -> None:
    from benchmarks.gpu_run.constants import barriers

    stage.add(**barriers(stage.rehearsal))


def own_policy(stage: Stage, size: str = "", **more: Any) -> Any:
    """A policy of our own class as LeRobot stores it. In a rehearsal its chunks are captured by a recorder."""
    if stage.rehearsal:
        from support.recorder import RecorderDriver

        inference.driver_for = lambda device: RecorderDriver()  # type: ignore[assignment]
        size, more = "tiny", {**TINY, **more}
    layout = "fp32" if stage.rehearsal else "mixed"
    return make_policy(
        size or stage.size, origin="ours", cameras=3, layout=layout, device=stage.device, **more
    )


class Chunks:
    """Chunks of one policy and observation."""

    def __init__(self, stage: Stage, policy: Any, cameras: int = 2, batch: int = 1) -> None:
        self.stage, self.policy = stage, policy
        self.given = make_observation(policy, cameras=cameras, batch=batch)
        self.noise = make_noise(policy, batch=batch)

    def __call__(self) -> Any:
        return self.policy.predict_action_chunk(dict(self.given), noise=self.noise)

    def eager(self, precision: str, backend: str) -> Any:
        """A chunk that is not captured."""
        smolvla_fast.patch(self.policy, precision=precision, backend=backend)
        engine_of(self.policy.model).graphs = None
        found = self()
        if reason := smolvla_fast.status(self.policy).last_fallback:
            raise RuntimeError(f"stock ran in its place: {reason}")
        smolvla_fast.unpatch(self.policy)
        return found

    def captured(self, precision: str, backend: str) -> Any:
        """A chunk, and a graph of it. Raises with the traceback of the capture where there is none."""
        smolvla_fast.patch(self.policy, precision=precision, backend=backend)
        chunk = self()
        now, engine = smolvla_fast.status(self.policy), engine_of(self.policy.model)
        if now.graphs != 1:
            details = "\n".join(
                engine.graphs.failures if engine is not None and engine.graphs is not None else []
            )
            raise RuntimeError(f"no graph: {now.last_fallback}\n{details}")
        return chunk

    def times(self) -> dict[str, Any]:
        """Of the chunk as it is served now: wall time, and the device's."""
        from benchmarks.suites.chunk import device_rounds

        wall = summary([timed_ms(self, self.stage.device)[0] for _ in range(self.stage.rounds)])
        many = 4 * self.stage.rounds
        device = device_rounds(self, self.stage.device, many, DEVICE_SECONDS, wall["max_ms"] + 1.0)
        return {"wall": wall, "device": device and summary(device)}


def policy(stage: Stage, backend: str, precision: str = "bf16", cameras: str = "2", batch: str = "1") -> None:
    """The headline: a whole chunk, right, captured, replayed to the bit, and timed."""
    if stage.rehearsal:
        backend, precision = "torch", "fp32"
    chunks = Chunks(stage, own_policy(stage), int(cameras), int(batch))
    truth = plain = None
    with stage.attempt("eager"):
        truth = chunks.eager("fp32", "torch")
        stage.add(rel_l2_of_torch_in_bf16=rel_l2(chunks.eager("bf16", "torch"), truth))
        plain = chunks.eager(precision, backend)
        stage.add(rel_l2_to_fp32=rel_l2(plain, truth))
    first = chunks.captured(precision, backend)
    now = smolvla_fast.status(chunks.policy)
    stage.add(
        captured=True, nodes=now.graph_nodes, step_launches=now.step_launches, graph_bytes=now.graph_bytes
    )
    replays = [chunks() for _ in range(3)]
    stage.add(
        replays_are_equal=all(torch.equal(each, first) for each in replays),
        equal_to_eager=None if plain is None else torch.equal(first, plain),
        rel_l2_captured=None if truth is None else rel_l2(first, truth),
    )  # fmt: skip
    found = chunks.times()
    ms = (found["device"] or found["wall"])["p50_ms"]
    stage.add(**found, headline={"ms": ms, "by": f"{backend}, {precision}, {cameras} cameras, batch {batch}"})
    with stage.attempt("verify"):
        report = smolvla_fast.verify(chunks.policy, chunks.given, noise=chunks.noise)
        stage.add(verified=report.passed, verify={"rel_l2": report.rel_l2, "bound": report.bound})
        if not report.passed:
            raise AssertionError(f"verify: rel L2 {report.rel_l2:.2g}, allowed {report.bound:.2g}")


def trace(stage: Stage, backend: str) -> None:
    """Every node of one replay: its time, and the gap before it."""
    chunks = Chunks(stage, own_policy(stage))
    chunks.captured(*(("fp32", "torch") if stage.rehearsal else ("bf16", backend)))
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CPU, activity.CUDA][: 1 + (stage.device.type == "cuda")]
    ) as profiled:
        timed_ms(chunks, stage.device)
    kind = torch.autograd.DeviceType.CUDA if stage.device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [e for e in profiled.events() if e.device_type == kind and e.cpu_parent is None]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events)
    nodes, end = [], spans[0][0]
    for start, stop, name in spans:
        nodes.append({"name": name, "us": stop - start, "gap_us": start - end})
        end = max(end, stop)
    stage.keep("nodes", nodes)
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for node in nodes:
        by_name[node["name"].removeprefix("_")].append(node["us"])
    most = sorted(by_name.items(), key=lambda each: -sum(each[1]))[:SHOWN_NODES]
    stage.add(
        nodes=len(nodes), span_us=end - spans[0][0], busy_us=sum(node["us"] for node in nodes),
        gaps_us=sum(node["gap_us"] for node in nodes),
        most={name: {"count": len(each), "us": sum(each)} for name, each in most},
    )  # fmt: skip


def stages(stage: Stage, backend: str) -> None:
    """ms of vision, prefix and denoise, by events inside the captured chunk."""
    from benchmarks.suites.stages import times_inside
    from smolvla_fast.engine.timing import stage_times

    chunks = Chunks(stage, own_policy(stage))
    if stage.rehearsal:
        smolvla_fast.patch(chunks.policy, precision="fp32", backend="torch")
        found = [stage_times(chunks.policy, chunks.given, chunks.noise)]
    else:
        smolvla_fast.patch(chunks.policy, precision="bf16", backend=backend)
        marks: dict[str, tuple[Any, Any]] = {}

        def chunk() -> None:
            chunks()
            torch.cuda.synchronize()

        found = [times_inside(chunk, marks) for _ in range(stage.rounds)][3:]
    stage.add(**{f"{name}_ms": summary([each[name] for each in found])["p50_ms"] for name in found[0]})


def lerobot(stage: Stage) -> None:
    """LeRobot's own class, eager: what the ratio is to."""
    policy = make_policy(
        stage.size, cameras=3, layout="fp32" if stage.rehearsal else "mixed", device=stage.device,
        **(TINY if stage.rehearsal else {}),
    )  # fmt: skip
    chunks = Chunks(stage, policy)
    timed_ms(chunks, stage.device)
    stage.add(wall=summary([timed_ms(chunks, stage.device)[0] for _ in range(stage.rounds)]))


def loop(stage: Stage, size: str) -> None:
    """backend="cuda": whether the loop in one launch is alive, right, and how fast."""
    reason = why_not("cuda", stage.device)
    stage.add(why_not=reason)
    if reason and stage.rehearsal:
        return
    if reason:
        raise RuntimeError(reason)
    more: dict[str, Any] = dict(expert_width_multiplier=1.0) if size == "tiny" else {}
    chunks = Chunks(stage, own_policy(stage, size, **more))
    chunks.captured("bf16", "cuda")
    now = smolvla_fast.status(chunks.policy)
    stage.add(denoise=now.stages["denoise"], not_in_one_launch=now.fallback_reasons.get("denoise_persistent"))
    stage.add(**chunks.times())
    report = smolvla_fast.verify(chunks.policy, chunks.given, noise=chunks.noise)
    stage.add(verified=report.passed, rel_l2=report.rel_l2, bound=report.bound)


def tune(stage: Stage) -> None:
    """What `smolvla-fast tune` does: every candidate of every op at the shapes of a chunk, checked and timed, then whole
    chunks: by what was chosen, with launches in their order, with the first step behind the prefix, with the loop in one
    launch."""
    chunks = Chunks(stage, own_policy(stage))
    # By "auto" kernels of every backend compete.
    precision, backend = ("fp32", "torch") if stage.rehearsal else ("bf16", "auto")
    smolvla_fast.patch(chunks.policy, precision=precision, backend=backend)
    seconds = 2.0 if stage.rehearsal else TUNING_SECONDS
    found = tune_policy(
        chunks.policy,
        chunks.given,
        chunks.noise,
        seconds=seconds,
        progress=lambda doing, _: print(doing, flush=True),
    )
    stage.keep("tuning", found.to_dict())
    for name, each in (("by the defaults", found.before), ("by what was chosen", found.after)):
        stage.add(**{name: each and asdict(each)})
    for choice in found.choices:
        us = {each.candidate: each.refused or (each.p50_ms and 1e3 * each.p50_ms) for each in choice.timed}
        stage.add(**{f"{choice.op} {choice.shape}": {"calls": choice.calls, "chosen": choice.chosen, **us}})
    stage.add(verdict=found.verdict())


def eager(stage: Stage, backend: str) -> None:
    """A chunk that is not captured, for a profiler to look at."""
    Chunks(stage, own_policy(stage)).eager("bf16", backend)


def profile(stage: Stage, backend: str) -> None:
    """Two layers of a denoise step by Nsight Compute, where it is there: time, instructions, what warps wait for."""
    program = shutil.which("ncu")
    stage.add(profiler=program)
    if program is None or stage.rehearsal:
        return
    counters = "gpu__time_duration.sum,smsp__inst_executed.sum,launch__grid_size,launch__block_size"
    command = [
        program, "--clock-control", "none", "--cache-control", "none", "--metrics", counters, "--section", "WarpStateStats",
        "--launch-skip", str(PROFILE_FROM), "--launch-count", str(PROFILED), "--csv", "--page", "raw",
        *stage_command("eager", backend, rehearse=False),
    ]  # fmt: skip
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    stage.keep("counters", lines)
    if done.returncode or not lines:
        raise RuntimeError(f"ncu ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    for place, row in enumerate(list(csv.DictReader(lines))[1:]):  # the first row has the units
        waits = {name: value for name, value in row.items() if "stalled" in name and "ratio" in name}
        most = sorted(waits.items(), key=lambda each: -float(each[1].replace(",", "") or 0))[:4]
        counted = {name: row.get(name) for name in counters.split(",")}
        stage.add(**{f"{place} {row.get('Kernel Name', '')[:40]}": {**counted, **dict(most)}})


STAGES: dict[str, Callable[..., None]] = {
    each.__name__: each
    for each in (
        machine, op, constants, barriers, policy, trace, stages, tune, eager, profile, lerobot, loop,
    )
}  # fmt: skip
