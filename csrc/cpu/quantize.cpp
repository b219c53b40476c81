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

// The low bits of a number that kRounder was added to.
SMOLVLA_INLINE void narrow(int32_t bits, uint8_t* to) { *to = static_cast<uint8_t>(bits ^ 0x80); }
SMOLVLA_INLINE void narrow(int32_t bits, int16_t* to) { *to = static_cast<int16_t>(bits); }

constexpr int64_t stride(int64_t width, const uint8_t*) { return width; }
constexpr int64_t stride(int64_t width, const int16_t*) { return width + width % 2; }

template <class E>
SMOLVLA_INLINE void write_row(const float* v, int64_t width, int64_t row, IntegerRows<E> out) {
    constexpr float most = sizeof(E) == 1 ? kLargest : kLargest16, least = sizeof(E) == 1 ? kSmallest : kSmallest16;
    E* __restrict const data = out.data + row * stride(width, out.data);
    const int32_t bits = largest_bits(v, width);
    const float largest = float_of(bits);
    const bool finite = bits < 0x7f800000, some = finite && largest >= least;
    out.scale[row] = some ? largest / most : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = most / largest;
    if (some)
        for (int64_t i = 0; i < width; ++i) narrow(bits_of(v[i] * inverse + kRounder), data + i);
    else
        for (int64_t i = 0; i < width; ++i) narrow(0, data + i);
    for (int64_t i = width; i < stride(width, data); ++i) narrow(0, data + i);
}

template <class X, class E>
struct Rows {
    const X* x;
    const float *weight, *bias;
    IntegerRows<E> out;
    int64_t width;
    float eps;
};

template <Norm kNorm, class X, class E>
SMOLVLA_INLINE void quantize(const Rows<X, E>& a, int64_t begin, int64_t end) {
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
        write_row(v, a.width, row, a.out);
    }
}

// What a pass over sums reads and writes.
struct Pass {
    Sums a;
    const float *residual, *up;
    IntegerRows<uint8_t> out;
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
        if (p.out.data) write_row(v, width, row, p.out);
    }
}

template <Norm kNorm, class X, class E>
void quantize_baseline(const Rows<X, E>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}
template <Norm kNorm, class X, class E>
SMOLVLA_AVX2 void quantize_avx2(const Rows<X, E>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}
template <Norm kNorm, class X, class E>
SMOLVLA_AVX512 void quantize_avx512(const Rows<X, E>& a, int64_t begin, int64_t end) {
    quantize<kNorm>(a, begin, end);
}

template <Norm kNorm, class X, class E>
void all_rows(const Rows<X, E>& a, int64_t rows, int num_threads) {
    const auto run = pick(quantize_baseline<kNorm, X, E>, quantize_avx2<kNorm, X, E>, quantize_avx512<kNorm, X, E>);
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

template <class X, class E>
void quantize_rows(Norm norm, const X* x, const float* weight, const float* bias, IntegerRows<E> out, int64_t rows,
                   int64_t width, float eps, int num_threads) {
    const Rows<X, E> a{x, weight, bias, out, width, eps};
    switch (norm) {
        case Norm::none: return all_rows<Norm::none>(a, rows, num_threads);
        case Norm::layer: return all_rows<Norm::layer>(a, rows, num_threads);
        case Norm::rms: return all_rows<Norm::rms>(a, rows, num_threads);
    }
}

#define SMOLVLA_INSTANTIATE(X, E)                                                                                          \
    template void quantize_rows(Norm, const X*, const float*, const float*, IntegerRows<E>, int64_t, int64_t, float, int);
SMOLVLA_INSTANTIATE(float, uint8_t)
SMOLVLA_INSTANTIATE(bfloat16, uint8_t)
SMOLVLA_INSTANTIATE(float, int16_t)
SMOLVLA_INSTANTIATE(bfloat16, int16_t)
#undef SMOLVLA_INSTANTIATE

void finish_sums(const Sums& a, const float* residual, int num_threads) {
    all_sums({a, residual, nullptr, {nullptr, nullptr}}, num_threads);
}

void quantize_sums(const Sums& a, const float* up, IntegerRows<uint8_t> out, int num_threads) {
    all_sums({a, nullptr, up, out}, num_threads);
}

}  // namespace smolvla::cpu
