"""The emulator on kernels with one planted mistake each: the error it must give, and none on the mended twin."""

import re

import pytest

# What is said after "<kernel>, block (...) thread (...)". # is any number, @ a line of the kernel's file, ... any
# text; of several one must fit, for which thread comes to a mistake first depends on the seed.
PAST, GLOBAL = "past the end of the block's shared memory of 256 bytes", "the global range of 256 bytes at "
MEMORY = {
    "shared_read_outside": f"@: out-of-bounds shared read of 4 bytes at ..., 4 bytes {PAST}",
    "shared_write_outside": f"@: out-of-bounds shared write of 2 bytes at ..., 2 bytes {PAST}",
    "global_read_outside": f"@: out-of-bounds global read of 4 bytes at ..., 4 bytes past the end of {GLOBAL}...",
    "global_write_outside": f"@: out-of-bounds global write of 4 bytes at ..., 4 bytes before the start of {GLOBAL}...",
    "null_pointer": "@: out-of-bounds global read of 4 bytes at ..., a null pointer",
    "copy_source_outside": f"@: out-of-bounds global read of 16 bytes at ..., 16 bytes past the end of {GLOBAL}...",
    "copy_target_outside": f"@: out-of-bounds shared write of 16 bytes at ..., 16 bytes {PAST}",
    "ldmatrix_outside": "@: out-of-bounds ldmatrix: not in shared memory",
    "memcpy_outside": f"@: out-of-bounds global read of 256 bytes at ..., 4 bytes past the end of {GLOBAL}...",
    "across_the_end": f"@: out-of-bounds shared write of 16 bytes at ..., 8 bytes {PAST}",
    "stack_of_another": "@: out-of-bounds global read of 4 bytes at ..., a local variable of block (0,0,0) thread (#,0,0)",
    "unwritten": "@: read of unwritten shared byte #",
    "ldmatrix_unwritten": "@: read of unwritten shared byte 252",
    "misaligned_vector": "@: misaligned read of 16 bytes at global byte # of the 256 at ...",
    "misaligned_word": "@: misaligned read of 4 bytes at global byte # of the 256 at ...",
    "misaligned_copy": "@: misaligned cp.async: both addresses are multiples of 16 bytes",
    "trapped": "@: __trap()",
}
# Always the same thread makes the mistake.
THREADS = {
    "shared_read_outside": 31,
    "shared_write_outside": 31,
    "global_read_outside": 31,
    "global_write_outside": 0,
}
THREADS |= {"copy_source_outside": 15, "copy_target_outside": 15, "ldmatrix_outside": 16, "memcpy_outside": 0}
THREADS |= {"ldmatrix_unwritten": 15, "trapped": 7, "lane_missing_in_mask": 0}

RACE = "@: race at {} byte #{}: nothing orders this {} after the {} by block (#,0,0) thread (#,0,0) @"
SHARED_READ = RACE.format("shared", "", "read", "write")
SHARED_WRITE = RACE.format("shared", "", "write", "read")
GLOBAL_READ = RACE.format("global", " of the 512 at ...", "read", "write")
UNDER_WAY = "@: read at shared byte #, where a copy of block (0,0,0) thread (#,0,0) is still under way"
DEADLOCK = ": deadlock, nobody can go on; block (#,0,0): "
COUNTER = "threads 1-63 wait at __syncthreads @, threads 0 wait for a counter that stands at 2 @"
ORDER = {
    "missing_barrier": (SHARED_READ, SHARED_WRITE),
    "missing_barrier_before_reuse": (SHARED_READ, SHARED_WRITE),
    "shared_race": RACE.format("shared", "", "write", "write"),
    "global_race": RACE.format("global", " of the 512 at ...", "write", "write"),
    "race_with_atomics": RACE.format("global", " of the 512 at ...", "read", "atomic"),
    "race_with_the_first_reader": SHARED_WRITE,
    "race_with_half_a_word": SHARED_READ,
    "lockstep": SHARED_READ,
    "unwritten_without_barrier": "@: read of unwritten shared byte #",
    "barrier_not_reached": DEADLOCK + "threads 0-39 wait at __syncthreads @, threads 40-63 have ended",
    "barrier_after_return": DEADLOCK + "threads 0-31 wait at __syncthreads @, threads 32-63 have ended",
    "different_barriers": DEADLOCK
    + "threads 0-31 wait at barrier 1 of 64 threads @, threads 32-63 wait at barrier 2 of 64 threads @",
    "barriers_of_two_branches": "@: lanes of one warp come to different barriers: others wait @",
    "different_counts": (
        "@: barrier 1 of 32 threads, where others wait for 64",
        "@: barrier 1 of 64 threads, where others wait for 32",
        DEADLOCK + "threads 0-31 wait at barrier 1 of 64 threads @, threads 32-63 have ended",
    ),
    "odd_count": "@: barrier of 48 threads; accepted is a multiple of 32 up to the block's 64",
    "named_barrier_of_others": ("@: read of unwritten shared byte #", SHARED_READ),
    "copy_not_waited_for": UNDER_WAY,
    "copy_without_barrier": (
        SHARED_WRITE,
        UNDER_WAY,
    ),
    "copy_into_what_is_read": (SHARED_READ, SHARED_WRITE, UNDER_WAY),
    "copy_left_behind": "@: the thread ends with a cp.async that was never waited for",
    "copy_of_what_changes": "@: the source of a cp.async changed while it was under way",
    "release_without_barrier": GLOBAL_READ,
    "release_too_early": (GLOBAL_READ, RACE.format("global", " of the 512 at ...", "write", "read")),
    "stale_l1": "@: stale L1 read at global byte # of the 512 at ...: block (0,0,0) thread (#,0,0) wrote it during "
    "this launch @; load_l2 reads past L1",
    "read_without_acquire": GLOBAL_READ,
    "counter_never_comes": DEADLOCK + COUNTER + "; block (#,0,0): " + COUNTER,
    "spins_on_memory": "@: the thread made 20 million accesses without a barrier or a counter: does it wait for ...",
    "read_only_path": "@: stale L1 read at global byte # of the 512 at ...: block (0,0,0) thread (#,0,0) wrote it "
    "during this launch @, __ldg reads what no launch changes",
}

