"""The sections of a report, by title: each makes its text of a result's data, "" where its suite did not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report import tables
from benchmarks.report.tables import Bench, figures, groups, of_variants, suite, table

Data = dict[str, Any]

DEVICE = (
    "wall: `predict_action_chunk` until its chunk can be read; device: what the GPU works on it, by events around "
    "work that was queued before it began; host: the difference of the medians. Shares of the roof above are of device "
    "time where it is measured. First chunk: compiling where nothing was cached, capture, and one chunk."
)
TRAINING = (
    "Ratios are to stock, for what runs in bf16 to stock in bf16; the ratio is the median over rounds of stock's "
    "time by the one beside it. The floor is the least time of a step's parts (vision, prefix, expert with "
    "its update) under this machine's roof, for whichever of arithmetic and memory takes longer."
)
TIERS = (
    "Rounds are taken in turn; the ratio is the median over rounds of stock's time by the time beside it. Of the roof: "
    "the least time for the matrix products at the fastest measured product that is no narrower than the tier, by p50. "
    "Peak memory is the process's during the first chunk, in the order of the rows; of it new is what was not resident "
    "before that chunk."
)
OUTSIDE = (
    "Outside ops: the engine's Python and the small torch calls between ops. Narrow policy: the same sequence of calls "
    "at widths that hardly cost arithmetic, so all Python, dispatch and starts of parallel work, the ops' own too: an "
    "upper bound. Allocations: what a denoise step more asks of torch's allocator."
)


def joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def by_group(
    data: Data, name: str, columns: str, note: Callable[[list[Bench]], str] = lambda benches: ""
) -> str:
    """A table of variants for each group of a suite, with a note below each."""
    found = groups(suite(data, name)).items()
    return joined(*(joined(group, of_variants(columns, each), note(each)) for group, each in found))


def parts(data: Data) -> str:
    """How each part went, and what has no number, with the reason."""
    found, lines = data.get("parts", []), []
    for part in found:
        lines += [f"**{each['name']} is red, so it has no number**: {each['reason']}" for each in part["red"]]
        lines += [f"{each['name']} did not run: {each['reason']}" for each in part["skipped"]]
        lines += [f"Left out: {'; '.join(part['left_out'])}."] if part["left_out"] else []
    rows = [[p["name"], p["status"], tables.of(p, "seconds"), p["reason"].replace("|", "/")] for p in found]
    return joined(table(["part", "", "s", ""], rows), *lines) if rows else ""


def chunk(data: Data) -> str:
    def note(benches: list[Bench]) -> str:
        against = next((each["against"] for each in benches if "against" in each), None)
        said = f"Errors are against stock, stock's against {against}; ratios are of rounds in turn."
        return said if against else ""

    columns = (
        "p50 ms | best ms | p95 ms | p99 ms | chunks/s | ratio | of the roof | rel L2 | max abs | rounds"
    )
    return by_group(data, "chunk", columns, note)


def device(data: Data) -> str:
    """Wall, device and host time of each tier on a GPU; its graph and its memory."""
    found = groups(suite(data, "chunk", having="device_ms"))
    rows = [((group, bench["variant"]), bench) for group, benches in found.items() for bench in benches]
    columns = (
        "wall p50 ms | device p50 ms | device p99 ms | host ms | floor ms | first chunk ms | graph nodes"
    )
    columns += " | launches a step | graph MiB | peak MiB"
    return joined(DEVICE, figures(columns, rows)) if rows else ""


def stages(data: Data) -> str:
    text = []
    for group, benches in groups(suite(data, "stages")).items():
        base: dict[str, Any] = {}
        base.update(*(each["stages"] for each in benches if each["variant"] == "stock"))
        rows = [
            ([bench["variant"]], {"stage": stage, "base": base.get(stage), "of": bench["stages"], **found})
            for bench in benches
            for stage, found in bench["stages"].items()
        ]
        text += [group, figures("stage | p50 ms | share | ratio | GFLOP | floor ms | of the roof", rows)]
    return joined(*text)


def denoise(data: Data) -> str:
    """One tier's denoise stage by backend, and whether its loop was one launch."""
    columns = "run by | launches | p50 ms | ratio | floor ms | of the roof | not in one launch, for"
    rows = [
        ((group, b["variant"]), {"base": benches[0]["stages"]["denoise"], **b, **b["stages"]["denoise"]})
        for group, benches in groups(suite(data, "stages", having="loop_backend")).items()
        for b in benches
    ]
    return figures(columns, rows)


