// The inside of the emulator: threads, warps, blocks, one launch, and the scheduler. One launch at a time, on one host
// thread; `current` is the kernel's thread that runs now, null outside a kernel.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/cuda.h"
#include "emulator/fiber.h"
#include "emulator/memory.h"

namespace simt {

constexpr unsigned LANES = 32;
constexpr unsigned BARRIERS = 16;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_BLOCKS = 1 << 16;
constexpr unsigned MAX_CLUSTER = 8;

struct Block;
struct Warp;

enum class Waits { nothing, block_barrier, named_barrier, collective, counter, cluster_barrier, copies };
enum class Collective { shuffle, ballot, warp_barrier, ldmatrix, ldmatrix_trans, mma_bf16, mma_fp16 };

// A copy of up to 16 bytes under way. The bytes of the source are kept: nobody may change them before the copy is done.
struct AsyncCopy {
    unsigned char* to;
    const unsigned char* from;
    unsigned bytes, wanted;  // what is not wanted becomes zeros
    uint64_t source[2];
    bool done;  // copied already, though nobody may count on that
    unsigned group;
    void* site;
};

struct Thread {
    Fiber fiber;
    unsigned char* stack = nullptr;
    Block* block = nullptr;
    Warp* warp = nullptr;
    unsigned index = 0, lane = 0;  // in the block, in the warp
    uint3 position{};
    uint32_t id = 0;     // block and index, as shadow entries name it
    uint32_t epoch = 1;  // grows whenever others may learn of what was done so far
    Ref<Clock> local;    // of the threads of its block; its own entry is `epoch`, not what stands there
    Ref<Knowledge> remote, fenced, unfenced;  // of other blocks; published by a fence; read by atomics, not yet fenced
    Ref<Knowledge> made_barriers;  // what others may know of barriers of copies that it made

    bool exited = false;
    Waits waits = Waits::nothing;
    unsigned waits_for = 0;  // which barrier or collective
    void* site = nullptr;    // where it waits
    uint32_t result = 0;     // of a collective
    const uint32_t* polled = nullptr;
    uint64_t polled_event = 0;
    std::vector<AsyncCopy> copies;
    unsigned group = 0;  // that the next copy belongs to
    uint64_t cluster_phase = 0;  // of its cluster's barrier, in which it arrived
    bool cluster_arrived = false, awaited = false;  // and has not waited yet; has met griddepcontrol.wait

