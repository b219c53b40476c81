// Memory bound: x is read once and y written once, into the cache slot where there is one. The tables of a token serve all
// its heads while they are in L1.
#include "cpu/rope.h"

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace smolvla::cpu {
namespace {

template <class T>
SMOLVLA_INLINE void rotate(const Rope& a, int64_t begin, int64_t end) {
    const int64_t half = a.head_dim / 2;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / a.tokens, t = row % a.tokens;
        const float* const sin = a.sin + b * a.table_stride + t * half;
        const float* const cos = a.cos + b * a.table_stride + t * half;
        const T* x = static_cast<const T*>(a.x) + row * a.heads * a.head_dim;
        T* y = static_cast<T*>(a.y) + b * a.y_strides[0] + t * a.y_strides[1];
        for (int64_t h = 0; h < a.heads; ++h, x += a.head_dim, y += a.y_strides[2]) {
            // In place, an iteration writes what it alone has read, so they may run side by side.
#pragma omp simd
            for (int64_t i = 0; i < half; ++i) {
                const float x1 = load(x + i), x2 = load(x + half + i);
                store(y + i, x1 * cos[i] - x2 * sin[i]);
                store(y + half + i, x2 * cos[i] + x1 * sin[i]);
            }
        }
    }
}

template <class T>
void rotate_baseline(const Rope& a, int64_t begin, int64_t end) {
    rotate<T>(a, begin, end);
}
template <class T>
SMOLVLA_AVX2 void rotate_avx2(const Rope& a, int64_t begin, int64_t end) {
    rotate<T>(a, begin, end);
}
template <class T>
SMOLVLA_AVX512 void rotate_avx512(const Rope& a, int64_t begin, int64_t end) {
    rotate<T>(a, begin, end);
}

}  // namespace

template <class T>
void rope(const Rope& a, int num_threads) {
    const auto run = pick(rotate_baseline<T>, rotate_avx2<T>, rotate_avx512<T>);
    parallel_rows(a.batch * a.tokens, a.heads * a.head_dim, num_threads,
                  [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

template void rope<float>(const Rope&, int);
template void rope<bfloat16>(const Rope&, int);

}  // namespace smolvla::cpu
