#pragma once

#include <cstdint>

namespace smolvla::cpu {

// r = x + residual;  y = r / sqrt(mean(r^2) + eps) * weight
//   x, residual, y, r  [rows, width], contiguous, T      weight  [width], T
// A null residual means r = x: then r is not written and may be null. y and r must not overlap the inputs.
// Sums and products in fp32; y is made from the unrounded sum, so each output is rounded once.
// T is float or bfloat16.
template <class T>
void add_rms_norm(const T* x, const T* residual, const T* weight, T* y, T* r, int64_t rows, int64_t width, float eps,
                  int num_threads);

}  // namespace smolvla::cpu
