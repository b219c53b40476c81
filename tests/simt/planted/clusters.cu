// Clusters of blocks, and launches that begin before those ahead of them have ended.
#include "planted.h"

namespace planted {
namespace {

constexpr unsigned THREADS = 64;
constexpr int RANKS = 4;

struct Stores {
    bool met = true, fresh = true, waits = true;
    int expected = 16 * RANKS * THREADS, to = RANKS, aligned = 16;
};

__device__ __forceinline__ void meet(bool wanted) {
    if (!wanted) return;
    cluster_arrive_relaxed();
    cluster_wait();
}

// Each thread stores a vector in every block, and adds up what its like in all blocks stored in its own.
__device__ __forceinline__ void sums_of_cluster(const Args& p, const Stores& stores) {
    SMOLVLA_SHARED(memory);
    auto* barrier = reinterpret_cast<uint64_t*>(memory);
    const auto part = [&](int rank) { return reinterpret_cast<float*>(memory + 16 + 16 * (rank * THREADS + threadIdx.x)); };
    if (threadIdx.x == 0) {
        init_copy_barrier(barrier);
        expect_copies(barrier, stores.expected);
        publish_copy_barriers();
    }
    if (!stores.fresh) *part(threadIdx.x % RANKS) = 0.0f;
    meet(stores.met);
    const float own = static_cast<float>(cluster_rank() + 1);
    float* to = part(cluster_rank()) + (16 - stores.aligned) / 4;
    for (int rank = 0; rank < stores.to; ++rank)
        store_to_rank(to, rank, float4{own, own, own, threadIdx.x + 1.0f}, barrier);
    if (stores.waits)
        await_stores(barrier);
    else
        meet(true);
    float sum = 0.0f;
    for (int rank = 0; rank < RANKS; ++rank) sum = 2.0f * sum + part(rank)[0] * part(rank)[3];
    p.a[blockIdx.x * THREADS + threadIdx.x] = static_cast<uint32_t>(sum);
}

__global__ void cluster_sums(Args p) { sums_of_cluster(p, {}); }
__global__ void store_to_a_block_not_met(Args p) { sums_of_cluster(p, {.met = p.mended}); }
__global__ void store_where_a_block_wrote(Args p) { sums_of_cluster(p, {.fresh = p.mended}); }
__global__ void store_not_waited_for(Args p) { sums_of_cluster(p, {.waits = p.mended}); }
__global__ void stores_of_too_few(Args p) { sums_of_cluster(p, {.expected = 16 * (RANKS * THREADS + !p.mended)}); }
__global__ void stores_of_too_many(Args p) { sums_of_cluster(p, {.expected = 16 * (RANKS * THREADS - !p.mended)}); }
__global__ void cluster_rank_outside(Args p) { sums_of_cluster(p, {.to = RANKS + !p.mended}); }
__global__ void store_misaligned(Args p) { sums_of_cluster(p, {.aligned = p.mended ? 16 : 8}); }

__global__ void cluster_wait_alone(Args p) {
    if (p.mended) cluster_arrive_relaxed();
    cluster_wait();
}

__global__ void cluster_arrives_twice(Args p) {
    cluster_arrive_relaxed();
    if (!p.mended) cluster_arrive_relaxed();
    cluster_wait();
}

__global__ void cluster_never_waits(Args p) {
    cluster_arrive_relaxed();
    if (p.mended) cluster_wait();
}

struct Bulk {
    bool met = true, published = true, waits = true, stays = true, changes = false;
    int expected = 16 * THREADS, aligned = 16;
};

// Each block brings its part of the words, for all blocks. A mistake that leaves out more has a full barrier for the rest.
__device__ __forceinline__ void bulk_copies(const Args& p, const Bulk& bulk) {
    SMOLVLA_SHARED(memory);
    auto* barrier = reinterpret_cast<uint64_t*>(memory);
    const int bytes = 16 * THREADS / RANKS, at = cluster_rank() * bytes;
    if (threadIdx.x == 0) {
        init_copy_barrier(barrier);
        expect_copies(barrier, bulk.expected);
        if (bulk.published) publish_copy_barriers();
    }
    meet(bulk.met);
    if (threadIdx.x == 0) {
        copy_to_cluster(memory + bulk.aligned + at, reinterpret_cast<unsigned char*>(p.b) + at, bytes, barrier, RANKS);
        if (bulk.changes) p.b[at / 4] = 1;
    }
    if (bulk.waits)
        await_copies(barrier);
    else
        meet(true);
    if (bulk.stays) cluster_arrive_relaxed();
    p.a[blockIdx.x * THREADS + threadIdx.x] = reinterpret_cast<uint32_t*>(memory + bulk.aligned)[threadIdx.x];
    if (bulk.stays) cluster_wait();
}

__global__ void bulk_barrier_not_met(Args p) { bulk_copies(p, {.met = p.mended}); }
__global__ void bulk_barrier_not_published(Args p) { bulk_copies(p, {.published = p.mended}); }
__global__ void bulk_not_waited_for(Args p) { bulk_copies(p, {.waits = p.mended}); }
__global__ void bulk_ends_too_early(Args p) { bulk_copies(p, {.stays = p.mended}); }
__global__ void bulk_of_what_changes(Args p) { bulk_copies(p, {.changes = !p.mended}); }
__global__ void bulk_brings_too_few(Args p) { bulk_copies(p, {.expected = 16 * THREADS + (p.mended ? 0 : 16)}); }
__global__ void bulk_brings_too_many(Args p) { bulk_copies(p, {.expected = 16 * THREADS - (p.mended ? 0 : 16)}); }
__global__ void bulk_misaligned(Args p) { bulk_copies(p, {.aligned = p.mended ? 16 : 8}); }

__global__ void read_too_early(Args p) {
    if (p.mended) await_earlier_launches();
    const uint32_t word = p.b[threadIdx.x];
    await_earlier_launches();
    p.a[threadIdx.x] = word;
}

__global__ void copied_too_early(Args p) {
    SMOLVLA_SHARED(memory);
    if (p.mended) await_earlier_launches();
    cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * threadIdx.x);
    cp_async_commit();
    await_earlier_launches();
    cp_async_wait<0>();
}

__global__ void written_too_early(Args p) {
    if (p.mended) await_earlier_launches();
    p.a[threadIdx.x] = 1;
    await_earlier_launches();
}

__global__ void never_waits_for_launches(Args p) {
    if (p.mended || threadIdx.x < 40) await_earlier_launches();
}

}  // namespace

