"""The CPU suite's part of a report: the table of tiers and peers, stages, overhead and scaling."""

from __future__ import annotations

from typing import Any

from benchmarks.report.tables import MARK, NONE, footnote, milliseconds, suite, table, times, unsteady
from smolvla_fast.measure.console import mebibytes

TARGETS = {"fp32": (2.5, 2.7), "bf16": (4.5, 5.0), "int8": (5.5, 7.0)}
"""Ratios to LeRobot eager in fp32 that the tiers are built for, at full size with 2 cameras and 10 steps, and those that
are hoped for; in one run, on a machine that multiplies bf16 and 8 bits faster than fp32."""
OVERHEAD = 0.03
"""The share of a chunk that may be Python."""


def target(bench: dict[str, Any]) -> str:
    """What the tier is built for, and whether this run shows it; a dash for what is no tier of the table."""
    if bench["kind"] != "tier" or bench["precision"] not in TARGETS:
        return NONE
    least, aim = TARGETS[bench["precision"]]
    met = "missed" if bench["ratio"] < least else "met" if bench["ratio"] < aim else "aim met"
    return f">= {least:g}x, aim {aim:g}x: {met}"


def accuracy(bench: dict[str, Any]) -> str:
    heavy = f", {bench['heavy_cosine']:.6f} on heavy tails" if "heavy_cosine" in bench else ""
    return f"rel L2 {bench['rel_l2']:.1e}; cosine {bench['cosine']:.6f}{heavy}; check: {bench['gate']}"


def tiers(data: dict[str, Any]) -> str:
    benches = suite(data, "cpu")
    if not benches:
        return ""
    facts = data["machine_info"]["smolvla_fast"]
    rows = []
    for bench in benches:
        p50, best, *tails = times(bench)
        rows.append([
            bench["variant"], f"{bench['ratio']:.2f}x" + MARK * unsteady(bench), target(bench), accuracy(bench),
            p50.strip(MARK), *tails, best, bench["rounds"], f"{bench['share_of_floor']:.0%}",
            mebibytes(bench.get("extra_bytes")) if bench["kind"] == "tier" else NONE, mebibytes(bench["peak_bytes"]),
            mebibytes(bench["added_bytes"]),
        ])  # fmt: skip
    columns = [
        "", "ratio to stock", "target", "accuracy against stock in fp32", "p50 ms", "p95 ms", "p99 ms", "best ms",
        "rounds", "of the roof", "extra bytes", "peak memory", "of it new",
    ]  # fmt: skip
    level = facts.get("instruction_level") or "no compiled kernels"
    parts = [
        f"{benches[0]['group'].removeprefix('cpu: ')}; our kernels at level {level}, torch's at "
        f"{facts.get('torch_capability')}",
        table(columns, rows) + footnote(benches),
        "Rounds are taken in turn; the ratio is the median over rounds of stock's time by the time beside it. Of the roof: "
        "the least time for the matrix products at the fastest measured product that is no narrower than the tier, by p50. "
        "Peak memory is the process's during the first chunk, in the order of the rows; of it new is what was not resident "
        "before that chunk.",
    ]
    parts += [
        f"{bench['variant']}, {name}: {reason}"
        for bench in benches
        for name, reason in bench.get("fallback_reasons", {}).items()
    ]
    ours = {bench["precision"]: bench for bench in benches if bench["kind"] == "tier"}
    parts += [
        f"Against {peer['variant']}: {peer['p50_ms'] / ours[peer['precision']]['p50_ms']:.2f}x at "
        f"{peer['precision']}, medians of the same rounds."
        for peer in benches
        if peer["kind"] == "peer" and peer["precision"] in ours
    ]
    return "\n\n".join(parts)


def stages(data: dict[str, Any]) -> str:
    """Of the CPU suite; the stages suite has a section of its own."""
    benches = [bench for bench in suite(data, "cpu") if "stages" in bench]
    names = ("vision", "prefix", "denoise")
    found = [(bench["variant"], [bench["stages"][name]["p50_ms"] for name in names]) for bench in benches]
    rows = [
        [
            variant,
            *(f"{milliseconds(ms)} ({stock / ms:.2f}x)" for ms, stock in zip(each, found[0][1], strict=True)),
        ]
        for variant, each in found
    ]
    return table(["", *(f"{name} ms" for name in names)], rows) if rows else ""


def overhead(data: dict[str, Any]) -> str:
    found = {bench["variant"]: bench["overhead"] for bench in suite(data, "cpu") if "overhead" in bench}
    if not found:
        return ""
    rows = [
        [
            name, milliseconds(each["sample_actions_ms"]),
            f"{milliseconds(each['outside_ms'])} ({each['outside_share']:.1%})",
            f"{milliseconds(each['narrow_ms'])} ({each['narrow_share']:.1%})", each["op_calls"],
            f"{each['step_allocations']:,.0f}", mebibytes(each["step_bytes"]),
        ]
        for name, each in found.items()
    ]  # fmt: skip
    columns = [
        "",
        "sample_actions ms",
        "outside ops ms",
        "narrow policy ms",
        "op calls",
        "allocations a step",
        "bytes a step",
    ]
    lines = [
        "Outside ops: the engine's Python and the small torch calls between ops. Narrow policy: the same sequence of calls "
        "at widths that hardly cost arithmetic, so all Python, dispatch and starts of parallel work, the ops' own too: an "
        "upper bound. Allocations: what a denoise step more asks of torch's allocator."
    ]
    for name, each in found.items():
        low, high = each["outside_share"] < OVERHEAD, each["narrow_share"] < OVERHEAD
        python = "met by both" if high else "met by the first, missed by the upper bound" if low else "missed"
        loop = "met" if each["step_allocations"] == 0 else f"missed: {each['step_allocations']:,.0f} a step"
        lines.append(
            f"{name}: Python under {OVERHEAD:.0%} of a chunk: {python}. Nothing allocated in the loop: {loop}."
        )
    return "\n\n".join([table(columns, rows), *lines])


def curves(data: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """axis -> variant -> value -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in suite(data, "scaling"):
        found.setdefault(row["axis"], {}).setdefault(row["variant"], {})[row["value"]] = row["p50_ms"]
    return found


def scaling(data: dict[str, Any], chart: str | None = None) -> str:
    parts = [f"![time against cameras, steps, threads and batch]({chart})"] if chart else []
    for axis, variants in curves(data).items():
        values = sorted({value for each in variants.values() for value in each})
        rows = [
            [name, *(milliseconds(each[value]) if value in each else NONE for value in values)]
            for name, each in variants.items()
        ]
        parts.append(table([f"ms by {axis}", *map(str, values)], rows))
    return "\n\n".join(parts)
