"""The sections of a report, by title: each makes its text of a result's data, "" where its suite did not run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import tables
from benchmarks.report.tables import Bench, figures, suite, table
from smolvla_fast.measure.page import picture

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
TRAINER = (
    "A step as `smolvla-fast train` takes it, on LeRobot's class of the policy; behind each time how many times faster than "
    "LeRobot's it is. LeRobot's: its policy, optimizer and reader of datasets. Data: reading a batch, in the process that "
    "trains, and preparing it. Update: forward, backward, clipping, AdamW. Peak memory is the process's in a step, with "
    "the runs before it; of it new is what that step added."
)
TIERS = (
    "Rounds are taken in turn; the ratio is the median over rounds of stock's time by the time beside it. Of the roof: "
    "the least time for the matrix products at the fastest measured product that is no narrower than the tier, by p50. "
    "In turn: the same share, where each round counts by how fast an fp32 product was in it, the median over rounds; a "
    "shared machine is slower for minutes than in the second whose best is the roof. Peak memory is the process's during "
    "the first chunk, in the order of the rows; of it new is what was not resident before that chunk."
)
OUTSIDE = (
    "Outside ops: the engine's Python and the small torch calls between ops. Narrow policy: the same sequence of calls "
    "at widths that hardly cost arithmetic, so all Python, dispatch and starts of parallel work, the ops' own too: an "
    "upper bound. Allocations: what a denoise step more asks of torch's allocator."
)
LATENCY = (
    "Each round is one chunk, begun when the one before has ended; both loads take their rounds in turn. Beside cameras: "
    "a thread a camera decodes 30 JPEG frames of 640 x 480 a second and turns them to RGB. The ratio is to the tier alone: "
    "the median over rounds of its time by the time beside it."
)


def joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


@dataclass(frozen=True)
class Section:
    """A suite's tables, one for each group or, where a label is "group", one of all.

    columns  of ``tables.COLUMNS``, with " | " between them      rows  of a benchmark      labels  columns without a name
    having   what a benchmark must have      note  below the tables
    """

    suite: str
    columns: str
    rows: Callable[[Bench], list[Bench]] = lambda bench: [bench]
    labels: Sequence[str] = ("variant",)
    having: str = "group"
    note: Callable[[list[Bench]], str] = lambda benches: ""

    def __call__(self, data: Data) -> str:
        benches, text = suite(data, self.suite, self.having), []
        apart = self.labels == ("variant",)
        for group in dict.fromkeys(bench["group"] for bench in benches) if apart else [""]:
            rows = [row for bench in benches if group in ("", bench["group"]) for row in self.rows(bench)]
            text += [group, figures(self.columns, rows, *self.labels)]
        return joined(*text, self.note(benches)) if benches else ""


def parts(data: Data) -> str:
    """How each part went, and what has no number, with the reason."""
    found, lines = data.get("parts", []), []
    for part in found:
        lines += [f"**{each['name']} is red, so it has no number**: {each['reason']}" for each in part["red"]]
        lines += [f"{each['name']} did not run: {each['reason']}" for each in part["skipped"]]
        lines += [f"Left out: {'; '.join(part['left_out'])}."] if part["left_out"] else []
    rows = [[p["name"], p["status"], tables.of(p, "seconds"), p["reason"].replace("|", "/")] for p in found]
    return joined(table(["part", "", "s", ""], rows), *lines) if rows else ""


def by_stage(bench: Bench) -> list[Bench]:
    kept = {key: bench.get(key) for key in ("group", "variant", "status")}
    base, of = (bench["base"] or {}).get("stages", {}), bench["stages"]
    return [{**kept, "stage": name, "base": base.get(name), "of": of, **each} for name, each in of.items()]


def against(benches: list[Bench]) -> str:
    found = [each["against"] for each in benches if "against" in each]
    said = "Errors are against stock, stock's against {}; ratios are of rounds in turn."
    return said.format(found[0]) if found else ""


def beside(benches: list[Bench]) -> str:
    """What the tiers fell back from, and each peer beside the tier of its precision."""
    text = [TIERS]
    for each in benches:
        reasons = each.get("fallback_reasons", {}).items() if "beside" not in each else ()
        text += [f"{each['variant']}, {name}: {reason}" for name, reason in reasons]
    ours = {(each["group"], each["precision"]): each["p50_ms"] for each in benches if each["kind"] == "tier"}
    for each in benches:
        if each["kind"] == "peer" and (own := ours.get((each["group"], each["precision"]))):
            ratio = f"{each['p50_ms'] / own:.2f}x at {each['precision']}"
            text.append(f"Against {each['variant']}: {ratio}, medians of the same rounds.")
    return joined(*text)


def overhead(benches: list[Bench]) -> str:
    text = [OUTSIDE]
    for each in benches:
        low, high = (each["overhead"][key] < tables.OVERHEAD for key in ("outside_share", "narrow_share"))
        python = "met by both" if high else "met by the first, missed by the upper bound" if low else "missed"
        calls = each["overhead"]["step_allocations"]
        loop = f"missed: {calls:,.0f} a step" if calls else "met"
        python = f"Python under {tables.OVERHEAD:.0%} of a chunk: {python}"
        text.append(f"{each['variant']}: {python}. Nothing allocated in the loop: {loop}.")
    return joined(*text)


def curves(data: Data) -> dict[str, dict[str, dict[int, float]]]:
    """axis -> variant -> value -> ms."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in suite(data, "scaling"):
        found.setdefault(row["axis"], {}).setdefault(row["variant"], {})[row["value"]] = row["p50_ms"]
    return found


