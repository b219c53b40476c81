#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace smolvla::cuda {

struct EulerStep {
    const void *h, *norm_weight, *out_weight, *out_bias;  // [rows, width], [width], [actions, width], [actions]
    DType h_dtype, norm_dtype, weight_dtype, bias_dtype;  // each a float
    const float* x;                                       // [rows, actions]
    // Guidance, with null for previous where there is none; the strides are in elements.
    const float* previous;  // [batch, tokens, actions]
    const float* weights;   // [tokens]
    const float* strength;  // one number
    int64_t previous_batch_stride, previous_token_stride, previous_action_stride, weights_stride;
    float *new_x, *v;  // [rows, actions], overlapping nothing
    int rows, tokens, width, actions;
    float eps, dt, time;
};

// v = rms_norm(h) * out_weight^T + out_bias;  v -= strength * ((previous - (x - time * v)) * weights) if guided;
// new_x = x + dt * v. All in fp32; equal bits whatever the alignment.
void euler_step(const EulerStep& p, void* stream);

}  // namespace smolvla::cuda
