#pragma once

#include <cstdint>

namespace smolvla::cpu {

// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias
//   x  [rows, width]  X      weight, bias  [width]  float      y  [rows, width]  Y, overlapping nothing
// Everything in fp32, y rounded once. X and Y are each float or bfloat16.
template <class X, class Y>
void layer_norm(const X* x, const float* weight, const float* bias, Y* y, int64_t rows, int64_t width, float eps,
                int num_threads);

}  // namespace smolvla::cpu
