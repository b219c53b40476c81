// Bulk copies, stores to other blocks of a cluster, and the barriers that count their bytes. A copy is done at some later step
// of anybody: when a thread waits for its barrier, or the seed says so. Until then nobody may touch the destination or change
// the source, and neither the block that began it nor the one it goes to may end. A store has no source, and the block that
// began it is taken to be free to end.
//
// Not seen are: a fence that is missing between an ordinary write and a bulk copy of the same bytes, or between an mbarrier
// and bulk copies (proxies); the scope of a wait; a relaxed arrival that is taken to show other blocks what a thread wrote
// before it made barriers; and what a thread wrote before a copy, which who waits for the copy is taken to know.
#include <algorithm>
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

CopyBarrier& barrier_at(const Block& block, uintptr_t at, void* site) {
    const auto found = launch->copy_barriers.find(at);
    if (!block.shared.holds(at) || found == launch->copy_barriers.end()) fail("no barrier of copies was made there", site);
    return found->second;
}

void wake(CopyBarrier& barrier) {
    for (Thread* thread : barrier.waiting) make_ready(*thread);
    barrier.waiting.clear();
}

void complete(CopyBarrier& barrier) {
    barrier.complete = true;
    wake(barrier);
}

void perform(size_t which) {
    const BulkCopy copy = std::move(launch->bulk_copies[which]);
    launch->bulk_copies.erase(launch->bulk_copies.begin() + static_cast<std::ptrdiff_t>(which));
    if (copy.from && std::memcmp(copy.source.data(), copy.from, copy.source.size()))
        fail("the source of a bulk copy changed while it was under way", copy.site);
    std::memcpy(reinterpret_cast<void*>(copy.to), copy.source.data(), copy.source.size());
    end_remote_write(copy.block->shared, copy.to, copy.source.size());
    CopyBarrier& barrier = barrier_at(*copy.block, copy.barrier, copy.site);
    barrier.known = join(barrier.known, copy.known);
    barrier.bytes -= static_cast<int64_t>(copy.source.size());
    if (barrier.complete || (barrier.expected && barrier.bytes < 0))
        fail("more bytes come than a barrier of copies expects", copy.site);
    if (barrier.expected && !barrier.bytes) complete(barrier);
    if (copy.block == copy.begun_by || !copy.from) return;
    // The block that began it knows behind the cluster's next barrier, or the one after that where a thread of the target
    // has arrived at the next already.
    const uint64_t phase = cluster_barrier_of(*copy.block).phase;
    const bool arrived = std::any_of(copy.block->threads.begin(), copy.block->threads.end(), [&](const Thread& thread) {
        return thread.cluster_arrived && thread.cluster_phase == phase;
    });
    launch->done_copies.push_back({copy.begun_by, phase + (arrived ? 2 : 1), copy.site});
}

void perform_one_or_none() {
    if (draw(4) == 0) perform(draw(launch->bulk_copies.size()));
}

// What the thread itself did so far, and nothing that it heard of others: a copy orders no more.
Ref<Knowledge> publish_own(Thread& thread) {
    const Ref<Knowledge> all = publish(thread);
    Ref<Knowledge> own(new Knowledge(all->of.size()));
    Ref<Clock> clock(new Clock(thread.block->threads.size()));
    clock->epochs[thread.index] = all->of[thread.block->number]->epochs[thread.index];
    own->of[thread.block->number] = clock;
    return own;
}

// from  what stays until the copy is done, or null
void begin(Block& target, void* shared, const void* from, std::vector<unsigned char> bytes, uint64_t* barrier, void* site) {
    Thread& thread = *current;
    const uintptr_t offset = target.shared.low - thread.block->shared.low;
    const uintptr_t to = number(shared) + offset, counted_by = number(barrier) + offset;
    CopyBarrier& counts = barrier_at(target, counted_by, site);
    if (!counts.published) fail("a copy to a barrier that was not published since it was made", site);
    touch_shared_of(target.shared, counted_by, 8, ATOMIC_READ, site);
    begin_remote_write(target.shared, to, bytes.size(), site);
    launch->bulk_copies.push_back({&target, to, static_cast<const unsigned char*>(from), std::move(bytes), counted_by,
                                   thread.block, publish_own(thread), site});
    wake(counts);  // who waits does the copy
    ++statistics.async_copies;
}

