// The sum over a row that norms need.
#pragma once

#include <cstdint>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"

namespace smolvla::cpu {

// A fixed number of partial sums fixes the order of additions, so all instruction levels agree to the bit.
constexpr int kLanes = 16;

// Sum over the row of (x - centre), or of its square.
template <bool kSquare, class X>
SMOLVLA_INLINE float sum_row(const X* x, int64_t width, float centre) {
    const int64_t blocked = width - width % kLanes;
    float sums[kLanes] = {};
    for (int64_t column = 0; column < blocked; column += kLanes) {
#pragma omp simd
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = load(x + column + lane) - centre;
            sums[lane] += kSquare ? value * value : value;
        }
    }
    for (int64_t column = blocked; column < width; ++column) {
        const float value = load(x + column) - centre;
        sums[column - blocked] += kSquare ? value * value : value;
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    return sums[0];
}

}  // namespace smolvla::cpu
