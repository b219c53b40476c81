"""What all sections of a report are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smolvla_fast.measure.console import milliseconds

# Below this many rounds the highest percentiles are the slowest round; a table would claim too much.
TAIL_ROUNDS = 20
# An idle machine keeps the median of a chunk within a few per cent of the best round. Beyond this something else ran
# meanwhile, and a ratio of medians would say more about that than about the policy.
UNSTEADY = 1.25
MARK = "†"
NONE = "–"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def suite(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The benchmarks of a suite, each with what it says beside its times."""
    return [
        {**each, **each["extra_info"]}
        for each in data["benchmarks"]
        if each["extra_info"].get("suite") == name
    ]


def groups(benches: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for bench in benches:
        found.setdefault(bench["group"], []).append(bench)
    return found


def unsteady(figures: dict[str, Any]) -> bool:
    return figures["p50_ms"] > UNSTEADY * figures.get("min_ms", figures["p50_ms"])


def ratio(base: dict[str, Any] | None, figures: dict[str, Any]) -> str:
    """How many times faster: of rounds side by side, else of medians; a dash where other work disturbed those."""
    if "ratio" in figures:
        return f"{figures['ratio']:.2f}x"
    if base is None or unsteady(base) or unsteady(figures):
        return NONE
    return f"{base['p50_ms'] / figures['p50_ms']:.2f}x"


def footnote(benches: list[dict[str, Any]]) -> str:
    if not any(map(unsteady, benches)):
        return ""
    return (
        f"\n\n{MARK} unsteady: the median is more than {UNSTEADY:g} times the best round, so other work disturbed it; no "
        "ratio of medians is given."
    )


def times(bench: dict[str, Any]) -> list[str]:
    """p50, best, p95, p99."""
    tails = [milliseconds(bench[f"p{p}_ms"]) if bench["rounds"] >= TAIL_ROUNDS else NONE for p in (95, 99)]
    return [milliseconds(bench["p50_ms"]) + MARK * unsteady(bench), milliseconds(bench["min_ms"]), *tails]


def share(figures: dict[str, Any]) -> str:
    return f"{figures['share_of_floor']:.0%}" if "share_of_floor" in figures else NONE


def of(figures: dict[str, Any], key: str, unit: float = 1, digits: int = 0) -> str:
    value = figures.get(key)
    return NONE if value is None else f"{value / unit:,.{digits}f}"
