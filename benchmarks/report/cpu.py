"""The CPU suite's part of a report: the table of tiers and peers, stages, overhead and scaling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smolvla_fast.measure.console import counted, mebibytes, milliseconds

TARGETS = {"fp32": (2.5, 2.7), "bf16": (4.5, 5.0), "int8": (5.5, 7.0)}
"""Ratios to LeRobot eager in fp32 that the tiers are built for, at full size with 2 cameras and 10 steps, and those that
are hoped for; in one run, on a machine that multiplies bf16 and 8 bits faster than fp32."""
OVERHEAD = 0.03
"""The share of a chunk that may be Python."""
TAIL_ROUNDS = 20
UNSTEADY = 1.25
MARK = "†"


def unsteady(bench: dict[str, Any]) -> bool:
    return bench["p50_ms"] > UNSTEADY * bench["min_ms"]


def rows_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"group": bench["group"], **bench["extra_info"]}
        for bench in data["benchmarks"]
        if bench["extra_info"].get("suite") == "cpu"
    ]


def table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def target(bench: dict[str, Any]) -> str:
    """What the tier is built for, and whether this run shows it; a dash for what is no tier of the table."""
    if bench["kind"] != "tier" or bench["precision"] not in TARGETS:
        return "–"
    least, aim = TARGETS[bench["precision"]]
    met = "missed" if bench["ratio"] < least else "met" if bench["ratio"] < aim else "aim met"
    return f">= {least:g}x, aim {aim:g}x: {met}"


def accuracy(bench: dict[str, Any]) -> str:
    heavy = f", {bench['heavy_cosine']:.6f} on heavy tails" if "heavy_cosine" in bench else ""
    return f"rel L2 {bench['rel_l2']:.1e}; cosine {bench['cosine']:.6f}{heavy}; check: {bench['gate']}"


def tiers(data: dict[str, Any]) -> str:
    benches = rows_of(data)
    if not benches:
        return ""
    facts = data["machine_info"]["smolvla_fast"]
    rows = [
        [
            bench["variant"],
            f"{bench['ratio']:.2f}x" + MARK * unsteady(bench),
            target(bench),
            accuracy(bench),
            milliseconds(bench["p50_ms"]),
            *(milliseconds(bench[f"p{p}_ms"]) if bench["rounds"] >= TAIL_ROUNDS else "–" for p in (95, 99)),
            milliseconds(bench["min_ms"]),
            bench["rounds"],
            f"{bench['share_of_floor']:.0%}",
            mebibytes(bench.get("extra_bytes")) if bench["kind"] == "tier" else "–",
            mebibytes(bench["peak_bytes"]),
            mebibytes(bench["added_bytes"]),
        ]
        for bench in benches
    ]
    columns = [
        "", "ratio to stock", "target", "accuracy against stock in fp32", "p50 ms", "p95 ms", "p99 ms", "best ms",
        "rounds", "of the roof", "extra bytes", "peak memory", "of it new",
    ]  # fmt: skip
    level = facts.get("instruction_level") or "no compiled kernels"
    parts = [
        f"{benches[0]['group'].removeprefix('cpu: ')}; our kernels at level {level}, torch's at "
        f"{facts.get('torch_capability')}",
        table(columns, rows),
        "Rounds are taken in turn; the ratio is the median over rounds of stock's time by the time beside it. Of the roof: "
        "the least time for the matrix products at the fastest measured product that is no narrower than the tier, by p50. "
        "Peak memory is the process's during the first chunk, in the order of the rows; of it new is what was not resident "
        "before that chunk.",
    ]
    if any(map(unsteady, benches)):
        parts.append(
            f"{MARK} unsteady: the median is more than {UNSTEADY:g} times the best round, so other work disturbed it."
        )
    parts += passed_over(benches)
    parts += level_with(benches)
    parts += not_timed(data)
    return "\n\n".join(parts)


def passed_over(benches: list[dict[str, Any]]) -> list[str]:
    return [
        f"{bench['variant']}, {name}: {reason}"
        for bench in benches
        for name, reason in bench.get("passed_over", {}).items()
    ]


def level_with(benches: list[dict[str, Any]]) -> list[str]:
    """One line for each tier and OpenVINO at the same precision."""
    ours = {bench["precision"]: bench for bench in benches if bench["kind"] == "tier"}
    return [
        f"Against {peer['variant']}: {peer['p50_ms'] / ours[peer['precision']]['p50_ms']:.2f}x at "
        f"{peer['precision']}, medians of the same rounds."
        for peer in benches
        if peer["kind"] == "peer" and peer["precision"] in ours
    ]


def not_timed(data: dict[str, Any]) -> list[str]:
    return [
        f"**{name} is red, so it has no number**: {each['reason']}"
        if each["red"]
        else f"{name} did not run: {each['reason']}"
        for name, each in data["cpu"]["not_timed"].items()
    ]


def stages(data: dict[str, Any]) -> str:
    """Of the CPU suite; the stages suite has a section of its own."""
    benches = [bench for bench in rows_of(data) if "stages" in bench]
    names = ("vision", "prefix", "denoise")
    if not benches:
        return ""
    stock = benches[0]["stages"]
    rows = [
        [bench["variant"]]
        + [
            f"{milliseconds(bench['stages'][name])} ({stock[name] / bench['stages'][name]:.2f}x)"
            for name in names
        ]
        for bench in benches
    ]
    return table(["", *(f"{name} ms" for name in names)], rows)


def overhead(data: dict[str, Any]) -> str:
    found = data.get("cpu", {}).get("overhead")
    if not found:
        return ""
    rows = [
        [
            name,
            milliseconds(each["sample_actions_ms"]),
            f"{milliseconds(each['outside_ms'])} ({each['outside_share']:.1%})",
            f"{milliseconds(each['narrow_ms'])} ({each['narrow_share']:.1%})",
            each["op_calls"],
            f"{each['step_allocations']:,.0f}",
            mebibytes(each["step_bytes"]),
        ]
        for name, each in found.items()
    ]
    columns = [
        "", "sample_actions ms", "outside ops ms", "narrow policy ms", "op calls", "allocations a step",
        "bytes a step",
    ]  # fmt: skip
    lines = [
        "Outside ops: the engine's Python and the small torch calls between ops. Narrow policy: the same sequence of calls "
        "at widths that hardly cost arithmetic, so all Python, dispatch and starts of parallel work, the ops' own too: an "
        "upper bound. Allocations: what a denoise step more asks of torch's allocator."
    ]
    for name, each in found.items():
        low, high = each["outside_share"], each["narrow_share"]
        python = (
            "met by both"
            if high < OVERHEAD
            else "met by the first, missed by the upper bound"
            if low < OVERHEAD
            else "missed"
        )
        loop = "met" if each["step_allocations"] == 0 else f"missed: {each['step_allocations']:,.0f} a step"
        lines.append(
            f"{name}: Python under {OVERHEAD:.0%} of a chunk: {python}. Nothing allocated in the loop: {loop}."
        )
    return "\n\n".join([table(columns, rows), *lines])


def curves(data: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """axis -> variant -> value -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in data.get("cpu", {}).get("scaling", []):
        if "p50_ms" in row:
            found.setdefault(row["axis"], {}).setdefault(row["variant"], {})[row["value"]] = row["p50_ms"]
    return found


