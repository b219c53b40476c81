"""Pictures of what `verify` finds, a page each: trajectories, error by joint, by step of the chunk, and over frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plot import save

STOCK, NOISE = "#999999", "#ccbb44"
TIERS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#222222")
STYLES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (1, 3)))
TOP = 1e6
"""Where a ratio beyond it, an infinite one or NaN is drawn."""

Found = dict[str, Any]


def draw(found: Found, report: Path) -> list[Path]:
    """Writes the pictures beside ``report``, named after it. ``found`` is what `verify` writes as JSON."""
    pages: dict[str, Callable[[Found], Figure]] = {
        "trajectories": trajectories, "joints": joints, "steps": steps, "histogram": histogram,
    }  # fmt: skip
    paths, found = [], {**found, "tiers": [tier for tier in found["tiers"] if tier["frames"]]}
    for name, page in pages.items():
        paths.append(report.with_name(f"{report.stem}-{name}.png"))
        with rc_context({"text.parse_math": False}):  # a joint may be called $x$
            save(page(found), paths[-1])
    return paths


def ratios(values: Sequence[float]) -> np.ndarray:
    return np.minimum(np.nan_to_num(np.array(values, dtype=float), nan=TOP), TOP)


def logarithmic(axes: Any, side: str) -> None:
    """side  x or y. Ticks in plain text: matplotlib's own are formulas, which ``draw`` does not have set."""
    axes.set(**{f"{side}scale": "log"})
    getattr(axes, f"{side}axis").set_major_formatter(lambda value, place: f"{value:.0e}")


