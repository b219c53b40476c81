"""The CPU suite's part of a report: the table of tiers and peers, stages, overhead and scaling."""

from __future__ import annotations

from typing import Any

from benchmarks.report.tables import NONE, Bench, figures, milliseconds, of_variants, suite, table

TARGETS = {"fp32": (2.5, 2.7), "bf16": (4.5, 5.0), "int8": (5.5, 7.0)}
"""Ratios to LeRobot eager in fp32 that the tiers are built for, at full size with 2 cameras and 10 steps, and those that
are hoped for; in one run, on a machine that multiplies bf16 and 8 bits faster than fp32."""
OVERHEAD = 0.03
"""The share of a chunk that may be Python."""
TIERS_TEXT = (
    "Rounds are taken in turn; the ratio is the median over rounds of stock's time by the time beside it. Of the roof: "
    "the least time for the matrix products at the fastest measured product that is no narrower than the tier, by p50. "
    "Peak memory is the process's during the first chunk, in the order of the rows; of it new is what was not resident "
    "before that chunk."
)
OVERHEAD_TEXT = (
    "Outside ops: the engine's Python and the small torch calls between ops. Narrow policy: the same sequence of calls "
    "at widths that hardly cost arithmetic, so all Python, dispatch and starts of parallel work, the ops' own too: an "
    "upper bound. Allocations: what a denoise step more asks of torch's allocator."
)


def target(bench: Bench) -> str:
    """What the tier is built for, and whether this run shows it; a dash for what is no tier of the table."""
    if bench["kind"] != "tier" or bench["precision"] not in TARGETS:
        return NONE
    least, aim = TARGETS[bench["precision"]]
    met = "missed" if bench["ratio"] < least else "met" if bench["ratio"] < aim else "aim met"
    return f">= {least:g}x, aim {aim:g}x: {met}"


def accuracy(bench: Bench) -> str:
    heavy = f", {bench['heavy_cosine']:.6f} on heavy tails" if "heavy_cosine" in bench else ""
    return f"rel L2 {bench['rel_l2']:.1e}; cosine {bench['cosine']:.6f}{heavy}; check: {bench['gate']}"


def tiers(data: dict[str, Any]) -> str:
    benches, facts = suite(data, "cpu"), data["machine_info"]["smolvla_fast"]
    if not benches:
        return ""
    level, torchs = facts.get("instruction_level") or "no compiled kernels", facts.get("torch_capability")
    columns = "ratio to stock | target | accuracy against stock in fp32 | p50 ms | p95 ms | p99 ms | best ms | rounds"
    columns += " | of the roof | extra bytes | peak memory | of it new"
    judged = {each["variant"]: each["precision"] for each in benches if each["kind"] == "peer"}
    ours = {each["precision"]: each["p50_ms"] for each in benches if each["kind"] == "tier"}
    for each in benches:
        each.update({"target": target(each), "accuracy against stock in fp32": accuracy(each)})
    parts = [
        f"{benches[0]['group'].removeprefix('cpu: ')}; our kernels at level {level}, torch's at {torchs}",
        of_variants(columns, benches),
        TIERS_TEXT,
    ]
    for each in benches:
        reasons = each.get("fallback_reasons", {}).items()
        parts += [f"{each['variant']}, {name}: {reason}" for name, reason in reasons]
    for each in benches:
        precision = judged.get(each["variant"])
        if precision in ours:
            found = f"{each['p50_ms'] / ours[precision]:.2f}x at {precision}, medians of the same rounds."
            parts.append(f"Against {each['variant']}: {found}")
    return "\n\n".join(parts)


def stages(data: dict[str, Any]) -> str:
    """Of the CPU suite; the stages suite has a section of its own."""
    benches, names, rows = suite(data, "cpu", having="stages"), ("vision", "prefix", "denoise"), []
    for bench in benches:
        found = ((bench["stages"][name]["p50_ms"], benches[0]["stages"][name]["p50_ms"]) for name in names)
        rows.append([bench["variant"], *(f"{milliseconds(ms)} ({base / ms:.2f}x)" for ms, base in found)])
    return table(["", *(f"{name} ms" for name in names)], rows) if rows else ""


def overhead(data: dict[str, Any]) -> str:
    found = {bench["variant"]: bench["overhead"] for bench in suite(data, "cpu", having="overhead")}
    lines = []
    for name, each in found.items():
        low, high = each["outside_share"] < OVERHEAD, each["narrow_share"] < OVERHEAD
        python = "met by both" if high else "met by the first, missed by the upper bound" if low else "missed"
        loop = "met" if each["step_allocations"] == 0 else f"missed: {each['step_allocations']:,.0f} a step"
        python = f"Python under {OVERHEAD:.0%} of a chunk: {python}"
        lines.append(f"{name}: {python}. Nothing allocated in the loop: {loop}.")
    columns = (
        "sample_actions ms | outside ops ms | narrow policy ms | op calls | allocations a step | bytes a step"
    )
    rows = [([name], each) for name, each in found.items()]
    return "\n\n".join([figures(columns, rows), OVERHEAD_TEXT, *lines]) if rows else ""


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
        cells = [[milliseconds(each[v]) if v in each else NONE for v in values] for each in variants.values()]
        rows = [[name, *each] for name, each in zip(variants, cells, strict=True)]
        parts.append(table([f"ms by {axis}", *map(str, values)], rows))
    return "\n\n".join(parts)
