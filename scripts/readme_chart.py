"""``make chart``: docs/chart.png, the README's bars, from a committed report. The figures are the report's."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "benchmarks/results/amd-epyc-2-cores-2026-11-22.json"
CAMERAS = 2
VARIANTS = {"stock": "LeRobot eager", "exact": "exact", "fp32": "fp32", "bf16": "bf16"}
GRAY, BLUE = "#b0b4ba", "#2f6fde"


def main() -> None:
    facts = [each["extra_info"] for each in json.loads(REPORT.read_text(encoding="utf-8"))["benchmarks"]]
    found = {
        each["variant"]: each for each in facts if each["suite"] == "chunk" and each["cameras"] == CAMERAS
    }
    times = [found[name]["p50_ms"] for name in VARIANTS]
    figure, axes = plt.subplots(figsize=(8, 2.4), dpi=150)
    bars = axes.barh(list(VARIANTS.values()), times, color=[GRAY, BLUE, BLUE, BLUE], height=0.62)
    for bar, ms in zip(bars, times, strict=True):
        axes.text(
            ms, bar.get_y() + bar.get_height() / 2, f"  {ms:,.0f} ms, {times[0] / ms:.2f}x", va="center"
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(times))
    axes.xaxis.set_visible(False)
    axes.tick_params(left=False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_title(
        "One action chunk: 2 cameras, 10 steps, 2 cores of an AMD EPYC (Zen 4)", loc="left", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "chart.png", metadata={"Software": None})
    print("wrote docs/chart.png")


if __name__ == "__main__":
    main()
