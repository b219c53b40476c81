"""What a node should take on a GPU. One formula for all nodes, and one table of constants; nothing here is measured.

    gap + max(waves · chain, start + latency + max(HBM, L2, busiest)) + end

- chain: what a program waits for, one behind the other, however fast the machine: trips · latency + tails · L2's latency +
  operations · their clocks + what a cluster exchanges. waves: how often the multiprocessors are filled, with whole clusters,
  as if any of them made one. start, end: of a program; its cluster meets in the start.
- HBM: bytes that are not in L2, which holds what was touched last. L2: what all programs move, what a cluster shares once.
  busiest: the multiprocessor with the most programs, by its port to L2 or by its units (products, and exponents behind
  them, or beside them where the kernel overlaps them).
- With programmatic launch behind a programmatic launch the gap is smaller. Programs that find a place beside the node before
  have started before it ends, and of their weights so much is in L2 as HBM could bring while that node did not use it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, NamedTuple

from benchmarks.gpu_account.recording import Node, Operand
from benchmarks.gpu_account.work import Work, works_of


class Constant(NamedTuple):
    value: float
    unit: str
    source: str


DATA_SHEET = "NVIDIA's data sheet, H100 SXM"
GUIDE = "CUDA C++ Programming Guide, 9.0"


@dataclass(frozen=True)
class GPU:
    """What the formula knows of a GPU."""

    multiprocessors: Constant
    clock: Constant
    hbm: Constant
    l2: Constant
    l2_bytes: Constant
    port: Constant
    bf16: Constant
    tf32: Constant
    fma: Constant
    tensor_share: Constant
    library_share: Constant
    library_cluster: Constant
    fma_share: Constant
    exponents: Constant
    warps: Constant
    registers: Constant
    shared: Constant
    latency_hbm: Constant
    latency_l2: Constant
    operation: Constant
    exchange: Constant
    cluster_port: Constant
    start: Constant
    end: Constant
    gap: Constant
    gap_pdl: Constant

    def rate(self, work: Work) -> float:
        """FLOP a second that all multiprocessors reach."""
        if work.unit == "fma":
            return self.fma.value * self.fma_share.value
        share = (self.library_share if work.library else self.tensor_share).value
        return self.peak(work.unit) * share

    def peak(self, unit: str) -> float:
        """tf32x3: three products of tf32 make one."""
        if unit == "tf32x3":
            return self.tf32.value / 3
        return {"bf16": self.bf16, "tf32": self.tf32, "fma": self.fma}[unit].value

    def seconds(self, clocks: float) -> float:
        return clocks / self.clock.value

    @property
    def constants(self) -> dict[str, Constant]:
        return {each.name: getattr(self, each.name) for each in fields(self)}


H100 = GPU(
    multiprocessors=Constant(132, "", DATA_SHEET),
    clock=Constant(1.755e9, "1/s", "boost clock; assumed to hold"),
    hbm=Constant(0.9 * 3.35e12, "B/s", DATA_SHEET + ": 3.35 TB/s; 0.9 of it assumed reachable"),
    l2=Constant(5.5e12, "B/s", "assumed, as in docs/denoise-persistent.md"),
    l2_bytes=Constant(50e6, "B", DATA_SHEET),
    port=Constant(64, "B/clock", "of one multiprocessor to L2; assumed"),
    bf16=Constant(989e12, "FLOP/s", DATA_SHEET + ", dense"),
    tf32=Constant(494e12, "FLOP/s", DATA_SHEET + ", dense"),
    fma=Constant(67e12, "FLOP/s", DATA_SHEET + ", fp32"),
    tensor_share=Constant(0.6, "", "of the peak of tensor cores; assumed of Triton's products"),
    library_share=Constant(0.7, "", "of the peak of tensor cores; assumed of the vendor's libraries"),
    library_cluster=Constant(2, "", "blocks that share an operand; assumed of cuBLAS: names as in NVIDIA/Fuser issue 3279"),
    fma_share=Constant(0.35, "", "of the peak of FMA units, operands out of shared memory; assumed" ),
    exponents=Constant(16, "1/clock", GUIDE + ": of one multiprocessor"),
    warps=Constant(64, "", GUIDE + ": of one multiprocessor"),
    registers=Constant(65536, "", GUIDE + ": of one multiprocessor"),
    shared=Constant(228 * 1024, "B", GUIDE + ": of one multiprocessor"),
    latency_hbm=Constant(800, "clocks", "assumed, under load; idle ones: arXiv 2402.13499"),
    latency_l2=Constant(400, "clocks", "assumed, under load; idle ones: arXiv 2402.13499"),
    operation=Constant(120, "clocks", "a product, reduction or barrier on whose result the next waits; assumed" ),
    exchange=Constant(380, "clocks", "a cluster's barrier, or a store to a neighbour and its barrier; assumed"),
    cluster_port=Constant(14, "B/clock", "from neighbours' shared memory; assumed, about as in arXiv 2402.13499"),
    start=Constant(400, "clocks", "of a program, before its first load; assumed"),
    end=Constant(300, "clocks", "from its last store to the next node; assumed"),
    gap=Constant(1.0e-6, "s", "between two nodes of a graph; assumed"),
    gap_pdl=Constant(0.3e-6, "s", "with programmatic dependent launch; assumed"),
)  # fmt: skip

HBM3E = "NVIDIA's data sheet, H200 SXM: 4.8 TB/s; 0.9 of it assumed reachable"
H200 = replace(H100, hbm=Constant(0.9 * 4.8e12, "B/s", HBM3E))


class L2:
    """Which memory is in L2: what was touched last. What a node writes is there at once."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.bytes = capacity, 0.0
        self._held: OrderedDict[tuple[Any, int], None] = OrderedDict()
        self._known: set[tuple[Any, int]] = set()

    def forget_activations(self) -> None:
        """What another chunk has written is written anew by the next."""
        self._known.clear()

    def missing(self, operands: Iterable[Operand]) -> tuple[float, float]:
        """(bytes of weights, bytes of all) that a node with these operands brings from HBM; L2 has them afterwards."""
        weights = together = 0.0
        for each in operands:
            key = (each.place, each.bytes)
            if key in self._held:
                self._held.move_to_end(key)
                continue
            if each.weight or key in self._known:
                together += each.bytes
                weights += each.bytes * each.weight
            self._known.add(key)
            self._held[key] = None
            self.bytes += each.bytes
            while self.bytes > self.capacity:
                (_, gone), _ = self._held.popitem(last=False)
                self.bytes -= gone
        return weights, together


