// What must come before what: barriers, counters, asynchronous copies.
#include "planted.h"

namespace planted {
namespace {

constexpr unsigned THREADS = 64;

__global__ void missing_barrier(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = 0;
    __syncthreads();
    words[threadIdx.x] = threadIdx.x;
    if (p.mended) __syncthreads();
    p.a[threadIdx.x] = words[(threadIdx.x + 1) % THREADS];
}

__global__ void missing_barrier_before_reuse(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    uint32_t sum = 0;
    for (unsigned round = 0; round < 3; ++round) {
        words[threadIdx.x] = round;
        __syncthreads();
        sum += words[(threadIdx.x + 33) % THREADS];
        if (p.mended) __syncthreads();
    }
    p.a[threadIdx.x] = sum;
}

__global__ void shared_race(Args p) {
    SMOLVLA_SHARED(memory);
    if (threadIdx.x == 0 || !p.mended) *reinterpret_cast<uint32_t*>(memory) = 1;
}

__global__ void global_race(Args p) {
    if (threadIdx.x == 0) p.a[p.mended ? blockIdx.x : 0] = 1;
}

__global__ void race_with_atomics(Args p) {
    atomicAdd(p.a, 1u);
    if (!p.mended && threadIdx.x == 0) p.b[0] = p.a[0];
}

// Makes a thread wait without ordering memory: so a test decides which of two unordered accesses comes first.
__device__ __forceinline__ void after(uint32_t* turns, uint32_t turn) {
    while (atomicAdd(turns, 0u) != turn) relax();
}

// Two threads read, one after the other but unordered; the writer has met only the second.
__global__ void race_with_the_first_reader(Args p) {
    SMOLVLA_SHARED(memory);
    auto* word = reinterpret_cast<uint32_t*>(memory);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) *word = 1;
    __syncthreads();
    if (warp == 0 && lane == 0) {
        p.a[0] = *word;
        atomicAdd(p.b, 1u);
    }
    if (warp == 1 && lane == 0) {
        after(p.b, 1);
        p.a[1] = *word;
    }
    if (warp > 0 || p.mended) barrier_sync(1, p.mended ? 96 : 64);
    if (warp == 2 && lane == 0) *word = 2;
}

// A word is written, then, in order, its upper half again; who reads the lower half has met nobody.
__global__ void race_with_half_a_word(Args p) {
    SMOLVLA_SHARED(memory);
    auto* halves = reinterpret_cast<uint16_t*>(memory);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0 && lane == 0) *reinterpret_cast<uint32_t*>(memory) = 1;
    if (warp < 2) barrier_sync(1, 64);
    if (warp == 1 && lane == 0) {
        halves[1] = 2;
        atomicAdd(p.b, 1u);
    }
    if (p.mended) __syncthreads();
    if (warp == 2 && lane == 0) {
        after(p.b, 1);
        p.a[0] = halves[0];
    }
}

__global__ void lockstep(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = threadIdx.x;
    if (p.mended)
        __syncwarp();
    else
        __shfl_sync(0xffffffffu, 0, 0);  // meets, but orders no memory
    p.a[threadIdx.x] = words[threadIdx.x ^ 1];
}

__global__ void unwritten_without_barrier(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = threadIdx.x;
    if (p.mended) __syncthreads();
    p.a[threadIdx.x] = words[(threadIdx.x + 1) % THREADS];
}

__global__ void barrier_not_reached(Args p) {
    if (p.mended || threadIdx.x < 40) __syncthreads();
}

__global__ void barrier_after_return(Args p) {
    if (!p.mended && threadIdx.x >= 32) return;
    __syncthreads();
}

__global__ void different_barriers(Args p) {
    barrier_sync(p.mended ? 1 : 1 + threadIdx.x / 32, THREADS);
}

__global__ void barriers_of_two_branches(Args p) {
    if (p.mended || threadIdx.x % 32 < 16) {
        __syncthreads();
        p.a[threadIdx.x] = 1;
    } else {
        __syncthreads();
        p.a[2 * threadIdx.x] = 2;
    }
}

__global__ void different_counts(Args p) {
    barrier_sync(1, p.mended || threadIdx.x < 32 ? THREADS : 32);
}

__global__ void odd_count(Args p) { barrier_sync(1, p.mended ? 64 : 48); }

__global__ void named_barrier_of_others(Args p) {
    // The first warp writes for the second; the barrier has to hold both.
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    if (threadIdx.x < 32) words[threadIdx.x] = threadIdx.x;
    if (p.mended)
        barrier_sync(3, THREADS);
    else
        barrier_sync(3 + static_cast<int>(threadIdx.x / 32), 32);
    if (threadIdx.x >= 32) p.a[threadIdx.x] = words[threadIdx.x - 32];
}

__global__ void copy_not_waited_for(Args p) {
    SMOLVLA_SHARED(memory);
    cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * threadIdx.x);
    cp_async_commit();
    if (p.mended)
        cp_async_wait<0>();
    else
        cp_async_wait<1>();
    p.a[threadIdx.x] = reinterpret_cast<uint32_t*>(memory)[4 * threadIdx.x];
    cp_async_wait<0>();
}