void begin_bulk(Block& target, void* shared, const void* global, int bytes, uint64_t* barrier, void* site) {
    if (number(shared) % 16 || number(global) % 16 || bytes % 16 || bytes <= 0)
        fail("misaligned bulk copy: both addresses and the bytes are multiples of 16", site);
    const auto* from = static_cast<const unsigned char*>(global);
    access(number(global), static_cast<size_t>(bytes), READ, Path::l2, site);
    begin(target, shared, from, {from, from + bytes}, barrier, site);
}

}  // namespace

void init_copy_barrier(uint64_t* barrier) {
    void* site = SMOLVLA_SIMT_SITE;
    access_aligned(number(barrier), 8, WRITE, Path::l2, site);
    if (!launch->copy_barriers.try_emplace(number(barrier), CopyBarrier{current->id}).second)
        fail("a barrier of copies is made a second time", site);
}

void publish_copy_barriers() {
    for (auto& [at, barrier] : launch->copy_barriers)
        if (barrier.maker == current->id) barrier.published = true;
    current->made_barriers = publish_own(*current);
}

void expect_copies(uint64_t* at, int bytes) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    CopyBarrier& barrier = barrier_at(*current->block, number(at), site);
    access_aligned(number(at), 8, ATOMIC_READ, Path::l2, site);
    if (barrier.expected) fail("a barrier of copies expects one thread, and a second one arrives", site);
    if (bytes < 0 || bytes >= 1 << 20) fail("a barrier of copies counts up to 2^20 - 1 bytes", site);
    barrier.expected = true;
    barrier.bytes += bytes;
    barrier.known = join(barrier.known, publish(*current));
    if (!barrier.bytes) complete(barrier);
}

void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    begin_bulk(*current->block, shared, global, bytes, barrier, site);
    perform_one_or_none();
}

void copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int ranks) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    for (int rank = 0; rank < ranks; ++rank) begin_bulk(block_of_rank(rank, site), shared, global, bytes, barrier, site);
    perform_one_or_none();
}

void store_to_rank(void* own, int rank, const void* value, uint64_t* own_barrier) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    if (number(own) % 16) fail("misaligned store to another block: the address is a multiple of 16", site);
    const auto* from = static_cast<const unsigned char*>(value);
    begin(block_of_rank(rank, site), own, nullptr, {from, from + 16}, own_barrier, site);
    perform_one_or_none();
}

void await_copies(uint64_t* at) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    access_aligned(number(at), 8, ATOMIC_READ, Path::l2, site);
    CopyBarrier& barrier = barrier_at(*current->block, number(at), site);  // it stays while a thread of the block waits
    while (!barrier.complete) {
        std::vector<size_t> coming;
        for (size_t i = 0; i < launch->bulk_copies.size(); ++i)
            if (launch->bulk_copies[i].barrier == number(at)) coming.push_back(i);
        if (coming.empty()) {
            barrier.waiting.push_back(current);
            wait(Waits::copies, 0, site);
        } else {
            perform(coming[draw(coming.size())]);
            pause();
        }
    }
    learn(*current, barrier.known);
}

void check_copies_are_over() {
    const Block* block = current->block;
    const auto refuse = [](const char* which, void* site) {
        fail(std::string("the block ends while a copy ") + which + " may be under way" + source_line(site), nullptr);
    };
    for (const BulkCopy& copy : launch->bulk_copies) {
        if (copy.from && copy.begun_by == block) refuse("that it began", copy.site);
        if (copy.block == block) refuse("to it", copy.site);
    }
    for (const DoneCopy& copy : launch->done_copies)
        if (copy.begun_by == block && cluster_barrier_of(*block).phase < copy.known_in) refuse("that it began", copy.site);
    auto& done = launch->done_copies;
    const auto of_this = [&](const DoneCopy& copy) { return copy.begun_by == block; };
    done.erase(std::remove_if(done.begin(), done.end(), of_this), done.end());
    for (auto each = launch->copy_barriers.begin(); each != launch->copy_barriers.end();)
        each = block->shared.holds(each->first) ? launch->copy_barriers.erase(each) : std::next(each);
}

}  // namespace simt
