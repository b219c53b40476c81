// RMSNorm in two passes over a row that stays in L1: the sum of squares, then the product.
// Memory bound: x is read once from memory, y written once.
#include "cpu/rms_norm.h"

#include <cmath>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace smolvla::cpu {
namespace {

// Independent partial sums: one 512-bit vector, two of 256, four of 128. Fixing the number fixes the order of
// additions, so all levels agree to the bit.
constexpr int kLanes = 16;

template <class T>
struct Rows {
    const T *x, *weight;
    T* y;
    int64_t width;
    float eps;
};

template <class T>
SMOLVLA_INLINE void normalise_rows(const Rows<T>& a, int64_t begin, int64_t end) {
    const int64_t width = a.width, blocked = width - width % kLanes;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * width;
        float squares[kLanes] = {};
        for (int64_t column = 0; column < blocked; column += kLanes) {
#pragma omp simd
            for (int lane = 0; lane < kLanes; ++lane) {
                const float x = load(a.x + first + column + lane);
                squares[lane] += x * x;
            }
        }
        for (int64_t column = blocked; column < width; ++column) {
            const float x = load(a.x + first + column);
            squares[column - blocked] += x * x;
        }
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
        const float scale = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + a.eps);

        T* __restrict y = a.y;
        for (int64_t column = 0; column < width; ++column) {
            const float x = load(a.x + first + column);
            store(y + first + column, x * scale * load(a.weight + column));
        }
    }
}

template <class T>
void rows_baseline(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}
template <class T>
SMOLVLA_AVX2 void rows_avx2(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}
template <class T>
SMOLVLA_AVX512 void rows_avx512(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}

template <class T>
void all_rows(const Rows<T>& a, int64_t rows, int num_threads) {
    const auto run = pick(rows_baseline<T>, rows_avx2<T>, rows_avx512<T>);
    parallel_rows(rows, a.width, num_threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace

template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int num_threads) {
    all_rows(Rows<T>{x, weight, y, width, eps}, rows, num_threads);
}

template void rms_norm(const float*, const float*, float*, int64_t, int64_t, float, int);
template void rms_norm(const bfloat16*, const bfloat16*, bfloat16*, int64_t, int64_t, float, int);

}  // namespace smolvla::cpu
