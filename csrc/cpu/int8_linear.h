#pragma once

#include <cstdint>

#include "cpu/linear.h"
#include "cpu/quantize.h"

namespace smolvla::cpu {

// Weights [outputs, inputs] of 8 bits as tiles read them: panels of 32 outputs, each
//   [32] int32  -128 times the sum of an output's weights, as x's zero is 128
//   [steps of 64 inputs][2][16 words of 4 inputs][16 outputs]  zeros behind the last
constexpr int64_t kInt8Panel = 32, kInt8Step = 64;
int64_t int8_panel_bytes(int64_t inputs);
void pack_int8_panels(const int8_t* weight, int8_t* panels, int64_t outputs, int64_t inputs);

// v[row, out] = activation(x_scale[row]·scale[out]·Σ_i (x[row, i] - 128)·weight[out, i] + bias[out]), plus the residual or
// times the like of up_weight, without bias and activation; to y, or to out as rows of 8 bits. Without x_scale y is the sum
// times scale. Equal bits for any number of threads, and to int8_matmul.h and quantize.h one after the other.
//   x  [rows, inputs]      weight, up_weight  panels      scale, up_scale  [outputs]      x_scale  [rows]
//   bias  [outputs], residual  [rows, outputs], null where there is none      y  [rows, outputs]: also scratch, unless null
//   up_sums  [rows, outputs]: scratch where there is up_weight, unless y is null
// y may be null or the residual itself only where `int8_rows_fit`: there a thread finishes whole rows in scratch of its own.
struct Int8Linear {
    const uint8_t* x;
    const float* x_scale;
    const int8_t *weight, *up_weight;
    const float *scale, *up_scale, *bias, *residual;
    float *y, *up_sums;
    IntegerRows<uint8_t> out;
    int64_t rows, inputs, outputs;
    Activation activation;
};

// Whether there are rows enough to hand whole rows to so many threads.
bool int8_rows_fit(int64_t rows, int num_threads);
// Throws where the level in use is not AMX.
void int8_linear(const Int8Linear& a, int num_threads);

}  // namespace smolvla::cpu
