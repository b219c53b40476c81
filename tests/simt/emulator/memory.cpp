#include "emulator/memory.h"

#include <algorithm>
#include <cstring>

#include "emulator/ranges.h"
#include "emulator/runtime.h"

namespace simt {

uint64_t unbroken_accesses = 0;
bool writes_again = false;

namespace {

// Lists of cells with many accesses, by number; 0 is none.
std::vector<std::vector<Entry>> lists(1);
std::vector<uint32_t> free_lists;

const char* verb(Kind kind) {
    return kind == READ ? "read" : kind == WRITE ? "write" : kind == ATOMIC_READ ? "acquiring read" : "atomic";
}

std::string hex(uintptr_t at) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(at));
    return text;
}

// "shared byte 12" or "byte 40 of the 1024 at 0x..."
std::string place(uintptr_t at) {
    for (const auto& block : launch->blocks) {
        const Shared& shared = block->shared;
        if (!shared.holds(at)) continue;
        const std::string found = "shared byte " + std::to_string(at - shared.low);
        return block.get() == current->block ? found : found + " of block " + std::to_string(block->position.x);
    }
    const Range* range = range_of(at);
    if (!range) return hex(at);
    return "global byte " + std::to_string(at - range->low) + " of the " + std::to_string(range->high - range->low) +
           " at " + hex(range->low);
}

// Beyond this, a distance says nothing about what was meant.
constexpr uintptr_t NEAR = 1 << 20;

[[noreturn]] __attribute__((noinline)) void outside(uintptr_t at, size_t bytes, Kind kind, void* site) {
    const Shared& shared = current->block->shared;
    uintptr_t best = NEAR;
    std::string nearest;
    const char* space = "global ";
    const auto consider = [&](uintptr_t low, uintptr_t high, bool of_shared) {
        const uintptr_t distance = at < low ? low - at : at + bytes > high ? at + bytes - high : 0;
        if (distance >= best) return;
        best = distance;
        space = of_shared ? "shared " : "global ";
        nearest = std::to_string(distance) + " bytes " + (at < low ? "before the start" : "past the end") + " of " +
                  (of_shared ? "the block's shared memory of " : "the global range of ") + std::to_string(high - low) +
                  " bytes" + (of_shared ? "" : " at " + hex(low));
    };
    consider(shared.low, shared.low + shared.bytes, true);
    for (const Range& range : all_ranges()) consider(range.low, range.high, false);
    if (at >= image().low && at < image().high) nearest = "a constant or a global variable of the host";
    for (const auto& block : launch->blocks)
        for (const Thread& thread : block->threads)
            if (at - reinterpret_cast<uintptr_t>(thread.stack) < STACK_BYTES)
                nearest = "a local variable of " + name_of(thread);
    fail(std::string("out-of-bounds ") + space + verb(kind) + " of " + std::to_string(bytes) + " bytes at " + hex(at) + ", " +
             (nearest.empty() ? at < NEAR ? "a null pointer" : "far from all that is allowed" : nearest),
         site);
}

[[noreturn]] __attribute__((noinline)) void race(uintptr_t at, Kind kind, const Entry& old, void* site) {
    const auto earlier = reinterpret_cast<void*>(image().base + old.site);
    fail("race at " + place(at) + ": nothing orders this " + verb(kind) + " after the " + verb(old.kind()) + " by " +
             name_of(old.thread()) + source_line(earlier),
         site);
}

// row: the new access, column: the old one.  Conflict: unordered, they are a race.
constexpr bool CONFLICT[4][4] = {{false, true, false, true}, {true, true, true, true}, {false, true, false, false},
                                 {true, true, false, false}};
// Whoever races with the old one races with the new one too, so that the old one need not be kept.
constexpr bool SUPERSEDES[4][4] = {{true, false, true, false}, {true, true, true, true}, {false, false, true, false},
                                   {false, false, true, true}};

