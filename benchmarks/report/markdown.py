"""pytest-benchmark's JSON to Markdown and a chart; ``python -m benchmarks.report.markdown FILE`` does it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import cpu
from benchmarks.report import gpu as sections
from smolvla_fast.measure import system
from smolvla_fast.measure.console import milliseconds

# Below this many rounds the highest percentiles are the slowest round; a table would claim too much.
TAIL_ROUNDS = 20
# An idle machine keeps the median of a chunk within a few per cent of the best round. Beyond this something else ran
# meanwhile, and a ratio would say more about that than about the policy.
UNSTEADY = 1.25
UNSTEADY_MARK = "†"


def write(data: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem``.md and, where matplotlib is installed and there is something to draw, ``stem``.png and
    ``stem``-scaling.png."""
    text, chart = stem.with_suffix(".md"), stem.with_suffix(".png")
    curves = cpu.chart_path(chart)
    charts = [
        path for path, drawn in ((chart, draw(data, chart)), (curves, draw_curves(data, curves))) if drawn
    ]
    names = [path.name if path in charts else None for path in (chart, curves)]
    text.write_text(markdown(data, *names))
    return [text, *charts]


def markdown(data: dict[str, Any], chart: str | None = None, curves: str | None = None) -> str:
    """The whole report: header, then a section for each suite in the data."""
    facts = data["machine_info"]["smolvla_fast"]
    parts = [
        "# smolvla_fast benchmarks",
        *([sections.REHEARSAL] if data.get("rehearsal") else []),
        header(facts),
    ]
    if system.busy(facts):
        parts.append(str(system.busy(facts)))
    if chart:
        parts.append(f"![times]({chart})")
    every = {
        "Parts": sections.parts,
        "Chunk": chunks,
        "Device and host": sections.device,
        "Stages": stages,
        "Denoise loop": sections.denoise,
        "Training step": training,
        "Ops": ops,
        "CPU": cpu.tiers,
        "CPU, by stage": cpu.stages,
        "CPU, overhead": cpu.overhead,
        "CPU, scaling": lambda data: cpu.scaling(data, curves),
    }
    for title, section in every.items():
        text = section(data)
        if text:
            parts += [f"## {title}", text]
    return "\n\n".join(parts) + "\n"


def header(facts: dict[str, Any]) -> str:
    rows = [
        ("machine", facts["machine"]),
        ("processor", ", ".join(filter(None, [facts["cpu"], facts.get("cpu_model"), *facts["cpu_features"]]))),
        ("threads", facts["threads"]),
        ("versions", ", ".join(f"{name} {facts.get(f'{name}_version') or 'none'}" for name in
                               ("smolvla_fast", "lerobot", "torch", "transformers", "triton", "python"))
                               + (f", openvino {facts['openvino_version']}" if facts.get("openvino_version") else "")),
        ("commit", facts["commit"] or "not a checkout"),
        ("date", facts["date"]),
    ]  # fmt: skip
    if facts.get("driver"):
        rows.append(("driver", facts["driver"]))
    for when, state in (facts.get("gpu_state") or {}).items():
        if state:
            rows.append((f"GPU {when}", ", ".join(f"{key} {value}" for key, value in state.items())))
    if "ceilings" in facts:
        gemm = ", ".join(
            f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in facts["ceilings"]["gemm_flops"].items()
        )
        rows.append(("roof, measured", f"{gemm}, copy {facts['ceilings']['copy_bytes'] / 1e9:,.1f} GB/s"))
    return table(["", ""], rows)


