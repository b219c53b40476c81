// Of compute capability 9.0: the barrier of a cluster, its blocks' shared memory, and launches that begin early.
#include <algorithm>

#include "emulator/ptx.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

ClusterBarrier& barrier_of(const Thread& thread) { return cluster_barrier_of(*thread.block); }

// Threads that have ended are waited for no more.
void complete(ClusterBarrier& barrier) {
    if (barrier.arrived < barrier.expected) return;
    barrier.published = std::move(barrier.gathered);
    barrier.gathered = {};
    barrier.arrived = 0;
    ++barrier.phase;
    for (Thread* thread : barrier.waiting) make_ready(*thread);
    barrier.waiting.clear();
}

}  // namespace

ClusterBarrier& cluster_barrier_of(const Block& block) { return launch->clusters[block.number / launch->shape.cluster]; }

int cluster_size() { return static_cast<int>(launch->shape.cluster); }
int cluster_rank() { return static_cast<int>(current->block->number % launch->shape.cluster); }

void cluster_arrive_relaxed() {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    Thread& thread = *current;
    ClusterBarrier& barrier = barrier_of(thread);
    if (thread.cluster_arrived) fail("barrier.cluster.arrive a second time, with no wait between", site);
    thread.cluster_arrived = true;
    thread.cluster_phase = barrier.phase;
    barrier.gathered = join(barrier.gathered, thread.made_barriers);
    ++barrier.arrived;
    complete(barrier);
    pause();
}

void cluster_wait() {
    void* site = SMOLVLA_SIMT_SITE;
    Thread& thread = *current;
    ClusterBarrier& barrier = barrier_of(thread);
    if (!thread.cluster_arrived) fail("barrier.cluster.wait without an arrive before it", site);
    if (barrier.phase == thread.cluster_phase) {
        barrier.waiting.push_back(&thread);
        wait(Waits::cluster_barrier, 0, site);
    }
    thread.cluster_arrived = false;
    learn(thread, barrier.published);
}

Block& block_of_rank(int rank, void* site) {
    const Block& block = *current->block;
    const auto cluster = static_cast<int>(launch->shape.cluster);
    if (rank < 0 || rank >= cluster)
        fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster), site);
    const unsigned number = block.number / launch->shape.cluster * launch->shape.cluster + static_cast<unsigned>(rank);
    const auto found = std::find_if(launch->blocks.begin(), launch->blocks.end(),
                                    [&](const std::unique_ptr<Block>& other) { return other->number == number; });
    if (found == launch->blocks.end())
        fail("block " + std::to_string(rank) + " of the cluster has ended", site);
    return **found;
}

void await_earlier_launches() { current->awaited = true; }

void check_exit(Thread& thread) {
    if (thread.cluster_arrived) fail("the thread ends between barrier.cluster.arrive and its wait", thread.site);
    if (launch->shape.dependent && !thread.awaited)
        fail("the thread ends without griddepcontrol.wait: launches behind it may begin before those ahead have ended",
             thread.site);
    ClusterBarrier& barrier = barrier_of(thread);
    --barrier.expected;
    if (barrier.arrived) complete(barrier);
}

}  // namespace simt
