// LayerNorm in three passes over a row that stays in L1: the mean, the squares around it, the product. Centring before
// squaring costs a pass and keeps the variance of a row whose mean is large. Memory bound: x is read once from memory and
// y written once, already in the dtype of the matrix product that reads it.
#include "cpu/layer_norm.h"

#include <cmath>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/sum_row.h"

namespace smolvla::cpu {
namespace {

template <class X, class Y>
struct Rows {
    const X* x;
    const float *weight, *bias;
    Y* y;
    int64_t width;
    float eps;
};

template <class X, class Y>
SMOLVLA_INLINE void normalise_rows(const Rows<X, Y>& a, int64_t begin, int64_t end) {
    const float width = static_cast<float>(a.width);
    for (int64_t row = begin; row < end; ++row) {
        const X* x = a.x + row * a.width;
        Y* __restrict y = a.y + row * a.width;
        const float mean = sum_row<false>(x, a.width, 0.0f) / width;
        const float scale = 1.0f / std::sqrt(sum_row<true>(x, a.width, mean) / width + a.eps);
        for (int64_t column = 0; column < a.width; ++column)
            store(y + column, (load(x + column) - mean) * scale * a.weight[column] + a.bias[column]);
    }
}

template <class X, class Y>
void rows_baseline(const Rows<X, Y>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}
template <class X, class Y>
SMOLVLA_AVX2 void rows_avx2(const Rows<X, Y>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}
template <class X, class Y>
SMOLVLA_AVX512 void rows_avx512(const Rows<X, Y>& a, int64_t begin, int64_t end) {
    normalise_rows(a, begin, end);
}

}  // namespace

template <class X, class Y>
void layer_norm(const X* x, const float* weight, const float* bias, Y* y, int64_t rows, int64_t width, float eps,
                int num_threads) {
    const Rows<X, Y> a{x, weight, bias, y, width, eps};
    const auto run = pick(rows_baseline<X, Y>, rows_avx2<X, Y>, rows_avx512<X, Y>);
    parallel_rows(rows, width, num_threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

template void layer_norm(const float*, const float*, const float*, float*, int64_t, int64_t, float, int);
template void layer_norm(const float*, const float*, const float*, bfloat16*, int64_t, int64_t, float, int);
template void layer_norm(const bfloat16*, const float*, const float*, bfloat16*, int64_t, int64_t, float, int);

}  // namespace smolvla::cpu
