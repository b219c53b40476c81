"""The tables of benchmarks/results/aot.md and ptxas.md, read back."""

from __future__ import annotations

Key = tuple[str, ...]
"""Section, kind of table (its first column), and the labels of a row."""


def read(text: str) -> dict[Key, dict[str, str]]:
    """The cells as text, by key and target."""
    found: dict[Key, dict[str, str]] = {}
    for section in text.split("\n## ")[1:]:
        name, _, body = section.partition("\n")
        for table in body.split("\n\n"):
            lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
            for row in lines[2:]:
                cells = dict(zip(lines[0], row, strict=True))
                labels = [cell.strip("`") for column, cell in cells.items() if not column.startswith("sm_")]
                by_target = {c.removeprefix("sm_"): cell for c, cell in cells.items() if c.startswith("sm_")}
                found[(name, lines[0][0], *labels)] = by_target
    return found
