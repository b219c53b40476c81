#pragma once

#include <cstdint>

namespace smolvla::cpu {

// sums[row, out] = scale[out] · Σ_i (data[row, i] - 128) · weight[out, i]: the products of quantize.h's rows.
//   data  [rows, inputs]      weight  [outputs, inputs]      scale  [outputs]      sums  [rows, outputs]
// All contiguous. The sums are exact in 32 bits for inputs below 2^17, then rounded once to fp32 and once by the scale:
// equal bits at every level and for any number of threads.
struct Int8Matmul {
    const uint8_t* data;
    const int8_t* weight;
    const float* scale;
    float* sums;
    int64_t rows, inputs, outputs;
};

void int8_matmul(const Int8Matmul& a, int num_threads);

}  // namespace smolvla::cpu
