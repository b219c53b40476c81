"""The log of a run: one JSON object a line, in ``output_dir/train_log.jsonl``."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from .disk import advice, replace
from .errors import TrainingError, root_cause

NAME = "train_log.jsonl"


class Window:
    """Means since the last line, over optimizer steps; ``data_s`` and ``update_s`` are seconds a step."""

    def __init__(self) -> None:
        self.sums, self.count = Counter[str](), 0

    def add(self, samples: int, **values: float) -> None:
        self.count += 1
        self.sums.update({"samples": samples, **values})

    def means(self) -> dict[str, float]:
        means = {name: value / self.count for name, value in self.sums.items()}
        samples = means.pop("samples")
        return {**means, "samples_per_s": samples / (means["data_s"] + means["update_s"])}


class Log:
    """Appends lines. A run resumed at ``step`` first drops later lines, since it writes them again.

    every  steps between the lines that ``add`` writes; 0: none
    track  called with the values and the step of each line, for other trackers
    """

    def __init__(self, output_dir: Path, step: int, every: int, track: Any = lambda *_, **__: None) -> None:
        self.path, self.step, self.every, self.track = output_dir / NAME, step, every, track
        self.window = Window()
        if self.path.exists():
            kept = [entry for entry in read_log(output_dir) if entry["step"] <= step]
            self._write(self.path.with_suffix(".partial"), "w", kept)

    def add(self, step: int, samples: int, **facts: float) -> None:
        """Records a step, and writes the means since the last line when one is due."""
        self.step = step
        self.window.add(samples, **facts)
        if self.every and step % self.every == 0:
            self.close()

    def close(self) -> None:
        """Writes the means since the last line, if there were steps since."""
        window, self.window = self.window, Window()
        if self.every and window.count:
            self.write(self.step, window.means())

    def write(self, step: int, values: dict[str, float]) -> None:
        self._write(self.path, "a", [{"step": step, **values}])
        self.track(values, step=step)

    def _write(self, path: Path, mode: str, entries: list[dict[str, Any]]) -> None:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)
            if path != self.path:
                replace(path, self.path)
        except OSError as error:
            said = f"cannot write {path}: {root_cause(error)}; {advice(error)} and resume"
            raise TrainingError(said) from error


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """All entries; none without a log. A line that a kill cut short is skipped."""
    path, entries = output_dir / NAME, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    return entries
