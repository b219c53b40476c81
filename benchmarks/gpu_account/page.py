"""docs/gpu-account.md: where the time of a chunk should go on a GPU, now and in the first version of the account."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from benchmarks import ROOT
from benchmarks.gpu_account.price import BESIDE, GPU, H200, Constant, Priced, price, total
from benchmarks.gpu_account.recording import AROUND, Node, Recording
from benchmarks.gpu_account.work import is_small
from benchmarks.report.tables import NONE, suite, table
from smolvla_fast.measure.console import milliseconds

RESULTS = ROOT / "benchmarks" / "results"
BEFORE = Path(__file__).with_name("before.json")
CAMERAS = 2
SIZES = ("rows", "inputs", "outputs", "width", "tokens", "keys")
BY_HAND = {
    "norm_qkv_rope_fwd, self": 3.8, "norm_qkv_rope_fwd, cross": 3.4, "masked_attention_fwd, self": 3.8,
    "masked_attention_fwd, cross": 9.0, "linear_residual_fwd, inputs=960": 4.1, "norm_swiglu_fwd": 4.5,
    "linear_residual_fwd, inputs=2048": 4.5, "suffix_embed_fwd": 8.0, "euler_step_fwd": 4.0,
}  # fmt: skip
"""us of a node of the denoise stage in an estimate that was made by hand before there was this account."""
BY_HAND_MS = {"vision": 1.63, "prefix": 0.52, "denoise": 3.9}

Rows = list[list[Any]]


def is_of(name: str) -> Callable[[Priced], bool]:
    """Whether a node of the denoise stage is what a key of BY_HAND names."""
    kernel, _, which = name.partition(", ")

    def found(p: Priced) -> bool:
        a = p.node.arguments
        fits = not which or which == p.node.layer or which == f"inputs={a.get('inputs')}"
        ours = p.node.name in (kernel, kernel.replace("_fwd", "_cuda"))
        return p.node.stage.startswith("denoise") and ours and fits

    return found


def sizes(node: Node) -> str:
    """Of a node's launch, as far as they tell it from others of the same kernel."""
    if node.by_torch:
        return " ".join("x".join(map(str, x.shape)) for x in node.operands[:3] if len(x.shape) > 1)
    return " ".join(f"{n}={node.arguments[n]}" for n in SIZES if isinstance(node.arguments.get(n), int))


