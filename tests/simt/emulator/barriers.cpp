// Barriers of a block. As on the device a barrier counts whole warps: one has arrived when all its threads have.
#include <algorithm>

#include "emulator/runtime.h"

namespace simt {
namespace {

// The compiler may repeat an instruction, so that one line has many addresses; two lines are two instructions.
void check_same_line(const Warp& warp, void* site) {
    for (unsigned lanes = warp.present; lanes; lanes &= lanes - 1) {
        void* other = warp.lanes[__builtin_ctz(lanes)]->site;
        if (other != site && source_line(other) != source_line(site))
            fail("lanes of one warp come to different barriers: others wait" + source_line(other), site);
    }
}

void arrive(unsigned number, unsigned expected, bool plain, void* site) {
    Thread& thread = *current;
    Block& block = *thread.block;
    Warp& warp = *thread.warp;
    Barrier& barrier = block.barriers[number];
    if (!barrier.waiting) {
        barrier.expected = expected;
        barrier.plain = plain;
    } else if (barrier.expected != expected) {
        fail("barrier " + std::to_string(number) + " of " + std::to_string(expected) + " threads, where others wait for " +
                 std::to_string(barrier.expected),
             site);
    }
    ++barrier.waiting;
    warp.at_barrier[number] |= 1u << thread.lane;
    thread.site = site;
    if (warp.at_barrier[number] == warp.present) {
        check_same_line(warp, site);
        barrier.complete.push_back(&warp);
    }
    if (barrier.complete.size() * LANES < expected) {
        wait(plain ? Waits::block_barrier : Waits::named_barrier, number, site);
        return;
    }
    std::vector<Thread*> participants;
    for (Warp* met : barrier.complete) {
        for (unsigned lanes = met->present; lanes; lanes &= lanes - 1)
            participants.push_back(met->lanes[__builtin_ctz(lanes)]);
        met->at_barrier[number] = 0;
    }
    barrier.waiting -= static_cast<unsigned>(participants.size());
    barrier.complete.clear();
    ++(plain ? statistics.block_barriers : statistics.named_barriers);
    meet(participants);
    for (Thread* other : participants)
        if (other != &thread) make_ready(*other);
    pause();
}

}  // namespace

void meet(const std::vector<Thread*>& participants) {
    const Thread& first = *participants[0];
    const bool all = participants.size() == first.block->threads.size();
    Ref<Clock> local(new Clock(all ? Clock(participants.size()) : *first.local));
    Ref<Knowledge> remote = first.remote;
    const Clock* last = &*first.local;
    for (const Thread* thread : participants) {
        // Whole block: each knows itself best, and there is nobody else.
        if (!all && &*thread->local != last) local->join(*(last = &*thread->local));
        remote = join(remote, thread->remote);
    }
    for (Thread* thread : participants) {
        local->epochs[thread->index] = thread->epoch++;
        thread->local = local;
        thread->remote = remote;
    }
}

void block_barrier() {
    const auto threads = static_cast<unsigned>(current->block->threads.size());
    arrive(0, (threads + LANES - 1) / LANES * LANES, true, SMOLVLA_SIMT_SITE);
}

void named_barrier(int barrier, int threads) {
    const auto all = static_cast<int>(current->block->threads.size());
    if (barrier < 0 || barrier >= static_cast<int>(BARRIERS))
        fail("barrier " + std::to_string(barrier) + "; a block has 0 to 15", SMOLVLA_SIMT_SITE);
    if (threads <= 0 || threads % static_cast<int>(LANES) || threads > all)
        fail("barrier of " + std::to_string(threads) + " threads; accepted is a multiple of 32 up to the block's " +
                 std::to_string(all),
             SMOLVLA_SIMT_SITE);
    arrive(static_cast<unsigned>(barrier), static_cast<unsigned>(threads), false, SMOLVLA_SIMT_SITE);
}

}  // namespace simt