MEET = "@: lanes of one warp meet in different instructions: this one with mask ..., while lanes ... wait with mask "
WARP = {
    "lane_missing_in_mask": "@: lane 0 is missing in its mask 0xfffffffe",
    "reads_lane_outside_mask": "@: shuffle reads lane 16, which takes no part: mask 0x0000ffff, there are 0x0000ffff",
    "reads_lane_that_ended": "@: shuffle reads lane #, which takes no part: mask 0xffffffff, there are 0x00ffffff",
    "lane_at_a_barrier": DEADLOCK + "threads 5 wait at __syncthreads @, threads 0-4,6-31 wait at a vote @",
    "different_masks": (MEET + "0xffffffff @", MEET + "0xffff8000 @"),
    "different_instructions": MEET + "0xffffffff @",
    "odd_width": "@: shuffle of width 12; accepted is a power of two up to 32",
    "mma_of_half_a_warp": (
        "@: mma takes all 32 lanes of a warp; there are 0x...",
        "@: the thread ends while its warp waits for it in ldmatrix or mma",
    ),
    "ldmatrix_of_global_memory": "@: out-of-bounds ldmatrix: not in shared memory",
    "ldmatrix_misaligned": "@: misaligned read of 16 bytes at shared byte #",
}

OF_CLUSTER = RACE.format("shared", " of block #", "write", "write")
COMING = "@: read at shared byte #, where a copy of block (#,0,0) thread (#,0,0) is still under way"
BARRIER_READ = RACE.format("shared", "", "acquiring read", "write")
EARLY = (
    "@: {} at global byte # of the # at ... before griddepcontrol.wait, while launches ahead may still run"
)
CLUSTERS = {
    "store_to_a_block_not_met": (
        "@: no barrier of copies was made there",
        "@: a copy to a barrier that was not published since it was made",
    ),
    "store_where_a_block_wrote": OF_CLUSTER,
    "store_not_waited_for": COMING,
    "stores_of_too_few": DEADLOCK + "threads 0-63 wait for bulk copies @...",
    "stores_of_too_many": (
        "@: more bytes come than a barrier of copies expects",
        COMING,
        "@: read of unwritten shared byte #",
    ),
    "store_misaligned": "@: misaligned store to another block: the address is a multiple of 16",
    "cluster_rank_outside": "@: block 4 of a cluster of 4",
    "cluster_wait_alone": "@: barrier.cluster.wait without an arrive before it",
    "cluster_arrives_twice": "@: barrier.cluster.arrive a second time, with no wait between",
    "cluster_never_waits": ": the thread ends between barrier.cluster.arrive and its wait",
    "bulk_barrier_not_met": ("@: acquiring read of unwritten shared byte 0", BARRIER_READ),
    "bulk_barrier_not_published": BARRIER_READ,
    "bulk_not_waited_for": UNDER_WAY,
    "bulk_ends_too_early": ": the block ends while a copy that it began may be under way @",
    "bulk_of_what_changes": "@: the source of a bulk copy changed while it was under way",
    "bulk_brings_too_few": DEADLOCK + "threads 0-63 wait for bulk copies @...",
    "bulk_brings_too_many": "@: more bytes come than a barrier of copies expects",
    "bulk_misaligned": "@: misaligned bulk copy: both addresses and the bytes are multiples of 16",
    "read_too_early": EARLY.format("read"),
    "copied_too_early": EARLY.format("read"),
    "written_too_early": EARLY.format("write"),
    "never_waits_for_launches": ": the thread ends without griddepcontrol.wait: launches behind it may begin before "
    "those ahead have ended",
}

