// Deals rows out to threads: OpenMP's where the compiler has it, which are torch's, else those of thread_pool.h.
//
// Nothing is split beforehand. A thread takes the next range when it is done with its last one, so a slow core, one that
// another process holds, or a thread that never comes costs the others no more than one range. A row's result does not
// depend on who computes it, so neither does the whole. A call from inside a body gets no threads of its own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#if !defined(_OPENMP)
#include "cpu/thread_pool.h"
#endif

namespace smolvla::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Waking a thread costs some microseconds, in which a core handles about this many elements of a row-wise op.
constexpr int64_t kElementsPerThread = 16 * 1024;

// What is left of [0, rows), handed out in ranges that get shorter towards the end: half a fair share of what is left, in
// whole multiples of `coarse` while it is that much, then of `fine`. Nobody with at least half the speed of the others is
// then more than one range of `fine` behind them at the end.
class Ranges {
public:
    Ranges(int64_t rows, int threads, int64_t fine, int64_t coarse)
        : rows_(rows), parts_(2 * threads), fine_(std::max<int64_t>(fine, 1)), coarse_(std::max(coarse, fine_)) {}

    // Whether there was a range left; it is [begin, end) then.
    bool next(int64_t& begin, int64_t& end) {
        begin = next_.load(std::memory_order_relaxed);
        do {
            if (begin >= rows_) return false;
            const int64_t share = (rows_ - begin) / parts_, unit = share >= coarse_ ? coarse_ : fine_;
            end = std::min(begin + std::max(share - share % unit, unit), rows_);
        } while (!next_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
        return true;
    }

    // Where the next range will begin, for what is fetched early; another thread may take it before.
    int64_t upcoming() const { return next_.load(std::memory_order_relaxed); }

    // The first exception of a body, kept for the caller: it may not leave a thread. What is left is not handed out.
    void fail(std::exception_ptr error) {
        if (!failed_.exchange(true)) error_ = std::move(error);
        next_.store(rows_, std::memory_order_relaxed);
    }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

private:
    const int64_t rows_, parts_, fine_, coarse_;
    std::atomic<int64_t> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;
};

// Runs `call` on this thread and up to threads - 1 others, and returns when all have.
template <class Call>
void on_threads(int threads, const Call& call) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
    call();
#else
    ThreadPool::here().run(threads - 1, call);
#endif
}

// body(ranges) on at most num_threads threads, fewer when work is short; each takes ranges until there are none, of `fine`
// rows or what is a quarter of a fair share, if that is less. `width` elements of a row-wise op are about as much work as a
// row. Throws what a body has thrown.
template <class Body>
void parallel_ranges(int64_t rows, int64_t width, int64_t fine, int64_t coarse, int num_threads, const Body& body) {
    const int64_t useful = rows * width / kElementsPerThread;
    const int threads = static_cast<int>(std::clamp<int64_t>(std::min(useful, rows), 1, std::max(num_threads, 1)));
    if (threads == 1) {
        Ranges all(rows, 1, rows, rows);
        return body(all);
    }
    Ranges ranges(rows, threads, std::min(fine, rows / (4 * threads)), coarse);
    on_threads(threads, [&] {
        try {
            body(ranges);
        } catch (...) {
            ranges.fail(std::current_exception());
        }
    });
    ranges.rethrow();
}

// body(begin, end) for disjoint ranges that cover [0, rows), none so short that handing it out would show.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, int num_threads, const Body& body) {
    const int64_t fine = kElementsPerThread / (4 * std::max<int64_t>(width, 1)) + 1;
    parallel_ranges(rows, width, fine, fine, num_threads, [&](Ranges& ranges) {
        for (int64_t begin, end; ranges.next(begin, end);) body(begin, end);
    });
}

}  // namespace smolvla::cpu
