"""A result's JSON to Markdown and charts; ``python -m benchmarks.report.markdown FILE`` does it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report.sections import SECTIONS, curves
from benchmarks.report.tables import suite
from smolvla_fast.measure import system
from smolvla_fast.measure.console import counted
from smolvla_fast.measure.page import picture, table, write_page

INTERRUPTED = "**Interrupted**: the run was stopped; here is what it had measured until then."
REHEARSAL = (
    "**A rehearsal**: a tiny policy on a CPU, in few rounds. It shows that the report can be made; its times say "
    "nothing about any GPU."
)


def write(data: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``.md, the same as one page ``stem``.html where markdown-it-py is installed and, where matplotlib is and
    there is something to draw, ``stem``.png and ``stem``-scaling.png."""
    text, chart = stem.with_suffix(".md"), stem.with_suffix(".png")
    lines = chart.with_name(f"{chart.stem}-scaling{chart.suffix}")
    charts = draw(data, chart, lines)
    written = markdown(data, *(path.name if path in charts else None for path in (chart, lines)))
    text.write_text(written, encoding="utf-8")
    page = write_page(text, charts)
    return [text, *([page] if page else []), *charts]


def markdown(data: dict[str, Any], chart: str | None = None, lines: str | None = None) -> str:
    """The whole report: header, then a section for each suite in the data."""
    facts = data["machine_info"]["smolvla_fast"]
    parts = ["# smolvla_fast benchmarks"]
    parts += [REHEARSAL] if data.get("rehearsal") else []
    parts += [INTERRUPTED] if data.get("interrupted") else []
    parts += [header(facts), system.busy(facts) or "", picture("times", chart) if chart else ""]
    for title, section in SECTIONS.items():
        text = section({**data, "curves": lines})
        parts += [f"## {title}", text] if text else []
    return "\n\n".join(filter(None, parts)) + "\n"


def header(facts: dict[str, Any]) -> str:
    names = ("smolvla_fast", "lerobot", "torch", "transformers", "triton", "python")
    versions = [f"{name} {facts.get(f'{name}_version') or 'none'}" for name in names]
    versions += [f"openvino {facts['openvino_version']}"] if facts.get("openvino_version") else []
    processor = ", ".join(filter(None, [facts["cpu"], facts.get("cpu_model"), *facts["cpu_features"]]))
    rows = {
        "machine": facts["machine"], "processor": processor, "threads": facts["threads"], "versions": ", ".join(versions),
        "commit": facts["commit"] or "not a checkout", "date": facts["date"], "driver": facts.get("driver"),
    }  # fmt: skip
    for when, state in (facts.get("gpu_state") or {}).items():
        rows[f"GPU {when}"] = ", ".join(f"{key} {value}" for key, value in (state or {}).items())
    if "torch_capability" in facts:
        level = facts["instruction_level"] or "none (not compiled)"
        rows["kernels"] = f"ours at level {level}, torch's at {facts['torch_capability']}"
    if "ceilings" in facts:
        rates = facts["ceilings"]["gemm_flops"].items()
        gemm = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in rates)
        rows["roof, measured"] = f"{gemm}, copy {facts['ceilings']['copy_bytes'] / 1e9:,.1f} GB/s"
    return table(["", ""], [(name, said) for name, said in rows.items() if said])


def draw(data: dict[str, Any], path: Path, lines: Path) -> list[Path]:
    """The chart of the first suite that has one, and the CPU's curves; returns what was drawn: [] without matplotlib."""
    try:
        from smolvla_fast.measure import plot
    except ImportError:
        return []
    facts, drawn, gpu = data["machine_info"]["smolvla_fast"], [], data.get("kind") == "gpu-report"
    subtitle = f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch_version']}, lerobot "
    subtitle += str(facts["lerobot_version"])
    bars: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, float]] = {}
    chunks, title = suite(data, "chunk") or suite(data, "cpu"), "SmolVLA action chunk, p50 ms"
    for bench in suite(data, "stages") if gpu or not chunks else []:
        title = "SmolVLA action chunk by stage, p50 ms; black: floor measured in the same run"
        # On a GPU stock is of another order and stands in the table.
        shown = "loop_backend" not in bench and not (gpu and bench["variant"] == "stock")
        for stage, found in bench["stages"].items():
            if shown and "floor_ms" in found:
                bars.setdefault(stage, {})[bench["variant"]] = found["p50_ms"]
                floors.setdefault(stage, {})[bench["variant"]] = found["floor_ms"]
    for bench in [] if bars else chunks:
        place = ", ".join(filter(None, [counted(bench["cameras"], "camera"), bench.get("beside")]))
        bars.setdefault(place, {})[bench["variant"]] = bench["p50_ms"]
    if bars:
        title = f"REHEARSAL on a CPU, tiny policy: {title}" if data.get("rehearsal") else title
        plot.grouped_bars(bars, title, subtitle, path, floors)
        drawn.append(path)
    if curves(data):
        plot.curves(curves(data), "SmolVLA action chunk on a CPU, ms", subtitle, lines)
        drawn.append(lines)
    return drawn


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        for written in write(json.loads(argument.read_text(encoding="utf-8")), argument):
            print(f"wrote {written}")
