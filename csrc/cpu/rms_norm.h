#pragma once

#include <cstdint>

namespace smolvla::cpu {

// y = x / sqrt(mean(x^2) + eps) * weight
//   x, y  [rows, width], contiguous, T      weight  [width], T
// y must not overlap the inputs. Sums and products in fp32, one rounding. T is float or bfloat16.
template <class T>
void rms_norm(const T* x, const T* weight, T* y, int64_t rows, int64_t width, float eps, int num_threads);

}  // namespace smolvla::cpu
