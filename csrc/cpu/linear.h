#pragma once

#include <cstdint>

namespace smolvla::cpu {

enum class Activation : int { none = 0, silu = 1, gelu_tanh = 2 };

// y = activation(h·weightᵀ + bias) + residual, or with a second weight  y = activation(h·weightᵀ + bias) · (h·up_weightᵀ);
// h = x, or with a norm weight  h = norm_weight · x / sqrt(mean(x²) + eps)
//   x  [rows, inputs]                       X           norm_weight  [inputs]         float
//   weight, up_weight  [outputs, inputs]    T           bias  [outputs]               T
//   residual, y  [rows, outputs]            Out
// All contiguous; up_weight, norm_weight, bias and residual may be null; y may be the residual itself and nothing else.
// Weights are read as they lie, once per block of rows. In fp32 at the levels baseline and avx2, for 16 outputs or
// more, more than 64 rows have them packed and 48 to 64 are packed themselves. h is rounded to T where x is not T
// already or is normalised; sums and epilogue are fp32 and y is rounded once. At the levels avx512_bf16 and neon_bf16
// subnormal bf16 operands count as zero. The additions of an output have one order, whatever the number of threads and
// of rows, with one exception: in fp32 at the levels baseline and avx2 fewer than 48 rows, and up to four at the end of
// 48 to 64, are summed in lanes.
// Each of X, T, Out is float or bfloat16, neither X nor Out narrower than T.
struct Linear {
    const void *x, *norm_weight, *weight, *up_weight, *bias, *residual;
    void* y;
    int64_t rows, inputs, outputs;
    Activation activation;
    float eps;
};

template <class X, class T, class Out>
void linear(const Linear& a, int num_threads);

}  // namespace smolvla::cpu
