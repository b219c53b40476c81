#include "emulator/runtime.h"

#include <algorithm>
#include <stdexcept>

namespace simt {

Thread* current = nullptr;
Launch* launch = nullptr;
Settings settings;
Statistics statistics;

namespace {

Stacks stacks;
// How long nothing may happen but polling before it counts as a deadlock.
constexpr uint64_t IDLE_ROUNDS = 4, IDLE_ROUNDS_IN_ALL = 100000;

// splitmix64
uint64_t next_random() {
    uint64_t z = launch->random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

void leave_to_host() {
    Thread* self = current;
    current = nullptr;
    switch_fiber(self->fiber, launch->host);
}

// A warp is drawn, then one of its lanes, again and again until its turn is over: so one warp runs far ahead of the
// others now and then, which drawing among all threads would hardly ever give.
Thread* next_thread() {
    Launch& run = *launch;
    if (run.ready.empty()) {
        if (run.polling.empty()) return nullptr;
        // Who waits for a counter may do other work between two looks at it; then the looks themselves decide nothing.
        const uint64_t others = accesses() - statistics.counter_polls;
        if (others != run.accesses_when_idle) run.idle_rounds = 0;
        run.accesses_when_idle = others;
        if (++run.idle_rounds > IDLE_ROUNDS || ++run.idle_rounds_in_all > IDLE_ROUNDS_IN_ALL) return nullptr;
        for (Thread* thread : run.polling) make_ready(*thread);
        run.polling.clear();
    }
    if (!run.turn || !run.turn->ready || !run.turn_left) {
        run.turn = run.ready[draw(run.ready.size())];
        run.turn_left = 1u << draw(10);
    }
    --run.turn_left;
    Warp& warp = *run.turn;
    unsigned left = warp.ready;
    for (auto skip = draw(static_cast<uint64_t>(__builtin_popcount(left))); skip; --skip) left &= left - 1;
    const auto lane = static_cast<unsigned>(__builtin_ctz(left));
    warp.ready &= ~(1u << lane);
    if (!warp.ready) {
        run.ready[static_cast<size_t>(warp.slot)] = run.ready.back();
        run.ready.back()->slot = warp.slot;
        run.ready.pop_back();
        warp.slot = -1;
    }
    return warp.lanes[lane];
}

void resume_another() {
    Thread* self = current;
    Thread* next = next_thread();
    unbroken_accesses = 0;
    if (next == self) return;
    if (!next) {
        leave_to_host();
        return;
    }
    ++statistics.switches;
    current = next;
    next->waits = Waits::nothing;
    switch_fiber(self->fiber, next->fiber);
}

// Kernels throw nothing: an exception would end the process, for nobody stands below on this stack.
void thread_main() {
    launch->call(launch->body);
    Thread& self = *current;
    for (const AsyncCopy& copy : self.copies)
        fail("the thread ends with a cp.async that was never waited for", copy.site);
    check_exit(self);
    self.exited = true;
    self.warp->exited |= 1u << self.lane;
    arrive_at_exit(self);
    if (--self.block->alive == 0) {
        check_copies_are_over();
        launch->finished = self.block;
        leave_to_host();
    }
    resume_another();
    __builtin_unreachable();
}

void start_block(unsigned number) {
    Launch& run = *launch;
    std::unique_ptr<Block> block;
    if (run.idle.empty()) {
        block = std::make_unique<Block>();
    } else {
        block = std::move(run.idle.back());
        run.idle.pop_back();
    }
    const dim3 &grid = run.shape.blocks, &size = run.shape.threads;
    const unsigned count = size.x * size.y * size.z;
    block->number = number;
    block->position = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    block->shared.prepare(run.shape.shared_bytes);
    block->threads = std::vector<Thread>(count);
    block->warps = std::vector<Warp>((count + LANES - 1) / LANES);
    for (Barrier& barrier : block->barriers) barrier = {};
    block->alive = count;
    const Ref<Clock> nothing(new Clock(count));
    for (Warp& warp : block->warps) warp.block = block.get();
    for (unsigned i = 0; i < count; ++i) {
        Thread& thread = block->threads[i];
        thread.index = i;
        thread.lane = i % LANES;
        thread.block = block.get();
        thread.warp = &block->warps[i / LANES];
        thread.warp->lanes[thread.lane] = &thread;
        thread.warp->present |= 1u << thread.lane;
        thread.position = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        thread.id = thread_id(number, i);
        thread.local = nothing;
        thread.stack = stacks.take();
        prepare(thread.fiber, thread.stack, thread_main);
        make_ready(thread);
    }
    ++statistics.blocks;
    statistics.threads += count;
    run.clusters[number / run.shape.cluster].expected += count;
    run.blocks.push_back(std::move(block));
}

void retire(Block* finished) {
    Launch& run = *launch;
    for (Thread& thread : finished->threads) stacks.give_back(thread.stack);
    const auto found = std::find_if(run.blocks.begin(), run.blocks.end(),
                                    [&](const std::unique_ptr<Block>& block) { return block.get() == finished; });
    run.turn = nullptr;  // it may have been a warp of this block
    run.idle.push_back(std::move(*found));
    run.blocks.erase(found);
}

void check_shape(const std::string& name, const Shape& shape) {
    const auto refuse = [&](const std::string& why) { throw std::runtime_error(name + ": launch refused, " + why); };
    const uint64_t threads = uint64_t{shape.threads.x} * shape.threads.y * shape.threads.z;
    const uint64_t blocks = uint64_t{shape.blocks.x} * shape.blocks.y * shape.blocks.z;
    if (!threads || threads > MAX_THREADS) refuse(std::to_string(threads) + " threads a block; accepted are 1 to 1024");
    if (!blocks || blocks > MAX_BLOCKS) refuse(std::to_string(blocks) + " blocks; the emulator takes 1 to 65536");
    if (shape.shared_bytes > settings.shared_bytes_per_block)
        refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory; a block has at most " +
               std::to_string(settings.shared_bytes_per_block));
    if ((shape.cluster > 1 || shape.dependent) && settings.compute_capability < 90)
        refuse("clusters and dependent launches begin with compute capability 9.0");
    if (!shape.cluster || shape.cluster > MAX_CLUSTER || shape.blocks.x % shape.cluster)
        refuse("clusters of " + std::to_string(shape.cluster) + " of " + std::to_string(shape.blocks.x) +
               " blocks; accepted is what divides them, up to 8");
    int fit = 0;
    max_active_blocks(&fit, static_cast<int>(threads), shape.shared_bytes);
    if (shape.cooperative && blocks > static_cast<uint64_t>(fit) * static_cast<uint64_t>(settings.multiprocessors))
        refuse("too many blocks in cooperative launch: " + std::to_string(blocks) + ", at once run " +
               std::to_string(fit * settings.multiprocessors));
}

}  // namespace

uint64_t draw(uint64_t below) { return (static_cast<unsigned __int128>(next_random()) * below) >> 64; }

void make_ready(Thread& thread) {
    Warp& warp = *thread.warp;
    warp.ready |= 1u << thread.lane;
    if (warp.slot >= 0) return;
    warp.slot = static_cast<int>(launch->ready.size());
    launch->ready.push_back(&warp);
}

void wait(Waits what, unsigned which, void* site) {
    current->waits = what;
    current->waits_for = which;
    current->site = site;
    resume_another();
}

void pause() {
    make_ready(*current);
    resume_another();
}

void run(const char* name, const Shape& shape, void (*call)(const void*), const void* body, size_t body_bytes) {
    check_shape(name, shape);
    if (launch) throw std::runtime_error(std::string(name) + ": launched inside another launch");
    const unsigned blocks = shape.blocks.x * shape.blocks.y * shape.blocks.z;
    Launch run{};
    run.name = name;
    run.shape = shape;
    run.call = call;
    run.body = body;
    run.body_bytes = body_bytes;
    run.random = settings.seed * 0x2545f4914f6cdd1du + 1;
    launch = &run;
    statistics = {};
    unbroken_accesses = 0;
    const unsigned cluster = shape.cluster, clusters = blocks / cluster;
    std::vector<unsigned> order(clusters);
    for (unsigned i = 0; i < clusters; ++i) order[i] = i;
    for (unsigned i = clusters; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
    // Clusters of an ordinary launch may not count on one another: few are there at once, and how many is drawn.
    const size_t at_once = shape.cooperative ? blocks : (1 + draw(4)) * cluster;
    unsigned started = 0;
    try {
        while (run.error.empty()) {
            for (; started < clusters && run.blocks.size() + cluster <= at_once; ++started)
                for (unsigned rank = 0; rank < cluster; ++rank) start_block(order[started] * cluster + rank);
            if (run.blocks.empty()) break;
            Thread* first = next_thread();
            run.finished = nullptr;
            if (first) {
                current = first;
                first->waits = Waits::nothing;
                switch_fiber(run.host, first->fiber);
                current = nullptr;
            }
            if (run.finished)
                retire(run.finished);
            else if (run.error.empty())
                run.error = deadlock_report();
        }
    } catch (const std::exception& error) {
        run.error = error.what();
    }
    for (const auto& block : run.blocks)
        for (Thread& thread : block->threads)
            if (thread.stack) stacks.give_back(thread.stack);
    end_of_launch();
    launch = nullptr;
    current = nullptr;
    if (!run.error.empty()) throw std::runtime_error(run.error);
}

uint3 thread_index() { return current->position; }
uint3 block_index() { return current->block->position; }
dim3 block_size() { return launch->shape.threads; }
dim3 grid_size() { return launch->shape.blocks; }
unsigned char* shared_memory() { return reinterpret_cast<unsigned char*>(current->block->shared.low); }
void yield() {
    if (current) pause();
}
void trap() { fail("__trap()", SMOLVLA_SIMT_SITE); }

bool Thread::knows(const Entry& entry) const {
    const unsigned other = block_of(entry.thread()), thread = index_of(entry.thread());
    if (other == block->number) return local->epochs[thread] >= entry.epoch;
    return remote && remote->of[other] && remote->of[other]->epochs[thread] >= entry.epoch;
}

}  // namespace simt
