// Residual add and RMSNorm in two passes over a row that stays in L1: the sum of squares, then the product.
// Memory bound: x and residual are read once from memory, y and r written once. The second pass adds x + residual
// again instead of reading r back, which costs one add and keeps the bits that rounding r would lose.
#include "cpu/add_rms_norm.h"

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
    const T *x, *residual, *weight;
    T *y, *r;
    int64_t width;
    float eps;
};

template <bool kResidual, class T>
SMOLVLA_INLINE float sum_at(const Rows<T>& a, int64_t i) {
    return kResidual ? load(a.x + i) + load(a.residual + i) : load(a.x + i);
}

template <bool kResidual, class T>
SMOLVLA_INLINE void normalise_rows(const Rows<T>& a, int64_t begin, int64_t end) {
    const int64_t width = a.width, blocked = width - width % kLanes;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t first = row * width;
        float squares[kLanes] = {};
        for (int64_t column = 0; column < blocked; column += kLanes) {
#pragma omp simd
            for (int lane = 0; lane < kLanes; ++lane) {
                const float sum = sum_at<kResidual>(a, first + column + lane);
                squares[lane] += sum * sum;
            }
        }
        for (int64_t column = blocked; column < width; ++column) {
            const float sum = sum_at<kResidual>(a, first + column);
            squares[column - blocked] += sum * sum;
        }
        for (int half = kLanes / 2; half > 0; half /= 2)
            for (int lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
        const float scale = 1.0f / std::sqrt(squares[0] / static_cast<float>(width) + a.eps);

        T* __restrict y = a.y;
        T* __restrict r = a.r;
        for (int64_t column = 0; column < width; ++column) {
            const float sum = sum_at<kResidual>(a, first + column);
            if (kResidual) store(r + first + column, sum);
            store(y + first + column, sum * scale * load(a.weight + column));
        }
    }
}

template <bool kResidual, class T>
void rows_baseline(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows<kResidual>(a, begin, end);
}
template <bool kResidual, class T>
SMOLVLA_AVX2 void rows_avx2(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows<kResidual>(a, begin, end);
}
template <bool kResidual, class T>
SMOLVLA_AVX512 void rows_avx512(const Rows<T>& a, int64_t begin, int64_t end) {
    normalise_rows<kResidual>(a, begin, end);
}

template <bool kResidual, class T>
void all_rows(const Rows<T>& a, int64_t rows, int num_threads) {
    const auto run = pick(rows_baseline<kResidual, T>, rows_avx2<kResidual, T>, rows_avx512<kResidual, T>);
    parallel_rows(rows, a.width, num_threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

}  // namespace

template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* y, T* r, int64_t rows, int64_t width, float eps,
                  int num_threads) {
    const Rows<T> a{x, residual, weight, y, r, width, eps};
    residual ? all_rows<true>(a, rows, num_threads) : all_rows<false>(a, rows, num_threads);
}

template void add_rms_norm(const float*, const float*, const float*, float*, float*, int64_t, int64_t, float, int);
template void add_rms_norm(const bfloat16*, const bfloat16*, const bfloat16*, bfloat16*, bfloat16*, int64_t, int64_t,
                           float, int);

}  // namespace smolvla::cpu
