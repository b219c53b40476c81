"""Charts. Needs matplotlib; draws without a display and leaves matplotlib's global state alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .console import counted, milliseconds

# Told apart in grey and by colour-blind eyes.
COLOURS = {"vision": "#4477aa", "prefix": "#66ccee", "denoise": "#ccbb44", "other": "#bbbbbb"}
PALETTE = ("#bbbbbb", "#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377")
KINDS = frozenset(FigureCanvasAgg.get_supported_filetypes())
"""What a file's name may end with."""


def save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def stage_bars(found: dict[str, Any], path: str | Path) -> None:
    """Two stacked bars, stock above patched, cut by stage. ``found`` is what the demo writes as JSON."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    rows = {"stock": found["stock_ms"], "smolvla_fast": found["fast_ms"]}
    whole = max(rows.values())
    left = {"stock": 0.0, "smolvla_fast": 0.0}
    for stage, figures in found["stages"].items():
        widths = {"stock": figures["stock_ms"], "smolvla_fast": figures["fast_ms"]}
        bars = axes.barh(
            list(rows),
            list(widths.values()),
            left=list(left.values()),
            color=COLOURS.get(stage, "#aa3377"),
            label=stage,
        )
        # A label in a sliver would lie over its neighbours'.
        labels = [f"{width:.0f}" if width > 0.05 * whole else "" for width in widths.values()]
        axes.bar_label(bars, labels, label_type="center")
        left = {name: left[name] + widths[name] for name in rows}
    for place, (name, end) in enumerate(left.items()):
        figure_ms = f"{rows[name]:,.0f} ms" if rows[name] >= 10 else f"{rows[name]:.2f} ms"
        axes.text(end + 0.01 * whole, place, figure_ms, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(left.values()))
    axes.set_xlabel(
        f"ms; at the bars' ends the median of {counted(found['rounds'], 'round')} not timed by stage\n"
        f"{found['machine']}, {counted(found['threads'], 'thread')}, {counted(found['cameras'], 'camera')}, "
        f"{counted(found['steps'], 'step')}, torch {found['torch_version']}, lerobot {found['lerobot_version']}",
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), ncols=4, loc="outside upper right", frameon=False)
    axes.set_title(
        f"SmolVLA action chunk: {found['ratio']:.2f}x at precision {found['precision']}, "
        f"relative L2 {found['rel_l2']:.1e} to stock",
        loc="left", fontsize=11,
    )  # fmt: skip
    save(figure, path)


def grouped_bars(
    bars: dict[str, dict[str, float]],
    title: str,
    subtitle: str,
    path: str | Path,
    floors: dict[str, dict[str, float]] | None = None,
) -> None:
    """One cluster for each outer key, one bar for each inner key, the height its value; a line across it at its floor."""
    series = list(dict.fromkeys(name for cluster in bars.values() for name in cluster))
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for index, name in enumerate(series):
        places = [
            i + (index - (len(series) - 1) / 2) * width
            for i, cluster in enumerate(bars.values())
            if name in cluster
        ]
        values = [cluster[name] for cluster in bars.values() if name in cluster]
        drawn = axes.bar(places, values, 0.95 * width, label=name, color=PALETTE[index % len(PALETTE)])
        axes.bar_label(
            drawn, [f"{value:,.0f}" if value >= 10 else f"{value:.2g}" for value in values], fontsize=8
        )
        lines = [cluster[name] for cluster in (floors or {}).values() if name in cluster]
        if lines:
            ends = [(place - 0.475 * width, place + 0.475 * width) for place in places]
            axes.hlines(lines, *zip(*ends, strict=True), color="black", linewidth=2)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(title, loc="left")
    axes.set_xlabel(subtitle, fontsize=8)
    save(figure, path)


def tuning_bars(found: dict[str, Any], path: str | Path) -> None:
    """Default beside chosen: each op that was timed, then the chunk. ``found`` is what `tune` writes as JSON."""
    ops: dict[str, tuple[float, float]] = {}
    for choice in found["choices"]:
        times = {each["candidate"]: each["p50_ms"] for each in choice["timed"]}
        default, chosen = (
            times.get(choice[name]) for name in ("default", "chosen" if found["kept"] else "default")
        )
        if default is not None and chosen is not None:
            whose = choice["default"] if chosen is default else f"{choice['default']} -> {choice['chosen']}"
            label = f"{choice['op']} {choice['shape']}\n{whose}"
            ops[label] = default * choice["calls"], chosen * choice["calls"]
    chunk = {}
    if found["before"] and found["after"]:
        chunk = {"whole chunk": (found["before"]["p50_ms"], found["after"]["p50_ms"])}
    heights = [max(1, len(ops)), 1]
    figure = Figure(figsize=(9, 1.6 + 0.5 * sum(heights)), layout="constrained")
    for axes, bars in zip(figure.subplots(2, 1, height_ratios=heights), (ops, chunk), strict=True):
        for index, name in enumerate(("default", "chosen")):
            places = [place + 0.4 * index - 0.2 for place in range(len(bars))]
            values = [pair[index] for pair in bars.values()]
            drawn = axes.barh(places, values, 0.38, color=PALETTE[index], label=name)
            axes.bar_label(drawn, [milliseconds(value) for value in values], fontsize=7, padding=2)
        axes.set_yticks(range(len(bars)), list(bars), fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        if not bars:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
    figure.axes[0].set_title(found["verdict"], loc="left", fontsize=9, wrap=True)
    figure.axes[1].set_xlabel(
        f"ms in a chunk, medians\n{found['machine']}, {counted(found['threads'], 'thread')}, "
        f"precision {found['key']['tier']}, torch {found['torch_version']}",
        fontsize=8,
    )
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), ncols=2, loc="outside upper right", frameon=False
    )
    save(figure, path)


def curves(
    found: dict[str, dict[str, dict[int, float]]], title: str, subtitle: str, path: str | Path
) -> None:
    """One panel for each axis, one line for each variant: axis -> variant -> value -> ms."""
    figure = Figure(figsize=(3.2 * len(found), 3.6), layout="constrained")
    names = list(dict.fromkeys(name for variants in found.values() for name in variants))
    marks = ("o", "s", "^", "D", "v")
    for axes, (axis, variants) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for name, times in variants.items():
            index = names.index(name)
            values = sorted(times)
            axes.plot(
                values, [times[value] for value in values], marker=marks[index % len(marks)], label=name,
                color=PALETTE[index % len(PALETTE)],
            )  # fmt: skip
        axes.set_xticks(sorted({value for times in variants.values() for value in times}))
        axes.set_xlabel(axis)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("ms")
    first.legend(frameon=False)
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(subtitle, fontsize=8)
    save(figure, path)


def loss_curve(log: list[dict[str, Any]], title: str, path: str | Path) -> None:
    """Loss and gradient norm over the optimizer steps of a training log, and the loss on held-out episodes."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    steps = [entry["step"] for entry in log if "loss" in entry]
    axes.plot(steps, [entry["loss"] for entry in log if "loss" in entry], color=PALETTE[1], label="loss")
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color=PALETTE[5], marker="o", label="loss, held-out episodes")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("flow-matching loss")
    axes.set_ylim(bottom=0)
    right = axes.twinx()
    norms = [entry["grad_norm"] for entry in log if "loss" in entry]
    right.plot(steps, norms, color=PALETTE[0], linewidth=1, zorder=0, label="gradient norm")
    right.set_ylabel("gradient norm before clipping")
    right.set_ylim(bottom=0)
    for side in (axes, right):
        side.spines["top"].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    axes.set_title(title, loc="left", fontsize=11)
    save(figure, path)
