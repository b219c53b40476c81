"""The parts of a run, and what a GPU's report has beyond the others: device time, memory, the denoise loop."""

from __future__ import annotations

from typing import Any

from benchmarks.report.tables import figures, groups, of, suite, table

REHEARSAL = (
    "**A rehearsal**: a tiny policy on a CPU, in few rounds. It shows that the report can be made; its times say "
    "nothing about any GPU."
)
DEVICE = (
    "wall: `predict_action_chunk` until its chunk can be read; device: what the GPU works on it, by events around "
    "work that was queued before it began; host: the difference of the medians. Shares of the roof above are of device "
    "time where it is measured. First chunk: compiling where nothing was cached, capture, and one chunk."
)


def parts(data: dict[str, Any]) -> str:
    """How each part went, and what has no number, with the reason."""
    found, lines = data.get("parts", []), []
    for part in found:
        lines += [f"**{each['name']} is red, so it has no number**: {each['reason']}" for each in part["red"]]
        lines += [f"{each['name']} did not run: {each['reason']}" for each in part["skipped"]]
        lines += [f"Left out: {'; '.join(part['left_out'])}."] if part["left_out"] else []
    rows = [[p["name"], p["status"], of(p, "seconds"), p["reason"].replace("|", "/")] for p in found]
    return "\n\n".join([table(["part", "", "s", ""], rows), *lines]) if rows else ""


def device(data: dict[str, Any]) -> str:
    """Wall, device and host time of each tier; its graph and its memory."""
    found = groups(suite(data, "chunk", having="device_ms"))
    rows = [((group, bench["variant"]), bench) for group, benches in found.items() for bench in benches]
    columns = (
        "wall p50 ms | device p50 ms | device p99 ms | host ms | floor ms | first chunk ms | graph nodes"
    )
    columns += " | launches a step | graph MiB | peak MiB"
    return f"{DEVICE}\n\n{figures(columns, rows)}" if rows else ""


def denoise(data: dict[str, Any]) -> str:
    """One tier's denoise stage by backend, and whether its loop was one launch."""
    rows = []
    for group, benches in groups(suite(data, "stages", having="loop_backend")).items():
        base = benches[0]["stages"]["denoise"]
        for bench in benches:
            loop = {"base": base, "status": bench["status"], **bench["stages"]["denoise"]}
            rows.append(((group, bench["variant"]), loop))
    return figures(
        "run by | launches | p50 ms | ratio | floor ms | of the roof | not in one launch, for", rows
    )


def stage_title(data: dict[str, Any]) -> str:
    if data["rehearsal"]:
        return "REHEARSAL on a CPU, tiny policy: stages, p50 ms; black: floor"
    return "SmolVLA action chunk by stage, p50 ms; black: floor measured in the same run"


def stage_bars(data: dict[str, Any], key: str) -> dict[str, dict[str, float]]:
    """By stage p50 or floor of the tiers; stock is of another order and stands in the table."""
    bars: dict[str, dict[str, float]] = {}
    for bench in suite(data, "stages"):
        if bench["variant"] != "stock" and "loop_backend" not in bench:
            for stage, found in bench["stages"].items():
                if "floor_ms" in found:
                    bars.setdefault(stage, {})[bench["variant"]] = found[key]
    return bars
