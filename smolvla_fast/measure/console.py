"""Tables and progress on a terminal: by rich where it is installed, in plain text elsewhere."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CommandError(Exception):
    """A command cannot run. The message says what was wrong, what is accepted and what to do."""


class Console:
    """Prints to standard output; progress goes to standard error, so that output can be piped."""

    def __init__(self, rich: bool | None = None) -> None:
        """rich: False forces plain text; None uses rich where it is installed."""
        try:
            import rich as _  # noqa: F401
        except ImportError:
            rich = False
        self.rich = rich is not False
        if self.rich:
            from rich.console import Console as Rich

            # Piped output gets a width that holds every table; rich would assume 80 columns and cut cells.
            self._out = Rich(highlight=False, width=None if sys.stdout.isatty() else 120)

    def line(self, text: str = "") -> None:
        print(text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> None:
        """One table. The first ``left`` columns hold text, the others figures, aligned to the right."""
        cells = [[_cell(value) for value in row] for row in rows]
        if not self.rich:
            self.line(plain_table(title, columns, cells, left))
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        # Not rich's own title: it would be folded to the width of a narrow table.
        self._out.print(Text(title, style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self._out.print(table)

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[str, float], None]]:
        """Yields ``show(label, share)``, to be called when a piece of work begins with the share of all that is done."""
        if not (self.rich and sys.stderr.isatty()):
            yield lambda label, share: print(f"[{share:4.0%}] {label}", file=sys.stderr, flush=True)
            return
        from rich.console import Console as Rich
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Rich(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=1.0)
            yield lambda label, share: bar.update(task, completed=share, description=label)


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """The table as text: a title, a header, a rule and the rows."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join(padded).rstrip()

    return "\n".join([title, line(columns), "  ".join("-" * width for width in widths), *map(line, rows), ""])


def check_writable(path: str | Path, option: str) -> None:
    """Refuses a path that cannot be written, so that no work is done for nothing. Makes its folder.

    option   the argument that gave the path, for the message      raises  CommandError
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not os.path.lexists(path)
        # Opening is the only sure answer: permission bits say nothing of a read-only mount, or to root.
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except (OSError, ValueError) as error:
        raise cannot_write(path, error, option) from error


def check_report(path: str | Path, endings: Sequence[str]) -> None:
    """``check_writable`` of a report's JSON and of the files that are named after it. Raises CommandError.

    endings  of those files, such as ".md" and "-joints.png"
    """
    path = Path(path)
    if path.suffix.lower() in (".md", ".html", ".png"):
        raise CommandError(
            f"--json {path}: the report's own {path.suffix} would lie there; give the name of the figures, such as "
            f"{path.with_suffix('.json')}"
        )
    check_writable(path, "--json")
    for ending in endings:
        check_writable(path.with_name(path.stem + ending), "--json")


def cannot_write(path: str | Path, reason: Exception, option: str) -> CommandError:
    why = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
    return CommandError(f"cannot write {path}: {why}; give another {option} PATH")


def write_json(path: str | Path, data: Any) -> None:
    """Writes data as indented JSON, see ``finite``. Raises CommandError where the file cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(finite(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error, "--json") from error


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def counted(number: int, noun: str) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def milliseconds(value: float) -> str:
    """Three figures that matter, in ms."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def mebibytes(value: float | None) -> str:
    return "not measured" if value is None else f"{value / 2**20:,.0f} MiB"