def suite(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [
        {**bench, **bench["extra_info"]}
        for bench in data["benchmarks"]
        if bench["extra_info"].get("suite") == name
    ]


def groups(benches: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for bench in benches:
        found.setdefault(bench["group"], []).append(bench)
    return found


def unsteady(bench: dict[str, Any]) -> bool:
    return bench["p50_ms"] > UNSTEADY * bench.get("min_ms", bench["p50_ms"])


def ratio(baseline: dict[str, Any] | None, bench: dict[str, Any]) -> str:
    """How many times faster than the baseline; a dash where there is none or other work disturbed one of the two."""
    if baseline is None or unsteady(baseline) or unsteady(bench):
        return "–"
    return f"{baseline['p50_ms'] / bench['p50_ms']:.2f}x"


def footnote(benches: list[dict[str, Any]], then: str = "; no ratio is given") -> str:
    if not any(map(unsteady, benches)):
        return ""
    return (
        f"\n\n{UNSTEADY_MARK} unsteady: the median is more than {UNSTEADY:g} times the best round, so other work "
        f"disturbed it{then}."
    )


def chunks(data: dict[str, Any]) -> str:
    parts = []
    for group, benches in groups(suite(data, "chunk")).items():
        stock = next((bench for bench in benches if bench["variant"] == "stock"), None)
        rows = [
            [
                bench["variant"],
                milliseconds(bench["p50_ms"]) + UNSTEADY_MARK * unsteady(bench),
                milliseconds(bench["min_ms"]),
                *(
                    milliseconds(bench[f"p{p}_ms"]) if bench["rounds"] >= TAIL_ROUNDS else "–"
                    for p in (95, 99)
                ),
                f"{1000 / bench['p50_ms']:.2f}",
                ratio(stock, bench),
                f"{bench['share_of_floor']:.0%}",
                f"{bench['rel_l2']:.1e}",
                f"{bench['max_abs']:.1e}",
                bench["rounds"],
            ]
            for bench in benches
        ]
        columns = [
            "",
            "p50 ms",
            "best ms",
            "p95 ms",
            "p99 ms",
            "chunks/s",
            "ratio",
            "of the roof",
            "rel L2",
            "max abs",
            "rounds",
        ]
        parts.append(f"{group.removeprefix('chunk: ')}\n\n{table(columns, rows)}{footnote(benches)}")
    return "\n\n".join(parts)


def stages(data: dict[str, Any]) -> str:
    parts = []
    for group, benches in groups(suite(data, "stages")).items():
        stock = next((bench["stages"] for bench in benches if bench["variant"] == "stock"), None)
        rows = []
        for bench in benches:
            for stage, figures in bench["stages"].items():
                p50, total = figures["p50_ms"], bench["stages"]["total"]["p50_ms"]
                rows.append([
                    bench["variant"], stage, milliseconds(p50), f"{p50 / total:.0%}",
                    ratio(stock and stock[stage], figures),
                    *(("–", "–", "–") if "floor_ms" not in figures else (
                        f"{figures['flops'] / 1e9:,.1f}", milliseconds(figures["floor_ms"]),
                        f"{figures['share_of_floor']:.0%}",
                    )),
                ])  # fmt: skip
        columns = ["", "stage", "p50 ms", "share", "ratio", "GFLOP", "floor ms", "of the roof"]
        parts.append(f"{group.removeprefix('stages: ')}\n\n{table(columns, rows)}")
    return "\n\n".join(parts)


def training(data: dict[str, Any]) -> str:
    parts = []
    for group, benches in groups(suite(data, "train")).items():
        rows = [
            [
                bench["variant"],
                milliseconds(bench["p50_ms"]) + UNSTEADY_MARK * unsteady(bench),
                milliseconds(bench["min_ms"]),
                f"{1e3 * bench['batch'] / bench['p50_ms']:.3g}",
                f"{bench['ratio']:.2f}x" if "ratio" in bench else "–",
                *(
                    (milliseconds(bench["floor_ms"]), f"{bench['share_of_floor']:.0%}")
                    if "floor_ms" in bench
                    else ("–", "–")
                ),
                f"{bench['gradient_rel_l2']:.1e}",
                f"{bench['bound']:.1e}",
                f"{bench['loss_rel']:.1e}",
                "–" if bench["peak_bytes"] is None else f"{bench['peak_bytes'] / 2**30:.2f}",
                bench["rounds"],
            ]
            for bench in benches
        ]
        columns = [
            "", "p50 ms", "best ms", "samples/s", "ratio", "floor ms", "of the roof", "gradients, rel L2", "allowed", "loss",
            "peak GiB", "rounds",
        ]  # fmt: skip
        parts.append(f"{group.removeprefix('train: ')}\n\n{table(columns, rows)}{footnote(benches, then='')}")
    if parts:
        parts.append(
            "Before each round stock takes one, in bf16 for what runs in bf16; the ratio is the median over rounds of "
            "stock's time by the one after it. The floor is the least time of a step's parts (vision, prefix, expert with "
            "its update) under this machine's roof, for whichever of arithmetic and memory takes longer."
        )
    return "\n\n".join(parts)


def ops(data: dict[str, Any]) -> str:
    benches = suite(data, "ops")
    if not benches:
        return ""
    eager = {bench["group"]: bench for bench in benches if bench["backend"] == "reference"}
    rows = [
        [
            bench["op"],
            " ".join(f"{name}={value}" for name, value in bench["case"].items()),
            bench["dtype"],
            bench["backend"],
            f"{bench['p50_ms'] * 1e3:,.0f}" + UNSTEADY_MARK * unsteady(bench),
            f"{bench['min_ms'] * 1e3:,.0f}",
            ratio(eager.get(bench["group"]), bench),
            f"{bench['gflops_per_s']:,.0f}",
            f"{bench['gbytes_per_s']:,.1f}",
            f"{bench['share_of_floor']:.0%}",
        ]
        for bench in benches
    ]
    columns = [
        "op",
        "case",
        "dtype",
        "backend",
        "p50 µs",
        "best µs",
        "ratio",
        "GFLOP/s",
        "GB/s",
        "of the roof",
    ]
    return table(columns, rows)


def table(columns: list[str], rows: list[Any]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def draw(data: dict[str, Any], path: Path) -> bool:
    """The chart of the chunk suite, or of the stages where only they ran. False: nothing to draw, or no
    matplotlib.
    """
    try:
        from smolvla_fast.measure import plot
    except ImportError:
        return False
    subtitle = _subtitle(data)
    if data.get("kind") == "gpu-report" and sections.draw_stages(data, subtitle, path):
        return True
    if suite(data, "chunk"):
        bars: dict[str, dict[str, float]] = {}
        for bench in suite(data, "chunk"):
            bars.setdefault(f"{bench['cameras']} cameras", {})[bench["variant"]] = bench["p50_ms"]
        plot.grouped_bars(bars, "SmolVLA action chunk, p50 ms", subtitle, path)
        return True
    if suite(data, "stages"):
        bars = {
            bench["variant"]: {
                stage: figures["p50_ms"] for stage, figures in bench["stages"].items() if stage != "total"
            }
            for bench in suite(data, "stages")
        }
        plot.grouped_bars(bars, "SmolVLA action chunk by stage, p50 ms", subtitle, path)
        return True
    return cpu.draw(data, subtitle, path)


def draw_curves(data: dict[str, Any], path: Path) -> bool:
    """The scaling curves of the CPU suite. False as in ``draw``."""
    try:
        return cpu.draw_curves(data, _subtitle(data), path)
    except ImportError:
        return False


def _subtitle(data: dict[str, Any]) -> str:
    return "{machine}, {threads} threads, torch {torch_version}, lerobot {lerobot_version}".format(
        **data["machine_info"]["smolvla_fast"]
    )


def main(arguments: list[str]) -> int:
    for argument in arguments:
        for path in write(json.loads(Path(argument).read_text()), Path(argument)):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