@dataclass(frozen=True)
class Priced:
    """A node and its seconds, the gap before it included.

    hbm      bytes from there, prefetched ones as well      waves  how often its programs fill the multiprocessors
    l2       bytes that it moves      idle  seconds in which it leaves HBM to the node behind it
    """

    node: Node
    work: Work
    seconds: float
    hbm: float
    l2: float
    waves: int
    idle: float

    @property
    def flops(self) -> float:
        return self.work.programs * self.work.flops


def resident(gpu: GPU, work: Work, beside: Work | None = None, programs: int = 0) -> int:
    """Programs that a multiprocessor holds at once beside so many of another node."""
    found = []
    for name, most in (("warps", gpu.warps), ("registers", gpu.registers), ("shared", gpu.shared)):
        taken = programs * _takes(beside, name) if beside is not None else 0.0
        if each := _takes(work, name):
            found.append(int((most.value - taken) / each))
    return max(0 if programs else 1, min(found))


def _takes(work: Work, name: str) -> float:
    return 32 * work.warps * work.registers if name == "registers" else getattr(work, name)


def early(gpu: GPU, work: Work, before: Work) -> float:
    """The share of a node's programs that find a place while the node before it runs."""
    places, busy = gpu.multiprocessors.value, min(gpu.multiprocessors.value, before.programs)
    held = min(resident(gpu, before), ceil(before.programs / places))
    free = busy * resident(gpu, work, before, held) + (places - busy) * resident(gpu, work)
    return min(1.0, free / work.programs)


def price_node(gpu: GPU, node: Node, work: Work, weights: float, hbm: float, before: Priced | None) -> Priced:
    """weights, hbm  bytes that are not in L2      before  the node before it, or None"""
    overlaps, share, prefetched = False, 0.0, 0.0
    if node.pdl and before is not None and before.node.pdl:
        overlaps, share = True, early(gpu, work, before.work)
        prefetched = min(share * weights, before.idle * gpu.hbm.value)
    left = (hbm - prefetched) / hbm if hbm else 0.0
    latency = gpu.latency_l2.value + left * (gpu.latency_hbm.value - gpu.latency_l2.value)
    first = gpu.start.value + work.meets * gpu.exchange.value
    start = (1.0 - share) * first
    waits = work.trips * latency + work.tails * gpu.latency_l2.value + work.operations * gpu.operation.value
    waits += work.exchanges * gpu.exchange.value + work.exchanged / gpu.cluster_port.value
    at_once = gpu.multiprocessors.value * resident(gpu, work)
    waves = ceil(work.programs / (at_once - at_once % work.cluster))
    chain = gpu.seconds(start + waits + (waves - 1) * (first + waits))

    of_one = work.flops * gpu.multiprocessors.value / gpu.rate(work)
    exponents = gpu.seconds(work.exponents / gpu.exponents.value)
    of_one = max(of_one, exponents) if work.overlapped else of_one + exponents
    most = ceil(work.programs / gpu.multiprocessors.value)
    busiest = most * max(of_one, gpu.seconds(work.moved / gpu.port.value))
    from_hbm = (hbm - prefetched) / gpu.hbm.value
    cluster = gpu.library_cluster.value if work.library else work.cluster
    through_l2 = work.programs * (work.moved - work.multicast * (1.0 - 1.0 / cluster))
    rates = max(from_hbm, through_l2 / gpu.l2.value, busiest)

    body = max(chain, gpu.seconds(start + latency) + rates) + gpu.seconds(gpu.end.value)
    gap = gpu.gap_pdl.value if overlaps else gpu.gap.value
    return Priced(node, work, gap + body, hbm, through_l2, waves, max(0.0, body - from_hbm))


def price(gpu: GPU, nodes: Iterable[Node]) -> list[Priced]:
    """Nodes in the order in which they run, of one chunk after another: L2 begins with what the last one left."""
    nodes, l2 = list(nodes), L2(gpu.l2_bytes.value)
    for node in nodes:
        l2.missing(node.operands)
    l2.forget_activations()
    found: list[Priced] = []
    ahead: dict[bool, Priced] = {}  # on the main stream, on the side
    for node in nodes:
        weights, hbm = l2.missing(node.operands)
        on_side = BESIDE in node.stage
        before = ahead.get(on_side)
        priced = [price_node(gpu, node, work, weights, hbm, before) for work in works_of(node)]
        ahead[on_side] = min(priced, key=lambda each: each.seconds)
        found.append(ahead[on_side])
    return found


BESIDE = " beside "


def total(seconds: dict[str, float]) -> float:
    """Of stages: one named "a beside b" runs while b does, and counts as far as it takes longer."""
    found = 0.0
    for stage, own in seconds.items():
        other = stage.partition(BESIDE)[2]
        found += max(0.0, own - seconds.get(other, 0.0)) if other else own
    return found
