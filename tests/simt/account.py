"""What one launch of denoise_persistent moves, waits for and holds, and what that should take: docs/denoise-persistent.md.

Counted from the sizes alone, as csrc/cuda/denoise_plan.cuh deals them out; nothing here is measured. The plan of shared
memory is asked of the launcher itself, compiled for the emulator that stands here. ``make loop-account`` prints it.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.report.tables import table

# SmolVLA with two cameras: suffix, prefix, expert width, feed-forward width, heads, KV heads, head size, actions.
S, P, E, F, H, K, D, A = 50, 177, 720, 2048, 15, 5, 64, 32
LAYERS, STEPS = 16, 10
BLOCKS = 132  # multiprocessors of an H100

# Assumptions, none measured here: a copy kernel's HBM rate; what microbenchmarks of others give for reads from L2, by
# all multiprocessors and by one; clocks between a block's arrival and its going on; the latency of a first load, of
# adding up the warps' parts and of writing.
HBM, L2, L2_ONE = 3.0e12, 5.5e12, 64 * 1.7e9
BARRIER_US, PHASE_US = 1.2, 0.8
GPUS = {"227 KB, 132 (H100)": 232448, "163 KB, 108 (A100)": 166912, "99 KB, 128 (4090)": 101376}
"""What stands in the table, multiprocessors among it, and bytes of shared memory of a block."""


class Phase(NamedTuple):
    """Times a step; bytes that all blocks read from L2, what the busiest reads, and weights."""

    name: str
    count: int
    activations: float
    busiest: float
    weights: float

    @property
    def us(self) -> float:
        return max(self.activations / L2, self.busiest / L2_ONE) * 1e6


def product(
    name: str, count: int, units: int, inputs: int, rows_of: int, normed: bool, item: int = 2
) -> Phase:
    """units of rows_of weight rows. A pass reads all activations: one unit's, or two units' in gate_up; a block's first
    pass reads the sums of squares as well."""
    together = 2 if name == "gate_up" else 1
    each, more = divmod(units, BLOCKS)
    passes = (BLOCKS - more) * -(-each // together) + more * -(-(each + 1) // together)
    turns = -(-(each + (more > 0)) // together)
    read = S * inputs * item
    squares = S * E // 8 * 4 if normed else 0
    everywhere = passes * read + min(units, BLOCKS) * squares
    return Phase(name, count, everywhere, turns * read + squares, units * rows_of * inputs * item)


def phases() -> list[Phase]:
    half = LAYERS // 2
    tiles = K * -(-S * (H // K) // 16)
    attention = [
        Phase(f"attention, {name}", half, tiles * bytes_, -(-tiles // BLOCKS) * bytes_, 0)
        for name, bytes_ in (("self", (P + S) * D * 2 * 2), ("cross, KV fp32", P * D * 2 * 4))
    ]
    ends = 4 * (2 * A * E + 3 * E)
    return [
        Phase("ends", 1, S * ends, ends, 4 * 2 * A * E),
        product("mlp_out", 1, E // 8, E, 8, False, 4),
        product("qkv, self", half, (H + 2 * K) * D // 16, E, 16, True),
        product("qkv, cross", half, H * D // 16, E, 16, True),
        *attention,
        product("o", LAYERS, E // 8, H * D, 8, False),
        product("gate_up", LAYERS, F // 8, E, 16, True),
        product("down", LAYERS, E // 8, F, 8, False),
    ]


def account() -> str:
    rows = phases()
    by_phase = [
        [row.name, row.count, f"{row.weights / 1e6:.2f}", f"{row.activations / 1e6:.2f}",
         f"{row.busiest / 1e3:.0f}", f"{row.us:.2f}"]
        for row in rows
    ]  # fmt: skip
    columns = ["phase", "a step", "weights, MB", "read from L2, MB", "busiest block, KB", "us"]
    weights, read, us = (
        sum(row.count * getattr(row, of) for row in rows) for of in ("weights", "activations", "us")
    )
    barriers = 2 + 5 * LAYERS
    terms = {
        "activations from L2": us,
        f"barriers, {barriers} of {BARRIER_US} us": barriers * BARRIER_US,
        f"first load and sums, {barriers} of {PHASE_US} us": barriers * PHASE_US,
    }
    terms |= {"sum": sum(terms.values()), "beside these: weights from HBM": weights / HBM * 1e6}
    by_term = [[name, f"{us:.0f}", f"{us * STEPS / 1e3:.2f}"] for name, us in terms.items()]
    return "\n\n".join([
        table(columns, by_phase, left=1),
        f"weights {weights / 1e6:.1f} MB, activations {read / 1e6:.0f} MB a step",
        table(["term", "us a step", "ms in 10 steps"], by_term, left=1),
        shared_memory(),
    ])  # fmt: skip


def shared_memory() -> str:
    from simt.emulator import build

    library, rows = build.library(), []
    for name, shared in GPUS.items():
        multiprocessors = int(name.split()[2])
        for batch in (1, 8):
            library.reset()
            library.configure(multiprocessors=multiprocessors, shared_bytes_per_block=shared)
            found = library.denoise_resources([batch, S, P, LAYERS, STEPS, E, F, H, K, D, A, 1])
            ring = found["ring_bytes"]
            sizes = (ring, found["shared_bytes"] - ring, found["largest_slab"])
            rows.append([name, batch, found["blocks"], *(f"{size / 1024:.1f}" for size in sizes)])
    library.reset()
    held = ["weights, KB", "residual, sums, attention, KB", "largest slab, KB"]
    return table(["shared memory of a block", "batch", "blocks", *held], rows, left=1)


if __name__ == "__main__":
    print(account())
