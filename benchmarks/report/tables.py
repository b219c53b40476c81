"""What a report's tables are made of: a column's name says what stands in it, the same in every table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from smolvla_fast.measure.console import mebibytes, milliseconds

# Below this many rounds the highest percentiles are the slowest round; a table would claim too much.
TAIL_ROUNDS = 20
# An idle machine keeps the median of a chunk within a few per cent of the best round. Beyond this something else ran
# meanwhile, and a ratio of medians would say more about that than about the policy.
UNSTEADY = 1.25
MARK = "†"
NONE = "–"
TARGETS = {"fp32": (2.5, 2.7), "bf16": (4.5, 5.0), "int8": (5.5, 7.0)}
"""Ratios to LeRobot eager in fp32 that the tiers are built for, at full size with 2 cameras and 10 steps, and those that
are hoped for; in one run, on a machine that multiplies bf16 and 8 bits faster than fp32."""
OVERHEAD = 0.03
"""The share of a chunk that may be Python."""

Bench = dict[str, Any]
"""What a benchmark's ``extra_info`` says, with its ``group``."""


def unsteady(figures: Bench) -> bool:
    return figures["p50_ms"] > UNSTEADY * (figures.get("min_ms") or figures["p50_ms"])


def of(figures: Bench, key: str, unit: float = 1, digits: int = 0) -> str:
    value = figures.get(key)
    return NONE if value is None else f"{value / unit:,.{digits}f}"


def ms(figures: Bench, key: str) -> str:
    return milliseconds(figures[key]) if key in figures else NONE


def tail(figures: Bench, key: str) -> str:
    return ms(figures, key) if figures["rounds"] >= TAIL_ROUNDS else NONE


def ratio(base: Bench | None, figures: Bench) -> str:
    """How many times faster: of rounds side by side, else of medians; a dash where other work disturbed those."""
    if "ratio" in figures:
        return f"{figures['ratio']:.2f}x"
    if base is None or unsteady(base) or unsteady(figures):
        return NONE
    return f"{base['p50_ms'] / figures['p50_ms']:.2f}x"


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


