#pragma once

#include <cstdint>

#include "cpu/linear.h"

namespace smolvla::cpu {

// y = activation(s·sumsᵀ + bias) + residual, or with a second weight  y = activation(s·sums + bias) · (s·up_sums):
//   sums[row, out] = Σ_B float(Σ_{i in B} x[row, i]·weight[out, i]),   B: blocks of kInt16Sum inputs, first to last
//   s[row, out]    = scale[out]·x_scale[row]
// No sum over a block leaves 32 bits, as no operand is above kLargest16: all but the additions of blocks is exact. Everything
// else is fp32 in one order without contraction: equal bits at every level, for any number of threads and of rows.
//   x  [rows, words, 2]   zero behind the last input      weight, up_weight  [ceil(outputs / kInt16Panel), words, kInt16Panel, 2]
//   x_scale  [rows]       scale, up_scale, bias  [outputs]      residual, y  [rows, outputs]      words = ceil(inputs / 2)
// All contiguous; up_weight, bias and residual may be null; y may be the residual itself and nothing else.
constexpr int64_t kInt16Sum = 192, kInt16Panel = 32;
struct Int16Linear {
    const int16_t* x;
    const float* x_scale;
    const int16_t *weight, *up_weight;
    const float *scale, *up_scale, *bias, *residual;
    float* y;
    int64_t rows, words, outputs;
    Activation activation;
};

void int16_linear(const Int16Linear& a, int num_threads);

}  // namespace smolvla::cpu
