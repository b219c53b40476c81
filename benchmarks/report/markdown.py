"""A result's JSON to Markdown and charts; ``python -m benchmarks.report.markdown FILE`` does it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import cpu, gpu
from benchmarks.report.tables import figures, groups, of_variants, suite, table
from smolvla_fast.measure import system

INTERRUPTED = "**Interrupted**: the run was stopped; here is what it had measured until then."
TRAINING_TEXT = (
    "Ratios are to stock, for what runs in bf16 to stock in bf16; the ratio is the median over rounds of stock's "
    "time by the one beside it. The floor is the least time of a step's parts (vision, prefix, expert with "
    "its update) under this machine's roof, for whichever of arithmetic and memory takes longer."
)


def write(data: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``.md and, where matplotlib is installed and there is something to draw, ``stem``.png and
    ``stem``-scaling.png."""
    text, chart = stem.with_suffix(".md"), stem.with_suffix(".png")
    curves = chart.with_name(f"{chart.stem}-scaling{chart.suffix}")
    charts = draw(data, chart, curves)
    text.write_text(markdown(data, *(path.name if path in charts else None for path in (chart, curves))))
    return [text, *charts]


def markdown(data: dict[str, Any], chart: str | None = None, curves: str | None = None) -> str:
    """The whole report: header, then a section for each suite in the data."""
    facts = data["machine_info"]["smolvla_fast"]
    parts = ["# smolvla_fast benchmarks"]
    parts += [gpu.REHEARSAL] if data.get("rehearsal") else []
    parts += [INTERRUPTED] if data.get("interrupted") else []
    parts += [header(facts), system.busy(facts) or "", f"![times]({chart})" if chart else ""]
    every = {
        "Parts": gpu.parts, "Chunk": chunks, "Device and host": gpu.device, "Stages": stages, "Denoise loop": gpu.denoise,
        "Training step": training, "Ops": ops, "CPU": cpu.tiers, "CPU, by stage": cpu.stages,
        "CPU, overhead": cpu.overhead, "CPU, scaling": lambda data: cpu.scaling(data, curves),
    }  # fmt: skip
    for title, section in every.items():
        text = section(data)
        parts += [f"## {title}", text] if text else []
    return "\n\n".join(filter(None, parts)) + "\n"


def header(facts: dict[str, Any]) -> str:
    names = ("smolvla_fast", "lerobot", "torch", "transformers", "triton", "python")
    versions = [f"{name} {facts.get(f'{name}_version') or 'none'}" for name in names]
    versions += [f"openvino {facts['openvino_version']}"] if facts.get("openvino_version") else []
    processor = ", ".join(filter(None, [facts["cpu"], facts.get("cpu_model"), *facts["cpu_features"]]))
    rows = [
        ("machine", facts["machine"]), ("processor", processor), ("threads", facts["threads"]),
        ("versions", ", ".join(versions)), ("commit", facts["commit"] or "not a checkout"), ("date", facts["date"]),
    ]  # fmt: skip
    rows += [("driver", facts["driver"])] if facts.get("driver") else []
    for when, state in (facts.get("gpu_state") or {}).items():
        said = ", ".join(f"{key} {value}" for key, value in (state or {}).items())
        rows += [(f"GPU {when}", said)] if said else []
    if "ceilings" in facts:
        rates = facts["ceilings"]["gemm_flops"].items()
        gemm = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates)
        rows.append(("roof, measured", f"{gemm}, copy {facts['ceilings']['copy_bytes'] / 1e9:,.1f} GB/s"))
    return table(["", ""], rows)


def chunks(data: dict[str, Any]) -> str:
    parts = []
    columns = (
        "p50 ms | best ms | p95 ms | p99 ms | chunks/s | ratio | of the roof | rel L2 | max abs | rounds"
    )
    for group, benches in groups(suite(data, "chunk")).items():
        parts += [group, of_variants(columns, benches)]
        against = next((each["against"] for each in benches if "against" in each), None)
        said = f"Errors are against stock, stock's against {against}; ratios are of rounds in turn."
        parts += [said] if against else []
    return "\n\n".join(parts)


def stages(data: dict[str, Any]) -> str:
    parts = []
    for group, benches in groups(suite(data, "stages")).items():
        rows, base = [], {each["variant"]: each["stages"] for each in benches}.get("stock", {})
        for bench in benches:
            whole = bench["stages"]["total"]["p50_ms"]
            for stage, found in bench["stages"].items():
                rows.append(
                    (
                        [bench["variant"]],
                        {"stage": stage, "base": base.get(stage), "whole_ms": whole, **found},
                    )
                )
        parts += [group, figures("stage | p50 ms | share | ratio | GFLOP | floor ms | of the roof", rows)]
    return "\n\n".join(parts)


def training(data: dict[str, Any]) -> str:
    parts = []
    columns = (
        "p50 ms | best ms | samples/s | ratio | floor ms | of the roof | gradients, rel L2 | allowed | loss"
    )
    for group, benches in groups(suite(data, "train")).items():
        parts += [group, of_variants(f"{columns} | peak GiB | rounds", benches)]
    return "\n\n".join([*parts, TRAINING_TEXT]) if parts else ""


def ops(data: dict[str, Any]) -> str:
    benches = suite(data, "ops")
    eager = {bench["group"]: bench for bench in benches if bench["backend"] == "reference"}
    rows = [((), {"base": eager.get(bench["group"]), **bench}) for bench in benches]
    return figures(
        "op | case | dtype | backend | p50 µs | best µs | ratio | GFLOP/s | GB/s | of the roof", rows
    )


def draw(data: dict[str, Any], path: Path, curves: Path) -> list[Path]:
    """The chart of the first suite that has one, and the CPU's curves; returns what was drawn: [] without matplotlib."""
    try:
        from smolvla_fast.measure import plot
    except ImportError:
        return []
    facts, drawn = data["machine_info"]["smolvla_fast"], []
    subtitle = f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch_version']}, lerobot "
    subtitle += str(facts["lerobot_version"])
    bars: dict[str, dict[str, float]] = {}
    title, floors = "SmolVLA action chunk, p50 ms", None
    if data.get("kind") == "gpu-report":
        title = gpu.stage_title(data)
        bars, floors = gpu.stage_bars(data, "p50_ms"), gpu.stage_bars(data, "floor_ms")
    for bench in [] if bars else suite(data, "chunk") or suite(data, "cpu"):
        count = bench["cameras"]
        bars.setdefault(f"{count} camera" + "s" * (count > 1), {})[bench["variant"]] = bench["p50_ms"]
    for bench in [] if bars else suite(data, "stages"):
        title, found = "SmolVLA action chunk by stage, p50 ms", bench["stages"].items()
        bars[bench["variant"]] = {name: each["p50_ms"] for name, each in found if name != "total"}
    if bars:
        plot.grouped_bars(bars, title, subtitle, path, floors)
        drawn.append(path)
    if cpu.curves(data):
        plot.curves(cpu.curves(data), "SmolVLA action chunk on a CPU, ms", subtitle, curves)
        drawn.append(curves)
    return drawn


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        for written in write(json.loads(argument.read_text()), argument):
            print(f"wrote {written}")