def scaling(data: dict[str, Any], chart: str | None = None) -> str:
    found = curves(data)
    if not found:
        return ""
    parts = [f"![time against cameras, steps, threads and batch]({chart})"] if chart else []
    for axis, variants in found.items():
        values = sorted({value for each in variants.values() for value in each})
        rows = [
            [name, *(milliseconds(each[value]) if value in each else "–" for value in values)]
            for name, each in variants.items()
        ]
        parts.append(table([f"ms by {axis}", *map(str, values)], rows))
    red = [row for row in data["cpu"]["scaling"] if "red" in row]
    parts += [
        f"**{row['variant']} at {row['axis']} {row['value']} is red, so it has no number**: {row['red']}"
        for row in red
    ]
    if data["cpu"]["left_out"]:
        parts.append(f"Left out, for the time was spent: {', '.join(data['cpu']['left_out'])}.")
    return "\n\n".join(parts)


def chart_path(path: Path) -> Path:
    """Where the curves lie beside the chart of a report."""
    return path.with_name(f"{path.stem}-scaling{path.suffix}")


def draw(data: dict[str, Any], subtitle: str, path: Path) -> bool:
    """The bars of the table. False: nothing to draw. Needs matplotlib."""
    from smolvla_fast.measure import plot

    benches = rows_of(data)
    if benches:
        bars = {
            counted(benches[0]["cameras"], "camera"): {each["variant"]: each["p50_ms"] for each in benches}
        }
        plot.grouped_bars(bars, "SmolVLA action chunk on a CPU, p50 ms", subtitle, path)
    return bool(benches)


def draw_curves(data: dict[str, Any], subtitle: str, path: Path) -> bool:
    """One panel for each axis. False: nothing to draw. Needs matplotlib."""
    from smolvla_fast.measure import plot

    found = curves(data)
    if found:
        plot.curves(found, "SmolVLA action chunk on a CPU, ms", subtitle, path)
    return bool(found)