__global__ void copy_without_barrier(Args p) {
    SMOLVLA_SHARED(memory);
    for (unsigned i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(memory)[4 * threadIdx.x + i] = 0;
    __syncthreads();
    cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    if (p.mended) __syncthreads();
    p.a[threadIdx.x] = reinterpret_cast<uint32_t*>(memory)[4 * (threadIdx.x ^ 32)];
}

__global__ void copy_into_what_is_read(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    for (unsigned i = 0; i < 4; ++i) words[4 * threadIdx.x + i] = i;
    __syncthreads();
    const uint32_t before = words[4 * ((threadIdx.x + 1) % THREADS)];
    if (p.mended) __syncthreads();
    cp_async_16(words + 4 * threadIdx.x, p.b + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    p.a[threadIdx.x] = before;
}

__global__ void copy_left_behind(Args p) {
    SMOLVLA_SHARED(memory);
    cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * threadIdx.x);
    if (p.mended) cp_async_commit();
    cp_async_wait<0>();
}

__global__ void copy_of_what_changes(Args p) {
    SMOLVLA_SHARED(memory);
    cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * threadIdx.x);
    cp_async_commit();
    if (p.mended) cp_async_wait<0>();
    p.b[4 * threadIdx.x] += 1;
    cp_async_wait<0>();
}

// The second block reads what the first one wrote, once the first has added to a counter.
template <bool OVER_L2>
__device__ __forceinline__ void hand_over(const Args& p, bool barrier_before, bool barrier_after) {
    uint32_t* counter = p.b;
    if (blockIdx.x == 0) {
        p.a[threadIdx.x] = threadIdx.x;
        if (barrier_before) __syncthreads();
        if (threadIdx.x == 0) add_release(counter, 1);
        return;
    }
    if (threadIdx.x == 0 || !barrier_after)
        while (load_acquire(counter) == 0) relax();
    __syncthreads();
    const uint32_t* from = p.a + (threadIdx.x + 1) % THREADS;
    p.a[THREADS + threadIdx.x] = OVER_L2 ? load_l2(from) : *from;
}

__global__ void release_without_barrier(Args p) { hand_over<true>(p, p.mended, true); }

__global__ void release_too_early(Args p) {
    if (threadIdx.x) return;
    if (blockIdx.x == 0) {
        if (p.mended) p.a[0] = 1;
        add_release(p.b, 1);
        if (!p.mended) p.a[0] = 1;
    } else {
        while (load_acquire(p.b) == 0) relax();
        p.a[1] = load_l2(p.a);
    }
}

__global__ void stale_l1(Args p) {
    if (p.mended)
        hand_over<true>(p, true, true);
    else
        hand_over<false>(p, true, true);
}

__global__ void read_without_acquire(Args p) {
    uint32_t* counter = p.b;
    if (blockIdx.x == 0) {
        p.a[threadIdx.x] = threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) add_release(counter, 1);
        return;
    }
    if (threadIdx.x == 0 && p.mended)
        while (load_acquire(counter) == 0) relax();
    if (threadIdx.x == 0 && !p.mended)
        while (atomicAdd(counter, 0u) == 0) relax();  // sees the sum, and is ordered after nothing
    __syncthreads();
    p.a[THREADS + threadIdx.x] = load_l2(p.a + threadIdx.x);
}

__global__ void counter_never_comes(Args p) {
    if (threadIdx.x == 0) {
        add_release(p.b, 1);
        while (load_acquire(p.b) < gridDim.x + (p.mended ? 0 : 1)) relax();
    }
    __syncthreads();
}

__global__ void spins_on_memory(Args p) {
    if (blockIdx.x == 1 && threadIdx.x == 0)
        while (!p.mended && *static_cast<volatile uint32_t*>(p.b) == 0) continue;
}

__global__ void read_only_path(Args p) {
    p.a[threadIdx.x] = 1;
    p.a[THREADS + threadIdx.x] = __ldg((p.mended ? p.b : p.a) + threadIdx.x);
}

}  // namespace

const std::vector<Entry>& order_kernels() {
    static const Grid one{1, THREADS, 16 * THREADS}, two{2, THREADS, 16 * THREADS, true}, three{1, 96, 256};
    static const std::vector<Entry> all = {
        {"missing_barrier", missing_barrier, one},
        {"missing_barrier_before_reuse", missing_barrier_before_reuse, one},
        {"shared_race", shared_race, one},
        {"global_race", global_race, two},
        {"race_with_atomics", race_with_atomics, one},
        {"race_with_the_first_reader", race_with_the_first_reader, three},
        {"race_with_half_a_word", race_with_half_a_word, three},
        {"lockstep", lockstep, one},
        {"unwritten_without_barrier", unwritten_without_barrier, one},
        {"barrier_not_reached", barrier_not_reached, one},
        {"barrier_after_return", barrier_after_return, one},
        {"different_barriers", different_barriers, one},
        {"barriers_of_two_branches", barriers_of_two_branches, one},
        {"different_counts", different_counts, one},
        {"odd_count", odd_count, one},
        {"named_barrier_of_others", named_barrier_of_others, one},
        {"copy_not_waited_for", copy_not_waited_for, one},
        {"copy_without_barrier", copy_without_barrier, one},
        {"copy_into_what_is_read", copy_into_what_is_read, one},
        {"copy_left_behind", copy_left_behind, one},
        {"copy_of_what_changes", copy_of_what_changes, one},
        {"release_without_barrier", release_without_barrier, two},
        {"release_too_early", release_too_early, two},
        {"stale_l1", stale_l1, two},
        {"read_without_acquire", read_without_acquire, two},
        {"counter_never_comes", counter_never_comes, two},
        {"spins_on_memory", spins_on_memory, two},
        {"read_only_path", read_only_path, one},
    };
    return all;
}

}  // namespace planted
