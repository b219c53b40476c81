"""What a report's tables are made of: a column's name says what stands in it, the same in every table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from smolvla_fast.measure.console import mebibytes, milliseconds
from smolvla_fast.measure.page import table

# Below this many rounds the highest percentiles are the slowest round; a table would claim too much.
TAIL_ROUNDS = 20
# An idle machine keeps the median of a chunk within a few per cent of the best round. Beyond this something else ran
# meanwhile, and a ratio of medians would say more about that than about the policy.
UNSTEADY = 1.25
MARK = "†"
NOTE = (
    f"{MARK} unsteady: the median is more than {UNSTEADY:g} times the best round, so other work disturbed it; no ratio of "
    "medians is given."
)
NONE = "–"
OVERHEAD = 0.03
"""The share of a chunk that may be Python."""

Bench = dict[str, Any]
"""What a benchmark's ``extra_info`` says, with its ``group``."""


def unsteady(figures: Bench) -> bool:
    return figures["p50_ms"] > UNSTEADY * (figures.get("min_ms") or figures["p50_ms"])


def of(figures: Bench, key: str, unit: float = 1, digits: int = 0) -> str:
    value = figures.get(key)
    return NONE if value is None else f"{value / unit:,.{digits}f}"


def ms(figures: Mapping[Any, float], key: Any) -> str:
    return milliseconds(figures[key]) if key in figures else NONE


def tail(figures: Bench, key: str) -> str:
    return ms(figures, key) if figures["rounds"] >= TAIL_ROUNDS else NONE


def ratio(figures: Bench) -> str:
    """How many times faster: of rounds side by side, else of medians; a dash where other work disturbed those."""
    if "ratio" in figures:
        return f"{figures['ratio']:.2f}x"
    base = figures["base"]
    steady = base and not unsteady(base) and not unsteady(figures)
    return f"{base['p50_ms'] / figures['p50_ms']:.2f}x" if steady else NONE


def accuracy(bench: Bench) -> str:
    heavy = f", {bench['heavy_cosine']:.6f} on heavy tails" if "heavy_cosine" in bench else ""
    return f"rel L2 {bench['rel_l2']:.1e}; cosine {bench['cosine']:.6f}{heavy}; check: {bench['gate']}"


def of_stage(bench: Bench, stage: str) -> str:
    """ms of one stage, and how many times faster than stock's."""
    base, own = (each["stages"][stage]["p50_ms"] for each in (bench["base"] or bench, bench))
    return f"{milliseconds(own)} ({base / own:.2f}x)"


