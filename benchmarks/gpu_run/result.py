"""The result file: pytest-benchmark's form, and the parts of the run beside its benches. benchmarks/report.py reads it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from smolvla_fast.cli import bench
from smolvla_fast.measure import system

SCHEMA = 1
STATUSES = ("green", "red", "skipped")
NEEDED = {
    "chunk": ("variant", "cameras", "batch", "layers", "layout", "steps", "p50_ms", "p95_ms", "p99_ms", "min_ms",
              "rounds", "rel_l2", "max_abs", "floor_ms", "share_of_floor", "peak_bytes"),
    "stages": ("variant", "cameras", "layout", "steps", "stages", "where", "stage_rounds_ms"),
    "ops": ("op", "case", "dtype", "backend", "p50_ms", "min_ms", "flops", "bytes", "floor_ms", "share_of_floor"),
}  # fmt: skip
"""What every bench of a suite says."""


def new(kind: str, args: argparse.Namespace, state: dict[str, str] | None) -> dict[str, Any]:
    """An empty result with everything that is known before the first part."""
    facts = system.facts()
    facts["commit"] = facts["commit"] or args.commit
    facts["nvcc"] = system.nvcc()
    facts["gpu_state"] = {"before": state}
    return {
        "schema": SCHEMA,
        "kind": kind,
        "rehearsal": args.rehearse,
        "machine_info": {"smolvla_fast": facts},
        "parts": [],
        "benchmarks": [],
    }


def file_name(data: dict[str, Any], parts: list[str] | None) -> str:
    label = "" if data["kind"] == "gpu-report" else "peers"
    return bench.result_name(data["machine_info"]["smolvla_fast"], "-".join([label, *(parts or [])]))


def add(
    data: dict[str, Any], outcome: Any, found: dict[str, Any], state: dict[str, str] | None, folder: Path
) -> None:
    """What a part leaves behind."""
    facts = data["machine_info"]["smolvla_fast"]
    data["parts"].append(outcome.to_dict())
    data["benchmarks"] += found["benchmarks"]
    facts["gpu_state"][f"after {outcome.name}"] = state
    ceilings = folder / "ceilings.json"
    if ceilings.is_file():
        facts["ceilings"] = json.loads(ceilings.read_text())


def problems(data: dict[str, Any]) -> list[str]:
    """Where a result does not hold to the schema; [] where it does."""
    found = [
        f"no {key!r}"
        for key in ("schema", "kind", "rehearsal", "machine_info", "parts", "benchmarks")
        if key not in data
    ]
    if found:
        return found
    if data["schema"] != SCHEMA:
        found.append(f"schema {data['schema']}; this code knows {SCHEMA}")
    for part in data["parts"]:
        if part["status"] not in STATUSES:
            found.append(f"part {part['name']}: status {part['status']!r}; known are {', '.join(STATUSES)}")
        if part["status"] != "green" and not part["reason"]:
            found.append(f"part {part['name']} is {part['status']} and does not say why")
    red = {(part["name"], bad["name"]) for part in data["parts"] for bad in part["red"]}
    for each in data["benchmarks"]:
        info, name = each["extra_info"], each["name"]
        needed = NEEDED.get(info.get("suite"))
        if needed is None:
            found.append(f"{name}: suite {info.get('suite')!r}; known are {', '.join(NEEDED)}")
        else:
            found += [f"{name}: no {key!r}" for key in needed if key not in info]
        if any(name == bad for _, bad in red):
            found.append(f"{name} is red and has a number")
        if not each["stats"]["data"]:
            found.append(f"{name} has no raw rounds")
    return found


def write(data: dict[str, Any], path: Path, last: bool) -> None:
    """JSON after every part, so that what stops a run cannot take its figures; Markdown and chart with the last."""
    wrong = problems(data)
    if wrong:
        raise ValueError("the result does not hold to its schema: " + "; ".join(wrong))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")
    if last:
        from benchmarks.report import markdown as report

        report.write(data, path)