def cpu_scaling(data: Data) -> str:
    chart = data.get("curves")
    text = [picture("time against cameras, steps, threads and batch", chart)] if chart else []
    for axis, variants in curves(data).items():
        values = sorted(set().union(*variants.values()))
        rows = [[name, *(tables.ms(each, value) for value in values)] for name, each in variants.items()]
        text.append(table([f"ms by {axis}", *map(str, values)], rows))
    return joined(*text)


ROOF = "floor ms | of the roof"
SECTIONS: dict[str, Callable[[Data], str]] = {
    "Parts": parts,
    "Chunk": Section(
        "chunk", "p50 ms | best ms | p95 ms | p99 ms | chunks/s | ratio | of the roof | rel L2 | max abs | rounds",
        note=against,
    ),
    # Wall, device and host time of each tier on a GPU; its graph and its memory.
    "Device and host": Section(
        "chunk", "wall p50 ms | device p50 ms | device p99 ms | host ms | floor ms | first chunk ms | graph nodes"
        " | launches a step | graph MiB | peak MiB",
        labels=("group", "variant"), having="device_ms", note=lambda benches: DEVICE,
    ),
    "Stages": Section("stages", f"stage | p50 ms | share | ratio | GFLOP | {ROOF}", by_stage),
    # One tier's denoise stage by backend, and whether its loop was one launch.
    "Denoise loop": Section(
        "stages", f"run by | launches | p50 ms | ratio | {ROOF} | not in one launch, for",
        lambda bench: [row for row in by_stage(bench) if row["stage"] == "denoise"],
        labels=("group", "variant"), having="loop_backend",
    ),
    "Training step": Section(
        "train", f"p50 ms | best ms | samples/s | ratio | {ROOF} | gradients, rel L2 | allowed | loss | peak GiB | rounds",
        note=lambda benches: TRAINING,
    ),
    "Training run": Section(
        "trainer", "data ms | update ms | p50 ms | ratio | gradients, rel L2 | allowed | peak GiB | of it new GiB | rounds",
        note=lambda benches: TRAINER,
    ),
    "Ops": Section(
        "ops", "op | case | dtype | backend | p50 µs | best µs | ratio | GFLOP/s | GB/s | of the roof", labels=(),
    ),
    "CPU": Section(
        "cpu", "ratio to stock | accuracy against stock in fp32 | p50 ms | p95 ms | p99 ms | best ms | rounds"
        " | of the roof | in turn | extra bytes | peak memory | of it new", note=beside,
    ),
    "CPU, by stage": Section("cpu", "vision ms | prefix ms | denoise ms", having="stages"),
    "CPU, overhead": Section(
        "cpu", "sample_actions ms | outside ops ms | narrow policy ms | op calls | allocations a step | bytes a step",
        lambda bench: [{**bench["overhead"], "variant": bench["variant"]}], having="overhead", note=overhead,
    ),
    "CPU, scaling": cpu_scaling,
    "Latency": Section("latency", "p50 ms | p95 ms | p99 ms | longest ms | ratio | rounds", note=lambda benches: LATENCY),
}  # fmt: skip
