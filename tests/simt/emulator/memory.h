// What may be touched and by whom it was: bounds, and for every four bytes the accesses that nothing has superseded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt {

enum Kind : uint32_t { READ, WRITE, ATOMIC_READ, ATOMIC_WRITE };
// How a read comes to its bytes: through L1, past it, or through the read-only path.
enum class Path { l1, l2, read_only };

struct Entry {
    uint32_t epoch;
    uint32_t who;   // thread id << 6 | which of the four bytes << 2 | kind
    uint32_t site;  // the instruction, counted from the start of the module
    uint32_t thread() const { return who >> 6; }
    unsigned bytes() const { return who >> 2 & 15; }
    Kind kind() const { return static_cast<Kind>(who & 3); }
};
constexpr uint32_t thread_id(unsigned block, unsigned index) { return block << 10 | index; }
constexpr unsigned block_of(uint32_t id) { return id >> 10; }
constexpr unsigned index_of(uint32_t id) { return id & 1023; }

// The shadow of four bytes. Most hold one write and a few reads; `more` is a longer list elsewhere.
struct Cell {
    static constexpr unsigned FEW = 3;
    Entry few[FEW];
    uint32_t more;
    uint16_t count;
    uint8_t written;  // bytes of shared memory that hold something
    uint8_t pending;  // a copy that nobody has waited for writes here
};

struct Thread;

// Shared memory of one block; what lies beside it belongs to nobody.
class Shared {
public:
    void prepare(size_t bytes);
    bool holds(uintptr_t at) const { return at - low < bytes; }
    Cell* cell(uintptr_t at) { return &cells_[(at - low) >> 2]; }

    uintptr_t low = 0;
    size_t bytes = 0;

private:
    std::vector<unsigned char> memory_;
    std::vector<Cell> cells_;
};

// settled: no launch ahead writes there, so that a dependent one may read it before these have ended
void allow(uintptr_t low, size_t bytes, bool settled = false);
bool is_settled(uintptr_t at, size_t bytes);
void forget_allowed();
void end_of_launch();  // shadows are dropped; what was allowed goes with the next allow()
bool allowed(uintptr_t low, size_t bytes);

// A checked access of the running thread; returns at once outside a kernel.
void access(uintptr_t at, size_t bytes, Kind kind, Path path, void* site);
void access_aligned(uintptr_t at, size_t bytes, Kind kind, Path path, void* site);
// Of another block's shared memory.
void touch_shared_of(Shared& shared, uintptr_t at, size_t bytes, Kind kind, void* site);

// The destination of a cp.async: written by the thread, and nobody's until it has waited.
void begin_async_write(uintptr_t at, size_t bytes, void* site);
void end_async_write(uintptr_t at, size_t bytes, void* site);
// Of a bulk copy to a block, which others than its thread may end.
void begin_remote_write(Shared& shared, uintptr_t at, size_t bytes, void* site);
void end_remote_write(Shared& shared, uintptr_t at, size_t bytes);

uint64_t accesses();
// Set around a store of the bytes that are there: threads that hold copies of a value may store it at one instruction.
extern bool writes_again;
extern uint64_t unbroken_accesses;  // since another thread ran

}  // namespace simt
