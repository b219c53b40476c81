"""What a GPU's report has beyond the others: its parts, and where a chunk's time and memory go beside its stages."""

from __future__ import annotations

from typing import Any

from smolvla_fast.measure.console import milliseconds

REHEARSAL = (
    "**A rehearsal**: a tiny policy on a CPU, in few rounds. It shows that the report can be made; its times say "
    "nothing about any GPU."
)


def parts(data: dict[str, Any]) -> str:
    from benchmarks.report.markdown import table

    rows = []
    for part in data.get("parts", []):
        said = [part["reason"]] if part["reason"] else []
        said += [f"left out: {'; '.join(part['left_out'])}"] if part["left_out"] else []
        rows.append(
            [part["name"], part["status"], f"{part['seconds']:.0f}", "; ".join(said).replace("|", "/")]
        )
    return table(["part", "", "s", ""], rows) if rows else ""


def device(data: dict[str, Any]) -> str:
    """Wall, device and host time of each tier; its graph and its memory."""
    from benchmarks.report.markdown import groups, suite, table

    def of(figures: dict[str, Any], key: str, unit: float = 1, digits: int = 0) -> str:
        value = figures.get(key)
        return "–" if value is None else f"{value / unit:,.{digits}f}"

    rows = []
    for group, benches in groups([b for b in suite(data, "chunk") if "status" in b]).items():
        for bench in benches:
            times, status = bench.get("device_ms", {}), bench["status"]
            rows.append([
                group.removeprefix("chunk: "), bench["variant"], milliseconds(bench["p50_ms"]),
                *(milliseconds(times[key]) if key in times else "–" for key in ("p50_ms", "p99_ms")),
                of(bench, "host_ms", digits=2), milliseconds(bench["floor_ms"]), of(bench, "first_chunk_ms"),
                of(status, "graph_nodes"), of(status, "step_launches"), of(status, "graph_bytes", 2**20),
                of(bench, "peak_bytes", 2**20),
            ])  # fmt: skip
    if not rows:
        return ""
    text = (
        "wall: `predict_action_chunk` until its chunk can be read; device: what the GPU works on it, by events around "
        "work that was queued before it began; host: the difference of the medians. Shares of the roof above are of device "
        "time where it is measured. First chunk: `patch`, compiling where nothing was cached, capture, and one chunk."
    )
    columns = [
        "", "", "wall p50 ms", "device p50 ms", "device p99 ms", "host ms", "floor ms", "first chunk ms", "graph nodes",
        "launches a step", "graph MiB", "peak MiB",
    ]  # fmt: skip
    return f"{text}\n\n{table(columns, rows)}"


def denoise(data: dict[str, Any]) -> str:
    """What part ``denoise`` measured: one tier's denoise stage by backend, and whether its loop was one launch."""
    from benchmarks.report.markdown import groups, ratio, suite, table

    rows = []
    for group, benches in groups(
        [b for b in suite(data, "stages") if "status" in b and b.get("backend", "auto") != "auto"]
    ).items():
        first = benches[0]["stages"]["denoise"]
        for bench in benches:
            loop, status = bench["stages"]["denoise"], bench["status"]
            launches = status["step_launches"]
            rows.append([
                group.removeprefix("stages: "), bench["variant"], status["stages"]["denoise"],
                "–" if launches is None else "one for all steps" if launches == 0 else f"{launches}",
                milliseconds(loop["p50_ms"]), ratio(first, loop), milliseconds(loop["floor_ms"]),
                f"{loop['share_of_floor']:.0%}", status["passed_over"].get("denoise_persistent", ""),
            ])  # fmt: skip
    columns = [
        "", "", "run by", "launches a step", "p50 ms", "ratio", "floor ms", "of the roof", "not in one launch, for",
    ]  # fmt: skip
    return table(columns, rows) if rows else ""


def draw_stages(data: dict[str, Any], subtitle: str, path: Any) -> bool:
    """Bars by stage against the floor, of the tiers; stock is of another order and stands in the table."""
    from benchmarks.report.markdown import suite
    from smolvla_fast.measure import plot

    bars: dict[str, dict[str, float]] = {}
    floors: dict[str, dict[str, float]] = {}
    for bench in suite(data, "stages"):
        if bench["variant"] != "stock" and bench.get("backend", "auto") == "auto":
            for stage, figures in bench["stages"].items():
                if "floor_ms" in figures:
                    bars.setdefault(stage, {})[bench["variant"]] = figures["p50_ms"]
                    floors.setdefault(stage, {})[bench["variant"]] = figures["floor_ms"]
    if not bars:
        return False
    title = "SmolVLA action chunk by stage, p50 ms; black: floor measured in the same run"
    if data["rehearsal"]:
        title = "REHEARSAL on a CPU, tiny policy: stages, p50 ms; black: floor"
    plot.grouped_bars(bars, title, subtitle, path, floors)
    return True
