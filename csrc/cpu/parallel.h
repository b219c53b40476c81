// Splits rows over OpenMP threads. Without OpenMP the calling thread does all of them.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace smolvla::cpu {

// Waking a thread costs some microseconds, in which a core handles about this many elements of a row-wise op.
constexpr int64_t kElementsPerThread = 16 * 1024;

// body(begin, end) for disjoint ranges that cover [0, rows). At most num_threads run, and fewer when work is short.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, int num_threads, const Body& body) {
    [[maybe_unused]] const int64_t useful = rows * width / kElementsPerThread;
    [[maybe_unused]] const int threads =
        static_cast<int>(std::clamp<int64_t>(std::min(useful, rows), 1, std::max(num_threads, 1)));
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            // The runtime may grant fewer threads than asked for, so the split follows what came.
            const int64_t parts = omp_get_num_threads(), part = omp_get_thread_num();
            body(rows * part / parts, rows * (part + 1) / parts);
        }
        return;
    }
#endif
    body(0, rows);
}

}  // namespace smolvla::cpu
