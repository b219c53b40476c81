"""``make chart``: docs/chart.png, the README's bars, from a committed report. The figures are the report's."""

from __future__ import annotations

import json

from matplotlib.figure import Figure

from benchmarks import ROOT
from benchmarks.report.tables import suite

REPORT = ROOT / "benchmarks/results/amd-epyc-2-cores-2026-11-22.json"
CAMERAS = 2
VARIANTS = {"stock": "LeRobot eager", "exact": "exact", "fp32": "fp32", "bf16": "bf16"}
TITLE = "One action chunk: 2 cameras, 10 steps, 2 cores of an AMD EPYC (Zen 4)"
GRAY, BLUE = "#b0b4ba", "#2f6fde"


def main() -> None:
    benches = suite(json.loads(REPORT.read_text(encoding="utf-8")), "chunk")
    found = {each["variant"]: each["p50_ms"] for each in benches if each["cameras"] == CAMERAS}
    times = [found[name] for name in VARIANTS]
    figure = Figure(figsize=(8, 2.4), dpi=150)
    axes = figure.subplots()
    bars = axes.barh(list(VARIANTS.values()), times, color=[GRAY, BLUE, BLUE, BLUE], height=0.62)
    axes.bar_label(bars, [f"  {ms:,.0f} ms, {times[0] / ms:.2f}x" for ms in times])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(times))
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_title(TITLE, loc="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "chart.png", metadata={"Software": None})
    print("wrote docs/chart.png")


if __name__ == "__main__":
    main()
