// Rounding to integers, powers of two and activations, in plain C++ that a compiler makes vectors of: equal bits at every
// level.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/linear.h"

namespace smolvla::cpu {

constexpr float kLargest = 127.0f, kLargest16 = 3344.0f;
constexpr float kSmallest = 0x1p-119f, kSmallest16 = 0x1p-116f;
// 1.5·2^23: a number added to it is rounded to an integer, which stands in the low bits of the sum.
constexpr float kRounder = 12582912.0f;

SMOLVLA_INLINE int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
SMOLVLA_INLINE float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Magnitudes compare like their bits, and any NaN is above infinity there: it cannot be lost in a maximum.
SMOLVLA_INLINE int32_t largest_bits(const float* v, int64_t width) {
    int32_t largest = 0;
    for (int64_t i = 0; i < width; ++i) {
        const int32_t bits = bits_of(v[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// 2^t: 2^n is written into the exponent, 2^f on [-1/2, 1/2] is Taylor's series to the 7th power, 6e-9 off. Beyond the
// exponents of fp32 it is infinite above; below, where 1 + 2^t is 1 all the same, it stays at 2^-126.
SMOLVLA_INLINE float power_of_two(float t) {
    const float low = t > -126.0f ? t : -126.0f, clamped = low < 127.0f ? low : 127.0f;
    const float shifted = clamped + kRounder, f = clamped - (shifted - kRounder);
    float p = 1.5252734e-5f;
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const float power = p * float_of(static_cast<int32_t>((static_cast<uint32_t>(bits_of(shifted)) + 127u) << 23));
    return t > 127.0f ? std::numeric_limits<float>::infinity() : power;
}

// x / (1 + exp(-z)): z = x for silu, and gelu's tanh is a logistic function of twice its argument.
template <Activation kActivation>
SMOLVLA_INLINE float activate(float x) {
    if constexpr (kActivation == Activation::none) return x;
    float z = x;
    if constexpr (kActivation == Activation::gelu_tanh) z = x * (1.59576912161f + 0.07135481627f * (x * x));
    return x / (1.0f + power_of_two(z * -1.44269504f));
}

}  // namespace smolvla::cpu