const std::vector<Entry>& cluster_kernels() {
    static const Grid bulk{RANKS, THREADS, 16 + 16 * THREADS, false, RANKS};
    static const Grid two{2 * RANKS, THREADS, 16 + 16 * RANKS * THREADS, false, RANKS}, early{1, THREADS, 16 * THREADS, false, 1, true};
    static const std::vector<Entry> all = {
        {"cluster_sums", cluster_sums, two},
        {"store_to_a_block_not_met", store_to_a_block_not_met, two},
        {"store_where_a_block_wrote", store_where_a_block_wrote, two},
        {"store_not_waited_for", store_not_waited_for, two},
        {"stores_of_too_few", stores_of_too_few, two},
        {"stores_of_too_many", stores_of_too_many, two},
        {"cluster_rank_outside", cluster_rank_outside, two},
        {"store_misaligned", store_misaligned, two},
        {"cluster_wait_alone", cluster_wait_alone, two},
        {"cluster_arrives_twice", cluster_arrives_twice, two},
        {"cluster_never_waits", cluster_never_waits, two},
        {"bulk_barrier_not_met", bulk_barrier_not_met, bulk},
        {"bulk_barrier_not_published", bulk_barrier_not_published, bulk},
        {"bulk_not_waited_for", bulk_not_waited_for, bulk},
        {"bulk_ends_too_early", bulk_ends_too_early, bulk},
        {"bulk_of_what_changes", bulk_of_what_changes, bulk},
        {"bulk_brings_too_few", bulk_brings_too_few, bulk},
        {"bulk_brings_too_many", bulk_brings_too_many, bulk},
        {"bulk_misaligned", bulk_misaligned, bulk},
        {"read_too_early", read_too_early, early},
        {"copied_too_early", copied_too_early, early},
        {"written_too_early", written_too_early, early},
        {"never_waits_for_launches", never_waits_for_launches, early},
    };
    return all;
}

}  // namespace planted