def trajectories(found: Found) -> Figure:
    """A row a joint: the worst episode's chunks by stock and by each tier, and beside it the tiers' differences."""
    worst, names = found["worst"], found["joints"]
    rate = found["fps"] or 1.0
    figure = Figure(figsize=(11, 1.2 + 1.5 * len(names)), layout="constrained")
    rows = figure.subplots(len(names), 2, squeeze=False, sharex=True)
    shown = list(zip(worst["frames"], np.array(worst["reference"], dtype=float), strict=True))
    for joint, (left, right) in enumerate(rows):
        for place, (first, reference) in enumerate(shown):
            times = (first + np.arange(len(reference))) / rate
            left.plot(times, reference[:, joint], color=STOCK, linewidth=4, alpha=0.7)
            for index, chunks in enumerate(worst["chunks"].values()):
                chunk, style = np.array(chunks[place], dtype=float), dict(
                    color=TIERS[index % len(TIERS)], linestyle=STYLES[index % len(STYLES)]
                )  # fmt: skip
                left.plot(times, chunk[:, joint], linewidth=1.3, **style)
                right.plot(times, chunk[:, joint] - reference[:, joint], linewidth=1.3, **style)
            if first == worst["frame"] and len(shown) > 1:
                for axes in (left, right):
                    axes.axvspan(times[0], times[-1], color="#eeeeee", zorder=0)
        left.set_title(f"{names[joint]['name']}, {names[joint]['unit']}", loc="left", fontsize=9)
        right.axhline(0, color=STOCK, linewidth=0.8)
        right.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
        right.yaxis.get_offset_text().set_fontsize(8)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
    rows[0][1].set_title("tier minus stock, same unit", loc="left", fontsize=9)
    for axes in rows[-1]:
        axes.set_xlabel("seconds of the episode" if found["fps"] else "frames of the episode", fontsize=8)
    handles = [Line2D([], [], color=STOCK, linewidth=4, alpha=0.7, label="stock")]
    handles += [
        Line2D([], [], color=TIERS[i % len(TIERS)], linestyle=STYLES[i % len(STYLES)], label=name)
        for i, name in enumerate(worst["chunks"])
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    figure.suptitle(
        f"Episode {worst['episode']}, the worst: chunks as the robot would get them\n"
        f"worst chunk: {worst['tier']}, from frame {worst['frame']}" + ", shaded" * (len(shown) > 1),
        x=0.01, ha="left", fontsize=11,
    )  # fmt: skip
    return figure


def joints(found: Found) -> Figure:
    """A row a joint, on a logarithmic axis: 99th percentile to largest difference of each tier, of stock, of noises."""
    names, tiers = found["joints"], found["tiers"]
    lanes = len(tiers) + 1
    figure = Figure(figsize=(9, 1.8 + 0.22 * lanes * len(names)), layout="constrained")
    axes = figure.subplots()
    handles = []
    series = [
        (f"{tier['name']}{zero(tier)}", tier["joints"], tier["own"], TIERS[i % len(TIERS)])
        for i, tier in enumerate(tiers)
    ]
    series.append(("another noise, stock", tiers[0]["noise"], None, NOISE))
    for lane, (label, figures, own, colour) in enumerate(series):
        for joint, each in enumerate(figures):
            y = joint + 0.8 * (lane + 0.5) / lanes - 0.4
            if each["max"] > 0:
                ends = [max(each["p99"], 1e-3 * each["max"]), each["max"]]
                axes.plot(ends, [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
                axes.plot(ends[:1], [y], "o", color=colour, markersize=6)
                axes.plot(ends[1:], [y], "|", color=colour, markersize=9, markeredgewidth=2)
            if own and own[joint]["p99"] > 0:
                axes.plot([own[joint]["p99"]], [y], "D", color="black", markersize=3.5, zorder=3)
        handles.append(Line2D([], [], color=colour, marker="o", linewidth=2.5, label=label))
    if any(tier["own"] for tier in tiers):
        handles.append(
            Line2D(
                [],
                [],
                color="black",
                marker="D",
                markersize=3.5,
                linestyle="",
                label="stock in that dtype, 99th percentile",
            )
        )
    logarithmic(axes, "x")
    for joint in range(1, len(names)):
        axes.axhline(joint - 0.5, color="#dddddd", linewidth=0.8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [f"{each['name']}\n{each['unit']}" for each in names], fontsize=8)
    axes.set_xlabel("difference in the joint's unit; dot: 99th percentile, bar: largest", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Error by joint", x=0.01, ha="left", fontsize=11)
    return figure


def steps(found: Found) -> Figure:
    """Along the chunk: the difference as a share of what another noise changes, 99th percentile and median over frames."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for index, tier in enumerate(found["tiers"]):
        colour = TIERS[index % len(TIERS)]
        high, middle = (ratios(tier["steps"][name]) for name in ("p99", "p50"))
        places, label = np.arange(len(high)), f"{tier['name']}{zero(tier)}"
        axes.plot(
            places, np.where(high > 0, high, np.nan), color=colour, marker="o", markersize=3, label=label
        )
        axes.plot(places, np.where(middle > 0, middle, np.nan), color=colour, linestyle=":", linewidth=1.2)
    axes.axhline(1, color=NOISE, linewidth=2, label="what another noise changes")
    logarithmic(axes, "y")
    axes.set_xlabel("step of the chunk; solid: 99th percentile over frames, dotted: median", fontsize=9)
    axes.set_ylabel("largest joint's difference,\nshare of another noise's", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=8)
    figure.suptitle("Error by step of the chunk", x=0.01, ha="left", fontsize=11)
    return figure


def histogram(found: Found) -> Figure:
    """Frames by their error over their bound."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    of_bounds = [ratios([each["of_bound"] for each in tier["frames"]]) for tier in found["tiers"]]
    positive = np.concatenate([each[each > 0] for each in of_bounds])
    low = min(positive.min(), 0.5) / 1.3 if len(positive) else 0.1
    edges = np.geomspace(low, max(1.3 * positive.max(initial=1.0), 2.0), 41).tolist()
    for index, each in enumerate(of_bounds):
        tier = found["tiers"][index]
        label = f"{tier['name']}{zero(tier)}: {tier['within']} of {len(each)} within"
        colour = TIERS[index % len(TIERS)]
        if not (each > 0).any():
            axes.plot([], [], color=colour, label=label)
            continue
        axes.hist(each[each > 0], edges, color=colour, alpha=0.35)
        axes.hist(each[each > 0], edges, color=colour, histtype="step", linewidth=1.5, label=label)
    axes.axvline(1, color="black", linewidth=1.5, linestyle="--", label="the bound")
    logarithmic(axes, "x")
    axes.set_xlabel("error of a frame's chunk, relative L2, over the bound of its tier", fontsize=9)
    axes.set_ylabel("frames")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    figure.suptitle("Frames by error", x=0.01, ha="left", fontsize=11)
    return figure


def zero(tier: Found) -> str:
    """For the legend: a difference of zero has no place on a logarithmic axis."""
    return " (0, equal bits)" if not any(each["max"] for each in tier["joints"]) else ""
