"""The parts of a run, and what a GPU's report has beyond the others: device time, memory, the denoise loop."""

from __future__ import annotations

from typing import Any

from benchmarks.report.tables import NONE, groups, milliseconds, of, ratio, share, suite, table

REHEARSAL = (
    "**A rehearsal**: a tiny policy on a CPU, in few rounds. It shows that the report can be made; its times say "
    "nothing about any GPU."
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
    rows = []
    for group, benches in groups([each for each in suite(data, "chunk") if "device_ms" in each]).items():
        for bench in benches:
            device_ms, status = bench["device_ms"], bench.get("status", {})
            rows.append([
                group.removeprefix("chunk: "), bench["variant"], milliseconds(bench["p50_ms"]),
                milliseconds(device_ms["p50_ms"]), milliseconds(device_ms["p99_ms"]), of(bench, "host_ms", digits=2),
                milliseconds(bench["floor_ms"]), of(bench, "first_chunk_ms"), of(status, "graph_nodes"),
                of(status, "step_launches"), of(status, "graph_bytes", 2**20), of(bench, "peak_bytes", 2**20),
            ])  # fmt: skip
    text = (
        "wall: `predict_action_chunk` until its chunk can be read; device: what the GPU works on it, by events around "
        "work that was queued before it began; host: the difference of the medians. Shares of the roof above are of device "
        "time where it is measured. First chunk: compiling where nothing was cached, capture, and one chunk."
    )
    columns = [
        "", "", "wall p50 ms", "device p50 ms", "device p99 ms", "host ms", "floor ms", "first chunk ms", "graph nodes",
        "launches a step", "graph MiB", "peak MiB",
    ]  # fmt: skip
    return f"{text}\n\n{table(columns, rows)}" if rows else ""


def denoise(data: dict[str, Any]) -> str:
    """One tier's denoise stage by backend, and whether its loop was one launch."""
    rows = []
    for group, benches in groups([each for each in suite(data, "stages") if "loop_backend" in each]).items():
        first = benches[0]["stages"]["denoise"]
        for bench in benches:
            loop, status = bench["stages"]["denoise"], bench["status"]
            launches = status["step_launches"]
            rows.append([
                group.removeprefix("stages: "), bench["variant"], status["stages"]["denoise"],
                NONE if launches is None else "one for all steps" if launches == 0 else f"{launches}",
                milliseconds(loop["p50_ms"]), ratio(first, loop), milliseconds(loop["floor_ms"]), share(loop),
                status["fallback_reasons"].get("denoise_persistent", ""),
            ])  # fmt: skip
    columns = [
        "",
        "",
        "run by",
        "launches a step",
        "p50 ms",
        "ratio",
        "floor ms",
        "of the roof",
        "not in one launch, for",
    ]
    return table(columns, rows) if rows else ""


def stage_title(data: dict[str, Any]) -> str:
    if data["rehearsal"]:
        return "REHEARSAL on a CPU, tiny policy: stages, p50 ms; black: floor"
    return "SmolVLA action chunk by stage, p50 ms; black: floor measured in the same run"


def stage_bars(data: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """By stage p50 and floor of the tiers; stock is of another order and stands in the table."""
    bars: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, float]] = {}
    for bench in suite(data, "stages"):
        if bench["variant"] != "stock" and "loop_backend" not in bench:
            for stage, figures in bench["stages"].items():
                if "floor_ms" in figures:
                    bars.setdefault(stage, {})[bench["variant"]] = figures["p50_ms"]
                    floors.setdefault(stage, {})[bench["variant"]] = figures["floor_ms"]
    return bars, floors