void append(Cell& cell, const Entry& entry) {
    if (!cell.more && cell.count < Cell::FEW) {
        cell.few[cell.count++] = entry;
        return;
    }
    if (!cell.more) {
        if (free_lists.empty()) {
            free_lists.push_back(static_cast<uint32_t>(lists.size()));
            lists.emplace_back();
        }
        cell.more = free_lists.back();
        free_lists.pop_back();
        lists[cell.more].assign(cell.few, cell.few + cell.count);
    }
    auto& list = lists[cell.more];
    list.resize(cell.count);
    list.push_back(entry);
    cell.count = static_cast<uint16_t>(list.size());
}

void touch(Cell& cell, unsigned bytes, Kind kind, Path path, uintptr_t at, void* site) {
    Thread& thread = *current;
    const uint32_t who = thread.id << 6 | bytes << 2 | kind;
    const auto here = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(site) - image().base);
    Entry* entries = cell.more ? lists[cell.more].data() : cell.few;
    const unsigned count = cell.count;
    for (unsigned i = 0; i < count; ++i)
        if (entries[i].who == who && entries[i].epoch == thread.epoch) return;
    unsigned kept = 0;
    for (unsigned i = 0; i < count; ++i) {
        const Entry old = entries[i];
        bool keep = true;
        if (old.bytes() & bytes) {
            const bool ordered = old.thread() == thread.id || thread.knows(old);
            const bool again = writes_again && kind == WRITE && old.kind() == WRITE && old.site == here;
            if (!ordered && CONFLICT[kind][old.kind()] && !again) race(at, kind, old, site);
            if (kind == READ && path != Path::l2 && (old.kind() & WRITE) &&
                (path == Path::read_only || block_of(old.thread()) != block_of(thread.id)))
                fail("stale L1 read at " + place(at) + ": " + name_of(old.thread()) + " wrote it during this launch" +
                         source_line(reinterpret_cast<void*>(image().base + old.site)) +
                         (path == Path::read_only ? ", __ldg reads what no launch changes" : "; load_l2 reads past L1"),
                     site);
            keep = !(ordered && !(old.bytes() & ~bytes) && SUPERSEDES[kind][old.kind()]);
        }
        if (keep) entries[kept++] = old;
    }
    cell.count = static_cast<uint16_t>(kept);
    append(cell, {thread.epoch, who, here});
}

template <class Cells, class Each>
void each_cell(uintptr_t at, size_t bytes, Cells&& cells, Each&& each) {
    const uintptr_t end = at + bytes;
    Cell* cell = cells(at);
    for (uintptr_t word = at & ~uintptr_t{3}; word < end; word += 4, ++cell) {
        unsigned mask = 15;
        if (word < at) mask &= 15u << (at - word);
        if (word + 4 > end) mask &= 15u >> (word + 4 - end);
        each(*cell, mask, std::max(word, at));
    }
}

uint32_t writer_of(const Cell& cell) {
    const Entry* entries = cell.more ? lists[cell.more].data() : cell.few;
    for (unsigned i = cell.count; i-- > 0;)
        if (entries[i].kind() == WRITE) return entries[i].thread();
    return current->id;
}

// A thread that waits for plain memory to change would wait forever: nobody else runs before it meets somebody.
void count_access(uint64_t& kind, void* site) {
    constexpr uint64_t MOST = 20'000'000;
    ++kind;
    if (++unbroken_accesses > MOST)
        fail("the thread made 20 million accesses without a barrier or a counter: does it wait for plain memory?", site);
}

void shared_access(Shared& shared, uintptr_t at, size_t bytes, Kind kind, void* site) {
    count_access(statistics.shared_accesses, site);
    if (at + bytes > shared.low + shared.bytes) outside(at, bytes, kind, site);
    each_cell(at, bytes, [&](uintptr_t first) { return shared.cell(first); },
              [&](Cell& cell, unsigned mask, uintptr_t where) {
                  if (cell.pending)
                      fail(std::string(verb(kind)) + " at " + place(where) + ", where a copy of " +
                               name_of(writer_of(cell)) + " is still under way",
                           site);
                  if (kind != WRITE && (cell.written & mask) != mask)
                      fail(std::string(verb(kind)) + " of unwritten " + place(where), site);
                  touch(cell, mask, kind, Path::l2, where, site);
                  if (kind & WRITE) cell.written |= mask;
              });
}

