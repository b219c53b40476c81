#pragma once

#include <cstdint>

#include "cpu/linear.h"

namespace smolvla::cpu {

// y = activation(p + bias) + residual, or with a second weight  y = activation(p) · up_p, both products
//   p[row, out] = (Σ_B float(Σ_{i in B} x[row, i]·weight[out, i]))·scale[out]·x_scale[row]
// over blocks B of kInt16Sum inputs, first to last. Sums of a block are exact: no operand is above kLargest16, so none leaves
// 32 bits. The rest is fp32 in one order without contraction: equal bits at every level, for any number of threads and rows.
//   x  [rows, words, 2], words = ceil(inputs / 2), zero behind the last input      x_scale  [rows]
//   weight, up_weight  [ceil(outputs / kInt16Panel), words, kInt16Panel, 2]
//   scale, up_scale, bias  [outputs]      residual, y  [rows, outputs]
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