def training(data: Data) -> str:
    columns = "p50 ms | best ms | samples/s | ratio | floor ms | of the roof | gradients, rel L2 | allowed"
    text = by_group(data, "train", f"{columns} | loss | peak GiB | rounds")
    return text and joined(text, TRAINING)


def ops(data: Data) -> str:
    columns = "op | case | dtype | backend | p50 µs | best µs | ratio | GFLOP/s | GB/s | of the roof"
    benches = suite(data, "ops")
    eager = {bench["group"]: bench for bench in benches if bench["backend"] == "reference"}
    return figures(columns, [((), {"base": eager.get(bench["group"]), **bench}) for bench in benches])


def cpu(data: Data) -> str:
    benches, facts = suite(data, "cpu"), data["machine_info"]["smolvla_fast"]
    if not benches:
        return ""
    level, torchs = facts.get("instruction_level") or "no compiled kernels", facts.get("torch_capability")
    columns = "ratio to stock | target | accuracy against stock in fp32 | p50 ms | p95 ms | p99 ms | best ms | rounds"
    columns += " | of the roof | extra bytes | peak memory | of it new"
    reasons = [
        f"{bench['variant']}, {name}: {reason}"
        for bench in benches
        for name, reason in bench.get("fallback_reasons", {}).items()
    ]
    ours = {each["precision"]: each["p50_ms"] for each in benches if each["kind"] == "tier"}
    peers = (each for each in benches if each["kind"] == "peer" and each["precision"] in ours)
    beside = (
        f"Against {each['variant']}: {each['p50_ms'] / ours[each['precision']]:.2f}x at {each['precision']}, medians of the "
        "same rounds."
        for each in peers
    )
    kernels = (
        f"{benches[0]['group'].removeprefix('cpu: ')}; our kernels at level {level}, torch's at {torchs}"
    )
    return joined(kernels, of_variants(columns, benches), TIERS, *reasons, *beside)


def cpu_stages(data: Data) -> str:
    """Of the CPU suite; the stages suite has a section of its own."""
    benches, names, rows = suite(data, "cpu", having="stages"), ("vision", "prefix", "denoise"), []
    for bench in benches:
        found = ((bench["stages"][name]["p50_ms"], benches[0]["stages"][name]["p50_ms"]) for name in names)
        rows.append(
            [bench["variant"], *(f"{tables.milliseconds(ms)} ({base / ms:.2f}x)" for ms, base in found)]
        )
    return table(["", *(f"{name} ms" for name in names)], rows) if rows else ""


def cpu_overhead(data: Data) -> str:
    columns = (
        "sample_actions ms | outside ops ms | narrow policy ms | op calls | allocations a step | bytes a step"
    )
    rows = [([b["variant"]], b["overhead"]) for b in suite(data, "cpu", having="overhead")]
    lines = []
    for [name], each in rows:
        low, high = each["outside_share"] < tables.OVERHEAD, each["narrow_share"] < tables.OVERHEAD
        python = "met by both" if high else "met by the first, missed by the upper bound" if low else "missed"
        loop = "met" if each["step_allocations"] == 0 else f"missed: {each['step_allocations']:,.0f} a step"
        python = f"Python under {tables.OVERHEAD:.0%} of a chunk: {python}"
        lines.append(f"{name}: {python}. Nothing allocated in the loop: {loop}.")
    return joined(figures(columns, rows), OUTSIDE, *lines) if rows else ""


def curves(data: Data) -> dict[str, dict[str, dict[int, float]]]:
    """axis -> variant -> value -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in suite(data, "scaling"):
        found.setdefault(row["axis"], {}).setdefault(row["variant"], {})[row["value"]] = row["p50_ms"]
    return found


def cpu_scaling(data: Data) -> str:
    chart = data.get("curves")
    text = [f"![time against cameras, steps, threads and batch]({chart})"] if chart else []
    for axis, variants in curves(data).items():
        values = sorted(set().union(*variants.values()))
        rows = [
            [name, *(tables.milliseconds(each[v]) if v in each else tables.NONE for v in values)]
            for name, each in variants.items()
        ]
        text.append(table([f"ms by {axis}", *map(str, values)], rows))
    return joined(*text)


SECTIONS = {
    "Parts": parts, "Chunk": chunk, "Device and host": device, "Stages": stages, "Denoise loop": denoise,
    "Training step": training, "Ops": ops, "CPU": cpu, "CPU, by stage": cpu_stages, "CPU, overhead": cpu_overhead,
    "CPU, scaling": cpu_scaling,
}  # fmt: skip