ALL = {**MEMORY, **ORDER, **WARP, **CLUSTERS}
FILE = {
    name: file
    for file, group in zip(
        ("memory.cu", "order.cu", "warp.cu", "clusters.cu"), (MEMORY, ORDER, WARP, CLUSTERS), strict=True
    )
    for name in group
}
# Words of the two arrays, where the kernels of a group count on them.
WORDS = {
    **dict.fromkeys(MEMORY, (64, 64)),
    **dict.fromkeys(ORDER, (128, 256)),
    **dict.fromkeys(WARP, (64, 64)),
    **dict.fromkeys(CLUSTERS, (512, 256)),
}


def patterns(name):
    """The errors that may come of a kernel, as regular expressions."""
    texts = (ALL[name],) if isinstance(ALL[name], str) else ALL[name]
    thread = THREADS.get(name, "#")
    wholes = (f"{name}, block (#,0,0) thread ({thread},0,0){'' if t[0] == ':' else ' '}{t}" for t in texts)
    known = {r"\#": r"\d+", re.escape("..."): ".*", "@": rf"at {FILE[name]}:\d+"}
    found = []
    for whole in wholes:
        pattern = re.escape(whole)
        for mark, meaning in known.items():
            pattern = pattern.replace(mark, meaning)
        found.append(pattern)
    return found


@pytest.mark.parametrize("name", ALL)
def test_caught(planted, name):
    """On every seed one of the errors, and each of them on some seed."""
    a, b = WORDS[name]
    left = expected = patterns(name)
    for seed in range(3) if len(expected) == 1 else range(40):
        with pytest.raises(RuntimeError) as caught:
            planted.run(name, a, b, seed, mended=False)
        said = str(caught.value)
        assert any(re.fullmatch(pattern, said) for pattern in expected), said
        left = [pattern for pattern in left if not re.fullmatch(pattern, said)]
        # A failed launch leaves nothing behind.
        planted.run(name, a, b, seed, mended=True)
    assert not left, f"never said: {left}"


@pytest.mark.parametrize("name", ALL)
def test_no_false_alarm(planted, name):
    a, b = WORDS[name]
    results = [planted.run(name, a, b, seed, mended=True) for seed in range(20)]
    for one, other in results[1:]:
        assert one.equal(results[0][0]) and other.equal(results[0][1])


def test_every_planted_kernel_is_here(planted):
    from test_emulator import PRIMITIVES

    assert sorted([*ALL, *PRIMITIVES]) == sorted(planted.module.names())


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ((1, 1025, 0, False), "1025 threads a block; accepted are 1 to 1024"),
        ((0, 32, 0, False), "0 blocks; the emulator takes 1 to 65536"),
        ((1, 32, 1001, False), "1001 bytes of shared memory; a block has at most 1000"),
        ((7, 32, 0, True), "too many blocks in cooperative launch: 7, at once run 6"),
        ((8, 32, 0, False, 4), "clusters and dependent launches begin with compute capability 9.0"),
    ],
)
def test_refused(planted, launch, said):
    planted.module.reset()
    planted.module.configure(multiprocessors=3, blocks_per_multiprocessor=2, shared_bytes_per_block=1000)
    try:
        with pytest.raises(RuntimeError, match=said):
            planted.module.launch(*launch)
        planted.module.launch(6, 32, 1000, True)
    finally:
        planted.module.reset()


@pytest.mark.parametrize(("blocks", "cluster"), [(6, 4), (16, 16), (4, 0)])
def test_a_cluster_that_is_refused(planted, blocks, cluster):
    planted.module.configure(compute_capability=90)
    try:
        with pytest.raises(
            RuntimeError, match=f"clusters of {cluster} of {blocks} blocks; accepted is what divides"
        ):
            planted.module.launch(blocks, 32, 0, False, cluster)
        planted.module.launch(16, 32, 0, False, 8)
    finally:
        planted.module.reset()
