#pragma once

#include <cstdint>

#include "cpu/linear.h"

namespace smolvla::cpu {

// Rows of integers with a scale each, of 8 bits (zero 128, largest 127) or 16 (zero 0, largest 3344), and what stands before and behind a product of them.
//   data[row, i] = zero + round(v[row, i] · (largest / max|v[row, :]|)), ties to even   scale[row] = max|v[row, :]| / largest
// A row whose largest magnitude is below `smallest`, where largest / it would overflow, counts as zeros: data zero, scale 0.
// A row with an infinity or a NaN has scale NaN and data zero, so that all it is multiplied with becomes NaN.
// All contiguous; data and scale overlap nothing. Everything in fp32, in one order and without contraction: equal bits at
// every level.
template <class E>
struct IntegerRows {
    E* data;       // [rows, width]; of 16 bits [rows, width + width % 2], zero behind the last
    float* scale;  // [rows]
};

enum class Norm : int { none = 0, layer = 1, rms = 2 };

// v = x, or x normalised: layer  (x - mean(x)) / sqrt(var(x) + eps) · weight + bias,  rms  x / sqrt(mean(x²) + eps) · weight
//   x  [rows, width]  X: float or bfloat16      weight, bias  [width]  float, null where the norm has none
template <class X, class E>
void quantize_rows(Norm norm, const X* x, const float* weight, const float* bias, IntegerRows<E> out, int64_t rows,
                   int64_t width, float eps, int num_threads);

// What the integer product left, made into numbers: v = activation(sums · scale + bias).
//   sums  [rows, width]  integer sums times the scales of the weight's rows      scale  [rows]  of the other operand
//   bias  [width], null where there is none
struct Sums {
    float* sums;
    const float *scale, *bias;
    Activation activation;
    int64_t rows, width;
};

// sums <- v, or residual [rows, width] + v.
void finish_sums(const Sums& a, const float* residual, int num_threads);

// out <- v as rows of 8 bits, or with up: (v · up·scale); both sums are used up as scratch.
void quantize_sums(const Sums& a, const float* up, IntegerRows<uint8_t> out, int num_threads);

}  // namespace smolvla::cpu
