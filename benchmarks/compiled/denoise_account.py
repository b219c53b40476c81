"""What one launch of denoise_persistent moves, waits for and holds, and what that should take: docs/denoise-persistent.md.

    python benchmarks/compiled/denoise_account.py

Counted from the sizes alone, as csrc/cuda/denoise_plan.cuh deals them out; nothing here is measured. The plan of shared
memory is asked of the launcher itself, compiled for the host emulator (tests/simt/emulator).
"""

from __future__ import annotations

from dataclasses import dataclass

# SmolVLA with two cameras: suffix, prefix, expert width, feed-forward width, heads, KV heads, head size, actions.
S, P, E, F, H, K, D, A = 50, 177, 720, 2048, 15, 5, 64, 32
LAYERS, STEPS = 16, 10
BLOCKS = 132  # multiprocessors of an H100

# Assumptions, none measured here: a copy kernel's HBM rate; what microbenchmarks of others give for reads from L2, by
# all multiprocessors and by one; clocks between a block's arrival and its going on; the latency of a first load, of
# adding up the warps' parts and of writing.
HBM, L2, L2_ONE = 3.0e12, 5.5e12, 64 * 1.7e9
BARRIER_US, PHASE_US = 1.2, 0.8


@dataclass
class Phase:
    """Bytes that all blocks read from L2, what the busiest reads, and weights."""

    name: str
    count: int  # in a step
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
    read = S * inputs * (item if name == "mlp_out" else 2)
    squares = S * E // 8 * 4 if normed else 0
    return Phase(
        name, count, passes * read + min(units, BLOCKS) * squares, turns * read + squares,
        units * rows_of * inputs * item,
    )  # fmt: skip


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


def main() -> None:
    rows = phases()
    print("| phase | a step | weights, MB | read from L2, MB | busiest block, KB | us |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(
            f"| {row.name} | {row.count} | {row.weights / 1e6:.2f} | {row.activations / 1e6:.2f} "
            f"| {row.busiest / 1e3:.0f} | {row.us:.2f} |"
        )
    weights = sum(row.count * row.weights for row in rows)
    read = sum(row.count * row.activations for row in rows)
    barriers = 2 + 5 * LAYERS
    terms = {
        "activations from L2": sum(row.count * row.us for row in rows),
        f"barriers, {barriers} of {BARRIER_US} us": barriers * BARRIER_US,
        f"first load and sums, {barriers} of {PHASE_US} us": barriers * PHASE_US,
    }
    print(f"\nweights {weights / 1e6:.1f} MB, activations {read / 1e6:.0f} MB a step\n")
    print("| term | us a step | ms in 10 steps |")
    print("| --- | ---: | ---: |")
    for name, us in terms.items():
        print(f"| {name} | {us:.0f} | {us * STEPS / 1e3:.2f} |")
    print(f"| sum | {sum(terms.values()):.0f} | {sum(terms.values()) * STEPS / 1e3:.2f} |")
    hidden = weights / HBM * 1e6
    print(f"| beside these: weights from HBM | {hidden:.0f} | {hidden * STEPS / 1e3:.2f} |")
    print()
    shared_memory()


def shared_memory() -> None:
    from simt.emulator import build

    library = build.library()
    print(
        "| shared memory of a block | batch | blocks | weights, KB | residual, sums, attention, KB | largest slab, KB |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    gpus = (
        ("227 KB, 132 (H100)", 132, 232448),
        ("163 KB, 108 (A100)", 108, 166912),
        ("99 KB, 128 (4090)", 128, 101376),
    )
    for name, multiprocessors, shared in gpus:
        for batch in (1, 8):
            library.reset()
            library.configure(multiprocessors=multiprocessors, shared_bytes_per_block=shared)
            found = library.denoise_resources([batch, S, P, LAYERS, STEPS, E, F, H, K, D, A, 1])
            rest = found["shared_bytes"] - found["ring_bytes"]
            print(
                f"| {name} | {batch} | {found['blocks']} | {found['ring_bytes'] / 1024:.1f} | {rest / 1024:.1f} "
                f"| {found['largest_slab'] / 1024:.1f} |"
            )
    library.reset()


if __name__ == "__main__":
    main()
