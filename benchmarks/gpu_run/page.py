"""A contact's figures as Markdown: the headline, then every part, each figure beside what was predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu_run.plans import HEADLINE
from benchmarks.report.markdown import REHEARSAL, header
from benchmarks.report.sections import parts
from benchmarks.report.tables import NONE, table


def rows(figures: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(its path, a figure), nested ones one by one."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from rows(value, f"{path}/{name}")
        else:
            yield f"{path}/{name}", value


def figure(value: Any) -> str:
    text = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)
    return text.replace("|", "/").replace("\n", " ")[:200]


def headline(data: Mapping[str, Any]) -> dict[str, Any] | None:
    """{ms, by} of the first chunk that was captured and timed: by Triton, else by torch."""
    found = {part["name"]: part["figures"].get("headline") for part in data["parts"]}
    return next((found[name] for name in HEADLINE if found.get(name)), None)


def markdown(data: Mapping[str, Any]) -> str:
    """Predictions are those that the result carries."""
    predicted: Mapping[str, float] = data.get("predicted") or {}
    first, figures = headline(data), {part["name"]: part["figures"] for part in data["parts"]}
    said = (
        f"**{first['ms']:.3f} ms a chunk** ({first['by']})."
        if first
        else "**No chunk was captured and timed.**"
    )
    stock = figures.get("lerobot", {}).get("wall")
    wall = next((figures[name]["wall"] for name in HEADLINE if figures.get(name, {}).get("headline")), None)
    if stock and wall:
        said += (
            f" LeRobot eager: {stock['p50_ms']:.2f} ms; wall by wall {stock['p50_ms'] / wall['p50_ms']:.2f}x."
        )
    text = ["# First contact with a GPU", *([REHEARSAL] if data.get("rehearsal") else []), said]
    text += [header(data["machine_info"]["smolvla_fast"]), "## Parts", parts(dict(data))]
    note = (
        ""
        if predicted
        else " Nothing was predicted for this run: `make gpu-bring` was not asked, or found no account."
    )
    text += ["## Figures", f"Units stand in the names; rounds are in ms.{note}"]
    for part in data["parts"]:
        lines = [
            (name, figure(value), figure(predicted.get(name, NONE)))
            for name, value in rows(part["figures"], part["name"])
        ]
        text += [table(["figure", "measured", "predicted"], lines)] if lines else []
    return "\n\n".join(filter(None, text)) + "\n"
