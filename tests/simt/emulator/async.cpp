// cp.async. The copy is done at once, at some later cp.async instruction of the thread, or only when the thread waits for
// it: the seed decides. From issue to wait nobody may touch the destination or change the source.
#include <cstring>

#include "emulator/ptx.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

void perform(AsyncCopy& copy) {
    copy.done = true;
    if (copy.wanted) std::memcpy(copy.to, copy.from, copy.wanted);
    std::memset(copy.to + copy.wanted, 0, copy.bytes - copy.wanted);
}

void perform_some(Thread& thread) {
    for (AsyncCopy& copy : thread.copies)
        if (!copy.done && draw(4) == 0) perform(copy);
}

}  // namespace

void begin_copy(void* shared, const void* global, unsigned bytes, unsigned wanted, void* site) {
    Thread& thread = *current;
    if (number(shared) % bytes || (wanted && number(global) % bytes))
        fail("misaligned cp.async: both addresses are multiples of " + std::to_string(bytes) + " bytes", site);
    if (wanted && thread.block->shared.holds(number(global)))
        fail("cp.async from shared memory; the source is in global memory", site);
    AsyncCopy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes, wanted, {}, false,
                   thread.group, site};
    if (wanted) {
        access(number(global), wanted, READ, Path::l2, site);
        std::memcpy(copy.source, copy.from, wanted);
    }
    begin_async_write(number(shared), bytes, site);
    ++statistics.async_copies;
    perform_some(thread);
    if (draw(3) == 0) perform(copy);
    thread.copies.push_back(copy);
}

void copy_async(void* shared, const void* global, bool wanted) {
    begin_copy(shared, global, 16, wanted ? 16 : 0, SMOLVLA_SIMT_SITE);
}

void copy_async_commit() {
    ++current->group;
    perform_some(*current);
}

void copy_async_wait(int pending) {
    pause();  // others may find the copies still under way
    end_copies(pending);
}

void end_copies(int pending) {
    Thread& thread = *current;
    size_t kept = 0;
    for (AsyncCopy& copy : thread.copies) {
        if (copy.group + static_cast<unsigned>(pending) >= thread.group) {
            thread.copies[kept++] = copy;
            continue;
        }
        if (copy.wanted) {
            // Read again, as late as it may be: a write since the issue is a race, or shows in the bytes.
            access(number(copy.from), copy.wanted, READ, Path::l2, copy.site);
            if (std::memcmp(copy.source, copy.from, copy.wanted))
                fail("the source of a cp.async changed while it was under way", copy.site);
        }
        if (!copy.done) perform(copy);
        end_async_write(number(copy.to), copy.bytes, copy.site);
    }
    thread.copies.resize(kept);
}

}  // namespace simt
