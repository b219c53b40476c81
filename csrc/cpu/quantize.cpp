// Memory bound: each operand passes once, and the passes over one row after that find it in L1. Bodies are plain C++ that
// a compiler makes vectors of, so that levels differ in their width alone.
#include "cpu/quantize.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/scratch.h"
#include "cpu/sum_row.h"

namespace smolvla::cpu {
namespace {

SMOLVLA_INLINE void write_row(const float* v, int64_t width, uint8_t* __restrict data, float* scale) {
    const int32_t bits = largest_bits(v, width);
    const float largest = float_of(bits);
    const bool finite = bits < 0x7f800000;
    if (!finite || largest < kSmallest) {
        *scale = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::memset(data, 128, width);
        return;
    }
    *scale = largest / kLargest;
    const float inverse = kLargest / largest;
    for (int64_t i = 0; i < width; ++i) data[i] = static_cast<uint8_t>(bits_of(v[i] * inverse + kRounder) ^ 0x80);
}

template <class X>
struct Rows {
    const X* x;
    const float *weight, *bias;
    Rows8 out;
    int64_t width;
    float eps;
};

template <Norm kNorm, class X>
SMOLVLA_INLINE void quantize(const Rows<X>& a, int64_t begin, int64_t end) {
    float* __restrict v = Scratch::reserve(a.width);
    const float width = static_cast<float>(a.width);
    for (int64_t row = begin; row < end; ++row) {
        const X* x = a.x + row * a.width;
        if constexpr (kNorm == Norm::none) {
            for (int64_t i = 0; i < a.width; ++i) v[i] = load(x + i);
        } else if constexpr (kNorm == Norm::layer) {
            const float mean = sum_row<false>(x, a.width, 0.0f) / width;
            const float scale = 1.0f / std::sqrt(sum_row<true>(x, a.width, mean) / width + a.eps);
            for (int64_t i = 0; i < a.width; ++i) v[i] = (load(x + i) - mean) * scale * a.weight[i] + a.bias[i];
        } else {
            const float scale = 1.0f / std::sqrt(sum_row<true>(x, a.width, 0.0f) / width + a.eps);
            for (int64_t i = 0; i < a.width; ++i) v[i] = load(x + i) * scale * a.weight[i];
        }
        write_row(v, a.width, a.out.data + row * a.width, a.out.scale + row);
    }
}

// x / (1 + exp(-z)): z = x for silu, and gelu's tanh is a logistic function of twice its argument.
template <Activation kActivation>
SMOLVLA_INLINE float activate(float x) {
    if constexpr (kActivation == Activation::none) return x;
    float z = x;
    if constexpr (kActivation == Activation::gelu_tanh) z = x * (1.59576912161f + 0.07135481627f * (x * x));
    return x / (1.0f + power_of_two(z * -1.44269504f));
}

// What a pass over sums reads and writes.
struct Pass {
    Sums a;
    const float *residual, *up;
    Rows8 out;
};

template <Activation kActivation, bool kBias>
SMOLVLA_INLINE void activate_row(const Sums& a, int64_t row) {
    float* __restrict v = a.sums + row * a.width;
    const float scale = a.scale[row];
    for (int64_t i = 0; i < a.width; ++i) v[i] = activate<kActivation>(kBias ? v[i] * scale + a.bias[i] : v[i] * scale);
}

template <Activation kActivation>
SMOLVLA_INLINE void pass(const Pass& p, int64_t begin, int64_t end) {
    const int64_t width = p.a.width;
    for (int64_t row = begin; row < end; ++row) {
        float* __restrict v = p.a.sums + row * width;
        if (p.a.bias) activate_row<kActivation, true>(p.a, row);
        else activate_row<kActivation, false>(p.a, row);
        if (p.residual)
            for (int64_t i = 0; i < width; ++i) v[i] += p.residual[row * width + i];
        if (p.up) {
            const float scale = p.a.scale[row];
            for (int64_t i = 0; i < width; ++i) v[i] *= p.up[row * width + i] * scale;
        }
        if (p.out.data) write_row(v, width, p.out.data + row * width, p.out.scale + row);
    }
}

template <Norm kNorm, class X>
void quantize_baseline(const Rows<X>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}
template <Norm kNorm, class X>
SMOLVLA_AVX2 void quantize_avx2(const Rows<X>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}
template <Norm kNorm, class X>
SMOLVLA_AVX512 void quantize_avx512(const Rows<X>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}

template <Norm kNorm, class X>
void all_rows(const Rows<X>& a, int64_t rows, int num_threads) {
    const auto run = pick(quantize_baseline<kNorm, X>, quantize_avx2<kNorm, X>, quantize_avx512<kNorm, X>);
    parallel_rows(rows, a.width, num_threads, [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

template <Activation kActivation>
void pass_baseline(const Pass& p, int64_t begin, int64_t end) {
    pass<kActivation>(p, begin, end);
}
template <Activation kActivation>
SMOLVLA_AVX2 void pass_avx2(const Pass& p, int64_t begin, int64_t end) {
    pass<kActivation>(p, begin, end);
}
template <Activation kActivation>
SMOLVLA_AVX512 void pass_avx512(const Pass& p, int64_t begin, int64_t end) {
    pass<kActivation>(p, begin, end);
}

template <Activation kActivation>
void all_sums(const Pass& p, int num_threads) {
    const auto run = pick(pass_baseline<kActivation>, pass_avx2<kActivation>, pass_avx512<kActivation>);
    parallel_rows(p.a.rows, p.a.width, num_threads, [&](int64_t begin, int64_t end) { run(p, begin, end); });
}

void all_sums(const Pass& p, int num_threads) {
    switch (p.a.activation) {
        case Activation::none: return all_sums<Activation::none>(p, num_threads);
        case Activation::silu: return all_sums<Activation::silu>(p, num_threads);
        case Activation::gelu_tanh: return all_sums<Activation::gelu_tanh>(p, num_threads);
    }
}

}  // namespace

template <class X>
void quantize_rows(Norm norm, const X* x, const float* weight, const float* bias, Rows8 out, int64_t rows, int64_t width,
                   float eps, int num_threads) {
    const Rows<X> a{x, weight, bias, out, width, eps};
    switch (norm) {
        case Norm::none: return all_rows<Norm::none>(a, rows, num_threads);
        case Norm::layer: return all_rows<Norm::layer>(a, rows, num_threads);
        case Norm::rms: return all_rows<Norm::rms>(a, rows, num_threads);
    }
}

template void quantize_rows(Norm, const float*, const float*, const float*, Rows8, int64_t, int64_t, float, int);
template void quantize_rows(Norm, const bfloat16*, const float*, const float*, Rows8, int64_t, int64_t, float, int);

void finish_sums(const Sums& a, const float* residual, int num_threads) {
    all_sums({a, residual, nullptr, {nullptr, nullptr}}, num_threads);
}

void quantize_sums(const Sums& a, const float* up, Rows8 out, int num_threads) {
    all_sums({a, nullptr, up, out}, num_threads);
}

}  // namespace smolvla::cpu