    bool knows(const Entry& entry) const;
};

// Lanes that meet in one warp instruction.
struct Meeting {
    struct Lane {
        uint32_t value = 0, operand = 0;
        int width = 0;
        Shuffle how = Shuffle::index;
        void* out = nullptr;
        const void* in = nullptr;
    };
    Collective what;
    unsigned mask, arrived = 0;
    Lane lanes[LANES];
};

struct Warp {
    Block* block = nullptr;
    Thread* lanes[LANES] = {};
    unsigned present = 0, exited = 0, ready = 0;
    int slot = -1;  // among the warps that have something to run
    unsigned at_barrier[BARRIERS] = {};
    std::vector<Meeting> meetings;
};

struct Barrier {
    unsigned expected = 0;
    bool plain = false;  // __syncthreads
    std::vector<Warp*> complete;
    unsigned waiting = 0;
};

struct Block {
    unsigned number = 0;
    uint3 position{};
    Shared shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[BARRIERS];
    unsigned alive = 0;
};

struct ClusterBarrier {
    unsigned expected = 0, arrived = 0;
    uint64_t phase = 0;
    Ref<Knowledge> gathered, published;
    std::vector<Thread*> waiting;
};

// Counts the bytes of bulk copies, once.
struct CopyBarrier {
    uint32_t maker;  // the thread
    bool published = false, expected = false, complete = false;
    int64_t bytes = 0;  // still to come, of those expected
    Ref<Knowledge> known{};
    std::vector<Thread*> waiting{};
};

struct BulkCopy {
    Block* block;  // that it goes to
    uintptr_t to;
    const unsigned char* from;  // null of a store
    std::vector<unsigned char> source;  // as it was when the copy began
    uintptr_t barrier;
    const Block* begun_by;
    Ref<Knowledge> known;
    void* site;
};

// A copy that is done, as its target knows; the block that began it knows when its cluster's barrier is of this phase.
struct DoneCopy {
    const Block* begun_by;
    uint64_t known_in;
    void* site;
};

struct Statistics {
    uint64_t blocks, threads, switches, block_barriers, named_barriers, warp_barriers, collectives, mma, ldmatrix;
    uint64_t async_copies, counter_adds, counter_polls, atomics, shared_accesses, global_accesses, global_bytes_read,
        global_bytes_written;
};

struct Settings {
    uint64_t seed = 0;
    int multiprocessors = 8, blocks_per_multiprocessor = 1, compute_capability = 80;
    size_t shared_bytes_per_block = 163 * 1024;
    bool cooperative = true;
};

struct Launch {
    std::string name;
    Shape shape;
    void (*call)(const void*);
    const void* body;
    size_t body_bytes;
    uint64_t random;
    std::deque<std::unique_ptr<Block>> blocks;  // alive
    std::vector<std::unique_ptr<Block>> idle;   // finished, to be used again
    std::vector<Warp*> ready;
    Warp* turn = nullptr;  // the warp that goes on until its turn is over
    unsigned turn_left = 0;
    std::vector<Thread*> polling;  // parked until a counter changes
    uint64_t counter_events = 0, idle_rounds = 0, idle_rounds_in_all = 0, accesses_when_idle = 0;
    std::unordered_map<const void*, Ref<Knowledge>> counters;
    std::unordered_map<unsigned, ClusterBarrier> clusters;
    std::unordered_map<uintptr_t, CopyBarrier> copy_barriers;
    std::vector<BulkCopy> bulk_copies;  // under way
    std::vector<DoneCopy> done_copies;  // between two blocks
    Fiber host;
    Block* finished = nullptr;
    std::string error;
    // Of a launch without fibers, whose sites are numbers and not addresses: what they stand for. Its errors are thrown.
    std::string (*place_of)(uint32_t) = nullptr;
};

extern Thread* current;
extern Launch* launch;
extern Settings settings;
extern Statistics statistics;

// Ends the launch: an error of the running thread, or of `thread`. Outside a kernel it throws.
[[noreturn]] void fail(const std::string& what, void* site, const Thread* thread = nullptr);
std::string name_of(const Thread& thread);
std::string name_of(uint32_t id);
std::string source_line(void* site);  // " at file:line", or nothing where binutils are missing

uint64_t draw(uint64_t below);
void make_ready(Thread& thread);
// Runs others; the caller has seen to it that somebody makes it ready again.
void wait(Waits what, unsigned which, void* site);
void pause();  // stays ready
std::string deadlock_report();

// Of the running thread: a cp.async from its issue to its wait, and an atomic addition, which gives what was there before.
void begin_copy(void* shared, const void* global, unsigned bytes, unsigned wanted, void* site);
void copy_async_commit();
void end_copies(int pending);
uint32_t add_at_once(uint32_t* at, uint32_t value, bool ordered, void* site);

// The participants know, from here on, all that each of them knew.
void meet(const std::vector<Thread*>& participants);
void arrive_at_exit(Thread& thread);
// All that the thread knows, its own doings included, which are of an epoch that ends here; and what it hears of others.
Ref<Knowledge> publish(Thread& thread);
void learn(Thread& thread, const Ref<Knowledge>& news);
ClusterBarrier& cluster_barrier_of(const Block& block);
void check_exit(Thread& thread);  // of clusters and dependent launches
Block& block_of_rank(int rank, void* site);  // of the running thread's cluster
void check_copies_are_over();  // of the running thread's block, which ends

#define SMOLVLA_SIMT_SITE __builtin_extract_return_addr(__builtin_return_address(0))

}  // namespace simt