MILLISECONDS = {
    "best ms": "min_ms", "longest ms": "max_ms", "floor ms": "floor_ms", "wall p50 ms": "p50_ms",
    "sample_actions ms": "sample_actions_ms",
}  # fmt: skip
ERRORS = {
    "rel L2": "rel_l2", "max abs": "max_abs", "gradients, rel L2": "gradient_rel_l2", "allowed": "bound", "loss": "loss_rel",
}  # fmt: skip
COLUMNS: dict[str, Callable[[Bench], Any]] = {
    **{name: itemgetter(name) for name in ("rounds", "op", "dtype", "backend", "stage")},
    **{f"{name} ms": partial(of_stage, stage=name) for name in ("vision", "prefix", "denoise", "data", "update")},
    **{name: partial(ms, key=key) for name, key in MILLISECONDS.items()},
    **{name: f"{{0[{key}]:.1e}}".format for name, key in ERRORS.items()},
    "p50 ms": lambda b: ms(b, "p50_ms") + MARK * ("min_ms" in b and b.get("suite") != "cpu" and unsteady(b)),
    **{f"{name} ms": partial(tail, key=f"{name}_ms") for name in ("p95", "p99")},
    "chunks/s": lambda b: f"{1000 / b['p50_ms']:.2f}",
    "samples/s": lambda b: f"{1e3 * b['batch'] / b['p50_ms']:.3g}",
    "ratio": ratio,
    "ratio to stock": lambda b: ratio(b) + MARK * unsteady(b),
    "of the roof": lambda b: f"{b['share_of_floor']:.0%}" if "share_of_floor" in b else NONE,
    "in turn": lambda b: f"{b['share_in_turn']:.0%}" if "share_in_turn" in b else NONE,
    "peak GiB": lambda b: of(b, "peak_bytes", 2**30, 2),
    "of it new GiB": lambda b: of(b, "added_bytes", 2**30, 2),
    "peak MiB": lambda b: of(b, "peak_bytes", 2**20),
    "share": lambda b: f"{b['p50_ms'] / b['of']['total']['p50_ms']:.0%}",
    "accuracy against stock in fp32": accuracy,
    "GFLOP": lambda b: of(b, "flops", 1e9, 1),
    "case": lambda b: " ".join(f"{name}={value}" for name, value in b["case"].items()),
    "p50 µs": lambda b: of(b, "p50_ms", 1e-3) + MARK * unsteady(b),
    "best µs": lambda b: of(b, "min_ms", 1e-3),
    "GFLOP/s": lambda b: of(b, "gflops_per_s"),
    "GB/s": lambda b: of(b, "gbytes_per_s", digits=1),
    "device p50 ms": lambda b: ms(b["device_ms"], "p50_ms"),
    "device p99 ms": lambda b: ms(b["device_ms"], "p99_ms"),
    "host ms": lambda b: of(b, "host_ms", digits=2),
    "first chunk ms": lambda b: of(b, "first_chunk_ms"),
    "graph nodes": lambda b: of(b.get("status", {}), "graph_nodes"),
    "launches a step": lambda b: of(b.get("status", {}), "step_launches"),
    "graph MiB": lambda b: of(b.get("status", {}), "graph_bytes", 2**20),
    "run by": lambda b: b["status"]["stages"]["denoise"],
    "launches": lambda b: "one for all steps" if b["status"]["step_launches"] == 0 else of(b["status"], "step_launches"),
    "not in one launch, for": lambda b: b["status"]["fallback_reasons"].get("denoise_persistent", ""),
    "peak memory": lambda b: mebibytes(b["peak_bytes"]),
    "of it new": lambda b: mebibytes(b["added_bytes"]),
    "bytes a step": lambda b: mebibytes(b["step_bytes"]),
    "extra bytes": lambda b: mebibytes(b.get("extra_bytes")) if b["kind"] == "tier" else NONE,
    "outside ops ms": lambda b: f"{ms(b, 'outside_ms')} ({b['outside_share']:.1%})",
    "narrow policy ms": lambda b: f"{ms(b, 'narrow_ms')} ({b['narrow_share']:.1%})",
    "op calls": itemgetter("op_calls"),
    "allocations a step": lambda b: of(b, "step_allocations"),
}  # fmt: skip
"""A cell by the column's name."""


def figures(columns: str, rows: Sequence[Bench], *labels: str) -> str:
    """A table of COLUMNS, their names with " | " between them, behind unnamed ones with these labels; "" without rows."""
    names = columns.split(" | ")
    cells = [[*(row[label] for label in labels), *(COLUMNS[name](row) for name in names)] for row in rows]
    text = table([*[""] * len(labels), *names], cells) if rows else ""
    return f"{text}\n\n{NOTE}" if MARK in text else text


def suite(data: dict[str, Any], name: str, having: str = "group") -> list[Bench]:
    """The benchmarks of a suite that have something: ``group`` without the suite's name, ``base`` what a ratio is to."""
    found = ({**each["extra_info"], "group": each["group"].partition(": ")[2]} for each in data["benchmarks"])
    rows = [each for each in found if each.get("suite") == name]
    bases = {(each["group"], each["variant"]): each for each in rows}
    return [{**r, "base": bases.get((r["group"], r.get("ratio_to", "stock")))} for r in rows if having in r]