def milli(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


@dataclass(frozen=True)
class Account:
    """A recording, priced."""

    gpu: GPU
    recording: Recording

    @cached_property
    def priced(self) -> list[Priced]:
        return price(self.gpu, [node for node in self.recording.nodes if node.stage != AROUND])

    @cached_property
    def around(self) -> list[Priced]:
        return price(self.gpu, [node for node in self.recording.nodes if node.stage == AROUND])

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        found = Counter[str]()
        for each in self.priced:
            found[each.node.stage] += each.seconds
        return dict(found)

    @cached_property
    def without_pdl(self) -> float:
        """Seconds of the same nodes, each launched when the one before has ended."""
        nodes = [replace(node, pdl=False) for node in self.recording.nodes]
        return Account(self.gpu, replace(self.recording, nodes=nodes)).together

    @property
    def together(self) -> float:
        return total(self.seconds)

    def floor(self, stage: str) -> float:
        """The longer of weights once from HBM (once a step in the denoise stage) and FLOP at the peak of tensor cores."""
        cost = self.recording.costs[stage]
        return max(cost.bytes / self.gpu.hbm.value, cost.flops / self.gpu.peak("bf16"))

    @cached_property
    def counts(self) -> dict[str, int]:
        nodes, steps = [p.node for p in self.priced], self.recording.steps
        launches = Counter(
            (node.stage.partition(BESIDE)[0], node.layer) for node in nodes if not node.by_torch
        )
        layers = self.layers
        return {
            "nodes of a chunk": len(nodes),
            "of these ours": sum(not node.by_torch for node in nodes),
            "of these torch's": sum(node.by_torch for node in nodes),
            "launches of a self-attention layer of the expert": launches["denoise", "self"] // layers["self"],
            "launches of a cross-attention layer of the expert": launches["denoise", "cross"]
            // layers["cross"],
            "launches of a denoise step": sum(n for (stage, _), n in launches.items() if stage == "denoise")
            // steps,
            "nodes outside of layers": sum(not node.layer for node in nodes),
            "nodes of the prelude": sum(map(is_small, nodes)),
        }

    @property
    def layers(self) -> dict[str, int]:
        """How often an expert layer of a kind runs in a chunk."""
        return {kind: n * self.recording.steps for kind, n in self.recording.expert_layers.items()}

    def by_hand(self) -> dict[str, float]:
        """us of a node, by the keys of BY_HAND; of a kernel that is no longer launched nothing."""
        found = {}
        for name in BY_HAND:
            nodes = [p.seconds for p in self.priced if is_of(name)(p)]
            if nodes:
                found[name] = sum(nodes) / len(nodes) * 1e6
        return found

    def summary(self) -> dict[str, Any]:
        """What is kept of a version of the account."""
        stages = {
            stage: {
                "triton": sum(p.node.stage == stage and not p.node.by_torch for p in self.priced),
                "torch": sum(p.node.stage == stage and p.node.by_torch for p in self.priced),
                "ms": round(seconds * 1e3, 3),
            }
            for stage, seconds in self.seconds.items()
        }
        nodes_us = {name: round(us, 2) for name, us in self.by_hand().items()}
        return dict(stages=stages, ms=round(self.together * 1e3, 3), counts=self.counts, nodes_us=nodes_us)


def of_result(data: dict[str, Any]) -> dict[str, float]:
    """ms by stage, and "total" of a chunk of tier bf16 with two cameras, in a result of an H100 or H200; or nothing.

    Of the suite ``stages``, or of a visit whose parts have figures of their own.
    """
    if not re.search("H[12]00", str(data.get("machine_info", {}))) or data.get("rehearsal"):
        return {}
    for bench in suite(data, "stages", "stages") if "benchmarks" in data else ():
        is_this = bench["variant"] in ("bf16", "bf16, triton") and bench["cameras"] == CAMERAS
        if is_this and "full size, cuda" in bench["group"]:
            return {stage: each["p50_ms"] for stage, each in bench["stages"].items()}
    figures = {part["name"]: part.get("figures") or {} for part in data.get("parts", ())}
    stages = figures.get("stages", {})
    found = {stage: stages[f"{stage}_ms"] for stage in BY_HAND_MS if f"{stage}_ms" in stages}
    headline = figures.get("policy", {}).get("headline")
    return {**found, **({"total": headline["ms"]} if headline else {})}


def measured() -> tuple[dict[str, float], str]:
    """As ``of_result`` of the newest committed result that has it, and its file's name."""
    for path in sorted([*RESULTS.glob("*.json"), *RESULTS.glob("contacts/*.json")], reverse=True):
        if found := of_result(json.loads(path.read_text())):
            return found, path.relative_to(RESULTS).as_posix()
    return {}, ""


def by_stage(account: Account) -> str:
    before, (found, source) = json.loads(BEFORE.read_text()), measured()
    now = account.summary()
    rows: Rows = []
    for stage, each in now["stages"].items():
        plain = stage in account.recording.costs
        old = before["stages"].get(stage, {})
        rows.append([
            stage, each["triton"], each["torch"], f"{each['ms']:.2f}",
            milli(account.floor(stage)) if plain else NONE, f"{old['ms']:.2f}" if old else NONE,
            BY_HAND_MS.get(stage, NONE), *([milliseconds(found[stage]) if stage in found else NONE] if found else []),
        ])  # fmt: skip
    floor = milli(sum(map(account.floor, account.recording.costs)))
    sums = [sum(each[kind] for each in now["stages"].values()) for kind in ("triton", "torch")]
    rows.append([
        "**sum**", *sums, f"**{now['ms']:.2f}**", floor, f"{before['ms']:.2f}", "6.0",
        *([milliseconds(found["total"]) if "total" in found else NONE] if found else []),
    ])  # fmt: skip
    columns = ["stage", "our nodes", "torch nodes", "predicted ms", "floor ms", "before ms", "by hand ms"]
    text = table([*columns, *(["measured ms, older kernels"] if found else [])], rows, left=1)
    if not found:
        return f"{text}\n\nMeasured: not measured; no result of an H100 or H200 is committed."
    return (
        f"{text}\n\nMeasured: benchmarks/results/{source}, with the kernels of its commit. The formula has no term for the "
        "instructions that a warp executes one behind the other, which is what small kernels took their time for there "
        "([contact](gpu.md#measured)): for these a prediction is what memory and tensor cores allow, and no more."
    )


def beside(account: Account) -> str:
    """What the sum takes for granted of the first denoise step, which runs beside the prefix."""
    programs = [p.work.programs for p in account.priced if p.node.stage == "prefix" and p.node.layer]
    ahead = sum(seconds for stage, seconds in account.seconds.items() if BESIDE not in stage)
    return (
        "The first denoise step, but for its last layer, and the expert's cross keys and values are a branch of the graph "
        "beside the prefix. The sum adds only the time by which this branch outlasts the prefix, here "
        f"{milli(account.together - ahead)} ms: the overlap is priced at its best. The two share multiprocessors, L2 and "
        f"HBM. A launch of a text layer has {min(programs)} to {max(programs)} programs; those of the branch find places "
        "beside them or wait, and each slows the other. Not priced are this contention, an event between two branches, and "
        "the layer of the expert that is still under way when the last text layer's keys and values are there. One behind "
        f"the other the same nodes are {milli(sum(account.seconds.values()))} ms."
    )


def kind(p: Priced) -> tuple[str, str, str]:
    """Nodes of one kind are a row: name, sizes, layer. torch's small calls are one kind."""
    if p.node.by_torch and is_small(p.node):
        return "torch's calls", "", ""
    return p.node.name.removesuffix("_fwd"), sizes(p.node), p.node.layer


def by_node(account: Account, stage: str) -> str:
    groups: dict[tuple[str, str, str], list[Priced]] = {}
    for each in account.priced:
        if each.node.stage == stage:
            groups.setdefault(kind(each), []).append(each)
    rows: Rows = []
    for (name, size, layer), found in groups.items():
        one, number = found[0], len(found)
        us = sum(each.seconds for each in found) * 1e6
        most = max(found, key=lambda each: each.work.programs).work.programs
        rows.append([
            name, size, layer, number, most, max(each.waves for each in found),
            f"{sum(each.hbm for each in found) / number / 1e6:.2f}",
            f"{sum(each.l2 for each in found) / number / 1e6:.1f}",
            f"{sum(each.flops for each in found) / number / 1e9:.2f}", one.work.unit if one.flops and size else NONE,
            sum(each.node.pdl for each in found) or "", f"{us / number:.1f}", f"{us:.0f}",
        ])  # fmt: skip
    columns = [
        "node",
        "sizes",
        "layer",
        "count",
        "programs",
        "waves",
        "HBM, MB",
        "L2, MB",
        "GFLOP",
        "unit",
        "PDL",
    ]
    return table([*columns, "us each", "us"], rows, left=3)


def by_hand(account: Account) -> str:
    before, now = json.loads(BEFORE.read_text())["nodes_us"], account.by_hand()
    rows = [
        [name, BY_HAND[name], *(f"{x[name]:.1f}" if name in x else NONE for x in (before, now))]
        for name in BY_HAND
    ]
    return table(["node of a denoise step", "by hand us", "before us", "now us"], rows, left=1)


def constants(account: Account) -> str:
    """With what the sum would be where an assumed one is a quarter smaller or larger: what a measurement of it is worth."""

    def with_(name: str, factor: float) -> str:
        constant: Constant = account.gpu.constants[name]
        other = replace(account.gpu, **{name: constant._replace(value=constant.value * factor)})
        return milli(replace(account, gpu=other).together)

    rows: Rows = []
    for name, (value, unit, source) in account.gpu.constants.items():
        ends = [with_(name, factor) if "assumed" in source else NONE for factor in (0.75, 1.25)]
        rows.append([name, f"{value:.6g}", unit, source, *ends])
    return table(["constant", "value", "unit", "source", "sum ms with 0.75 of it", "with 1.25"], rows)


def counts(account: Account) -> str:
    before = json.loads(BEFORE.read_text())["counts"]
    return table(
        ["", "before", "now"], [[n, before.get(n, NONE), now] for n, now in account.counts.items()], left=1
    )


def markdown(account: Account) -> str:
    around = account.around
    calls = ", ".join(f"{name} {n}" for name, n in Counter(p.node.name for p in around).items())
    around_us = sum(each.seconds for each in around) * 1e6
    small = sorted({p.node.name for p in account.priced if is_small(p.node) and not p.node.by_torch})
    parts = [
        "# Where the time of a chunk should go on an H100",
        f"Made by `make gpu-account` with torch {torch.__version__.partition('+')[0]}, without a GPU: **predictions**; "
        "what was measured stands beside the stages. One chunk of SmolVLA at full size: tier `bf16` by Triton's table, "
        "two cameras, ten steps, batch "
        "1, weights in the dtypes of smolvla_base. The engine runs on tensors without memory; every launch and every ATen "
        "call is noted. What a node should take follows from its sizes by one formula, in "
        "`benchmarks/gpu_account/price.py`, and the constants below. \"Before\" is the first version of this page, \"by "
        "hand\" an estimate that is older.",
        by_stage(account),
        "Floor: all weights once from HBM (of the denoise stage once a step) or the FLOP of a chunk at the peak of the "
        "tensor cores, whichever is longer. Without programmatic dependent launch (PDL) the same nodes are "
        f"{milli(account.without_pdl)} ms. On an H200, whose HBM is faster and all else equal: "
        f"{milli(replace(account, gpu=H200).together)} ms.",
        *([beside(account)] if any(BESIDE in stage for stage in account.seconds) else []),
        counts(account),
        "A launch is a kernel of ours; those of CUDA C++ have cuda behind their name, others are Triton's. The prelude is "
        "what is in no layer and no large product: torch's small calls, and "
        f"kernels of ours in their place ({', '.join(small) or 'none'}), priced as if each number were read and written "
        f"once. Around its graph a replay queues {len(around)} more ({calls}), {around_us:.0f} us, not in the sum.",
        *(f"## {stage}\n\n{by_node(account, stage)}" for stage in account.seconds),
        "HBM: what is not in L2, which holds what was touched last. L2: what all programs together move, what several read "
        "counted as often, but what a cluster shares once. FLOP with padding. fma: fp32 outside the "
        "tensor cores; tf32x3: three products of tf32 for one of fp32. PDL: launches with programmatic dependent launch.",
        f"## Beside the estimate by hand\n\n{by_hand(account)}",
        NOTES,
        f"## Constants\n\n{constants(account)}",
    ]  # fmt: skip
    paragraphs = "\n\n".join(parts).split("\n\n")
    return "\n\n".join(each if each[0] in "|#" else fill(each, 118) for each in paragraphs) + "\n"


NOTES = (
    "cuBLAS: of blocks of 128 x 128, 128 x 256, 256 x 128 and 64 x 256 whichever the formula finds cheapest, in clusters of "
    "two that bring one operand from L2 once. Both are assumed from its kernels' names on Hopper (NVIDIA/Fuser issue 3279); "
    "that its heuristic chooses so well is assumed too. A bias of its products is counted as if it were as large as the "
    "result. Where the fp32 stream is C and D, the stream is read and written in place and the next norm adds the bias. "
    "cuDNN's attention: products and exponents at once, as in "
    "FlashAttention-3; in FlashAttention-2 they are one behind the other (arXiv 2407.08608). That cuDNN's is like "
    'FlashAttention-3 is assumed. Neither is in "before" or in the estimate.\n\n'
    "No node has a factor of its own. The constants that are called assumed were set with the estimate in sight, so "
    "that the sums agree shows nothing. Single nodes were left where the formula puts them. The estimate does not say how "
    "it came to its figures. In the first version attention waited for memory once a block of keys and for little else, "
    "the last program of a split product for L2 three times, and `norm_swiglu`, whose 128 programs each read the whole "
    "fp32 stream, was bound by L2. Dependent launch is priced without what it costs: places and HBM that the node ahead "
    "could have used, lines that are gone again when they are read. Clusters of eight blocks are taken to find a place on "
    "any multiprocessors, 16 at once where a block takes one alone, and a bulk copy to begin as fast as a plain load."
)
