#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace smolvla::cuda {

struct LinearResidual {
    const void *x, *weight;  // [rows, inputs], [outputs, inputs] bf16; rows and strides in multiples of 16 bytes
    const void* residual;    // [rows, outputs] fp32 or bf16, as y
    void* y;
    // What the norm behind y reads, with null for its weight where none is prepared: [outputs] fp32 or bf16,
    // [rows, outputs] bf16, [column tiles, rows].
    const void* norm_weight;
    void* next_rows;
    float* next_squares;
    bool fp32_stream, fp32_norm;
    int64_t x_stride, weight_stride, residual_stride;  // of rows, in elements
    int rows, inputs, outputs;
    bool dependent;       // may begin while the launch ahead still runs
    bool weight_settled;  // no launch ahead writes the weight
};

// Columns of a tile: y * norm_weight and the sum of squares of a row are of so many.
constexpr int kLinearResidualCols = 64;

// How many clusters the current device runs at once; 0: it has no clusters of eight blocks, or the library no code for them.
int linear_residual_clusters();

// y = residual + x * weight^T, rounded once; next_rows = y * norm_weight and next_squares = sums of y^2, of the rounded y.
void linear_residual(const LinearResidual& p, void* stream);

}  // namespace smolvla::cuda
