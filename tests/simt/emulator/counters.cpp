// Counters and other atomics in global memory, and what they order: a release publishes what the thread knows, an
// acquire takes it over. Atomics without either order nothing, but are no race among themselves.
#include <algorithm>

#include "emulator/ptx.h"
#include "emulator/runtime.h"

namespace simt {
namespace {

uintptr_t number(const void* at) { return reinterpret_cast<uintptr_t>(at); }

}  // namespace

Ref<Knowledge> publish(Thread& thread) {
    const dim3& grid = launch->shape.blocks;
    Ref<Knowledge> all(thread.remote ? new Knowledge(*thread.remote)
                                     : new Knowledge(size_t{grid.x} * grid.y * grid.z));
    Ref<Clock> own(new Clock(*thread.local));
    own->epochs[thread.index] = thread.epoch++;
    all->of[thread.block->number] = own;
    return all;
}

void learn(Thread& thread, const Ref<Knowledge>& news) {
    if (!news) return;
    thread.remote = join(thread.remote, news);
    thread.local = join(thread.local, news->of[thread.block->number]);
}

namespace {

void event() {
    ++launch->counter_events;
    launch->idle_rounds = 0;
    for (Thread* thread : launch->polling) make_ready(*thread);
    launch->polling.clear();
}

void touch_atomic(const void* at, size_t bytes, Kind kind, void* site) {
    access_aligned(number(at), bytes, kind, Path::l2, site);
}

// What comes before and after an atomic without an order of its own: fences give it one.
void order_by_fences(const void* at) {
    Thread& thread = *current;
    Ref<Knowledge>& counter = launch->counters[at];
    thread.unfenced = join(thread.unfenced, counter);
    counter = join(counter, thread.fenced);
}

float add_floats(uint32_t a, uint32_t b) { return bits<float>(a) + bits<float>(b); }

}  // namespace

void add_release(uint32_t* counter, uint32_t value) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    touch_atomic(counter, 4, ATOMIC_WRITE, site);
    Ref<Knowledge>& known = launch->counters[counter];
    known = join(known, publish(*current));
    *counter += value;
    ++statistics.counter_adds;
    event();
    pause();
}

uint32_t add_at_once(uint32_t* at, uint32_t value, bool ordered, void* site) {
    touch_atomic(at, 4, ATOMIC_WRITE, site);
    if (ordered) {
        Ref<Knowledge>& known = launch->counters[at];
        known = join(known, publish(*current));
        learn(*current, known);
    } else {
        order_by_fences(at);
    }
    const uint32_t before = *at;
    *at += value;
    ++statistics.atomics;
    return before;
}

uint32_t load_acquire(const uint32_t* counter) {
    Thread& thread = *current;
    void* site = SMOLVLA_SIMT_SITE;
    // A second look at a counter, with none changed since the first, would show the same: others first.
    if (thread.polled == counter && thread.polled_event == launch->counter_events) {
        launch->polling.push_back(&thread);
        wait(Waits::counter, 0, site);
    } else {
        pause();
    }
    ++statistics.counter_polls;
    touch_atomic(counter, 4, ATOMIC_READ, site);
    thread.polled = counter;
    thread.polled_event = launch->counter_events;
    const auto found = launch->counters.find(counter);
    if (found != launch->counters.end()) learn(thread, found->second);
    return *counter;
}

uint32_t atomic(void* address, uint32_t value, Atomic how, uint32_t compare) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    touch_atomic(address, 4, ATOMIC_WRITE, site);
    auto* at = static_cast<uint32_t*>(address);
    const uint32_t before = *at;
    switch (how) {
        case Atomic::add: *at = before + value; break;
        case Atomic::add_float: *at = bits<uint32_t>(add_floats(before, value)); break;
        case Atomic::exchange: *at = value; break;
        case Atomic::maximum: *at = std::max(before, value); break;
        case Atomic::minimum: *at = std::min(before, value); break;
        case Atomic::compare: *at = before == compare ? value : before; break;
    }
    order_by_fences(address);
    ++statistics.atomics;
    event();
    return before;
}

uint64_t atomic_wide(uint64_t* address, uint64_t value) {
    void* site = SMOLVLA_SIMT_SITE;
    pause();
    touch_atomic(address, 8, ATOMIC_WRITE, site);
    const uint64_t before = *address;
    *address = before + value;
    order_by_fences(address);
    ++statistics.atomics;
    event();
    return before;
}

void fence() {
    Thread& thread = *current;
    learn(thread, thread.unfenced);
    thread.unfenced = {};
    thread.fenced = publish(thread);
}

void load_past_l1(void* to, const void* from, size_t bytes) {
    access_aligned(number(from), bytes, READ, Path::l2, SMOLVLA_SIMT_SITE);
    std::memcpy(to, from, bytes);
}

void check_read_only(const void* from, size_t bytes) {
    access_aligned(number(from), bytes, READ, Path::read_only, SMOLVLA_SIMT_SITE);
}

}  // namespace simt