COLUMNS: dict[str, Callable[[Bench], Any]] = {
    "p50 ms": lambda b: ms(b, "p50_ms") + MARK * ("min_ms" in b and b.get("suite") != "cpu" and unsteady(b)),
    "best ms": lambda b: ms(b, "min_ms"),
    "p95 ms": lambda b: tail(b, "p95_ms"),
    "p99 ms": lambda b: tail(b, "p99_ms"),
    "rounds": lambda b: b["rounds"],
    "chunks/s": lambda b: f"{1000 / b['p50_ms']:.2f}",
    "samples/s": lambda b: f"{1e3 * b['batch'] / b['p50_ms']:.3g}",
    "ratio": lambda b: ratio(b.get("base"), b),
    "ratio to stock": lambda b: ratio(None, b) + MARK * unsteady(b),
    "floor ms": lambda b: ms(b, "floor_ms"),
    "of the roof": lambda b: f"{b['share_of_floor']:.0%}" if "share_of_floor" in b else NONE,
    "rel L2": lambda b: f"{b['rel_l2']:.1e}",
    "max abs": lambda b: f"{b['max_abs']:.1e}",
    "gradients, rel L2": lambda b: f"{b['gradient_rel_l2']:.1e}",
    "allowed": lambda b: f"{b['bound']:.1e}",
    "loss": lambda b: f"{b['loss_rel']:.1e}",
    "peak GiB": lambda b: of(b, "peak_bytes", 2**30, 2),
    "share": lambda b: f"{b['p50_ms'] / b['of']['total']['p50_ms']:.0%}",
    "target": lambda b: target(b),
    "accuracy against stock in fp32": lambda b: accuracy(b),
    "GFLOP": lambda b: of(b, "flops", 1e9, 1),
    "case": lambda b: " ".join(f"{name}={value}" for name, value in b["case"].items()),
    "p50 µs": lambda b: of(b, "p50_ms", 1e-3) + MARK * unsteady(b),
    "best µs": lambda b: of(b, "min_ms", 1e-3),
    "GFLOP/s": lambda b: of(b, "gflops_per_s"),
    "GB/s": lambda b: of(b, "gbytes_per_s", digits=1),
    "wall p50 ms": lambda b: ms(b, "p50_ms"),
    "device p50 ms": lambda b: ms(b["device_ms"], "p50_ms"),
    "device p99 ms": lambda b: ms(b["device_ms"], "p99_ms"),
    "host ms": lambda b: of(b, "host_ms", digits=2),
    "first chunk ms": lambda b: of(b, "first_chunk_ms"),
    "graph nodes": lambda b: of(b.get("status", {}), "graph_nodes"),
    "launches a step": lambda b: of(b.get("status", {}), "step_launches"),
    "graph MiB": lambda b: of(b.get("status", {}), "graph_bytes", 2**20),
    "peak MiB": lambda b: of(b, "peak_bytes", 2**20),
    "run by": lambda b: b["status"]["stages"]["denoise"],
    "launches": lambda b: (
        "one for all steps" if b["status"]["step_launches"] == 0 else of(b["status"], "step_launches")
    ),
    "not in one launch, for": lambda b: b["status"]["fallback_reasons"].get("denoise_persistent", ""),
    "extra bytes": lambda b: mebibytes(b.get("extra_bytes")) if b["kind"] == "tier" else NONE,
    "peak memory": lambda b: mebibytes(b["peak_bytes"]),
    "of it new": lambda b: mebibytes(b["added_bytes"]),
    "sample_actions ms": lambda b: ms(b, "sample_actions_ms"),
    "outside ops ms": lambda b: f"{ms(b, 'outside_ms')} ({b['outside_share']:.1%})",
    "narrow policy ms": lambda b: f"{ms(b, 'narrow_ms')} ({b['narrow_share']:.1%})",
    "op calls": lambda b: b["op_calls"],
    "allocations a step": lambda b: of(b, "step_allocations"),
    "bytes a step": lambda b: mebibytes(b["step_bytes"]),
}
"""A cell by the column's name; a name that is not here is a key of the benchmark. ``base`` is what a ratio is to."""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], left: int | None = None) -> str:
    """Markdown. left  how many columns hold text; None: all are aligned as such"""
    rule = ["---" if left is None or place < left else "---:" for place in range(len(columns))]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, rule, *rows))


def figures(columns: str, rows: Sequence[tuple[Sequence[Any], Bench]]) -> str:
    """A table of COLUMNS behind unnamed ones with the labels of a row; "" without rows.

    columns  their names with " | " between them      rows  (labels, benchmark)
    """
    names = columns.split(" | ")
    cells = [
        [*labels, *(COLUMNS.get(n, lambda b, n=n: b[n])(bench) for n in names)] for labels, bench in rows
    ]
    return table([*[""] * len(rows[0][0]), *names], cells) if rows else ""


def suite(data: dict[str, Any], name: str, having: str = "group") -> list[Bench]:
    """The benchmarks of a suite that have something."""
    found = ({**each, **each["extra_info"]} for each in data["benchmarks"])
    return [each for each in found if each.get("suite") == name and having in each]


def groups(benches: list[Bench]) -> dict[str, list[Bench]]:
    found: dict[str, list[Bench]] = {}
    for bench in benches:
        found.setdefault(bench["group"].split(": ", 1)[-1], []).append(bench)
    return found


def of_variants(columns: str, benches: list[Bench]) -> str:
    """A row for each variant of a group; ratios are to stock."""
    stock = next((bench for bench in benches if bench["variant"] == "stock"), None)
    text = figures(columns, [([bench["variant"]], {"base": stock, **bench}) for bench in benches])
    note = (
        f"\n\n{MARK} unsteady: the median is more than {UNSTEADY:g} times the best round, so other work disturbed it; no "
        "ratio of medians is given."
    )
    return text + note * any(map(unsteady, benches))