void global_access(uintptr_t at, size_t bytes, Kind kind, Path path, void* site) {
    count_access(statistics.global_accesses, site);
    (kind & WRITE ? statistics.global_bytes_written : statistics.global_bytes_read) += bytes;
    const Range* range = range_of(at);
    if (!range || at + bytes > range->high) {
        const auto body = reinterpret_cast<uintptr_t>(launch->body);
        const bool constant = kind == READ && ((at >= image().low && at + bytes <= image().high) ||
                                               (at >= body && at + bytes <= body + launch->body_bytes));
        if (constant) return;
        outside(at, bytes, kind, site);
    }
    if (launch->shape.dependent && !current->awaited && (kind != READ || !is_settled(at, bytes)))
        fail(std::string(verb(kind)) + " at " + place(at) + " before griddepcontrol.wait, while launches ahead may still run",
             site);
    each_cell(at, bytes, [&](uintptr_t first) { return global_cell(*range, first); },
              [&](Cell& cell, unsigned mask, uintptr_t where) { touch(cell, mask, kind, path, where, site); });
}

}  // namespace

void Shared::prepare(size_t size) {
    for (const Cell& cell : cells_)
        if (cell.more) free_lists.push_back(cell.more);
    bytes = size;
    // Aligned to what SMOLVLA_SHARED promises and no more; NaN, should an unchecked read find it.
    memory_.assign(size + 512, 0xff);
    const auto start = reinterpret_cast<uintptr_t>(memory_.data());
    low = ((start + 255) & ~uintptr_t{255}) + 128;
    cells_.assign((size + 3) / 4, Cell{});
}

void end_of_launch() {
    drop_shadows();
    lists.assign(1, {});
    free_lists.clear();
}

void access(uintptr_t at, size_t bytes, Kind kind, Path path, void* site) {
    if (!current || at - reinterpret_cast<uintptr_t>(current->stack) < STACK_BYTES) return;
    Shared& shared = current->block->shared;
    if (shared.holds(at))
        shared_access(shared, at, bytes, kind, site);
    else
        global_access(at, bytes, kind, path, site);
}

void access_aligned(uintptr_t at, size_t bytes, Kind kind, Path path, void* site) {
    if (!current) return;
    if (at & (bytes - 1))
        fail("misaligned " + std::string(verb(kind)) + " of " + std::to_string(bytes) + " bytes at " + place(at), site);
    access(at, bytes, kind, path, site);
}

void touch_shared_of(Shared& shared, uintptr_t at, size_t bytes, Kind kind, void* site) {
    shared_access(shared, at, bytes, kind, site);
}

void begin_async_write(uintptr_t at, size_t bytes, void* site) {
    begin_remote_write(current->block->shared, at, bytes, site);
}

void end_async_write(uintptr_t at, size_t bytes, void* site) {
    Shared& shared = current->block->shared;
    end_remote_write(shared, at, bytes);
    shared_access(shared, at, bytes, WRITE, site);
}

void begin_remote_write(Shared& shared, uintptr_t at, size_t bytes, void* site) {
    if (!shared.holds(at)) outside(at, bytes, WRITE, site);
    shared_access(shared, at, bytes, WRITE, site);
    each_cell(at, bytes, [&](uintptr_t first) { return shared.cell(first); },
              [](Cell& cell, unsigned, uintptr_t) { cell.pending = 1; });
}

void end_remote_write(Shared& shared, uintptr_t at, size_t bytes) {
    each_cell(at, bytes, [&](uintptr_t first) { return shared.cell(first); },
              [](Cell& cell, unsigned, uintptr_t) { cell.pending = 0; });
}

uint64_t accesses() { return statistics.shared_accesses + statistics.global_accesses; }

}  // namespace simt
