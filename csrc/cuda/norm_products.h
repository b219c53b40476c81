#pragma once

#include <cstddef>
#include <cstdint>

namespace smolvla::cuda {

// Rows that were prepared for a norm, ops/next_norm.py: x * norm weight, and parts of the sums of x^2.
struct PreparedRows {
    const void* x;         // [rows, inputs] bf16, contiguous; inputs is a multiple of 8
    const float* squares;  // [parts, rows]
    int rows, inputs, parts;
    float eps;
    bool dependent;        // may begin while the launch ahead still runs
    bool weights_settled;  // no launch ahead writes the weights
};

struct NormSwiglu : PreparedRows {
    const void *gate, *up;             // [outputs, inputs] bf16; outputs is even
    int64_t gate_stride, up_stride;    // of rows, in elements, multiples of 8
    void* y;                           // [rows, outputs] bf16
    int outputs;
};

struct NormQkvRope : PreparedRows {
    const void *q_weight, *k_weight, *v_weight;  // [heads * head_dim, inputs] bf16; q or both others may be null
    int64_t q_stride, k_stride, v_stride;        // of rows, in elements, multiples of 8
    const float *sin, *cos;                      // [batch or 1, tokens, half]
    void* q;                                     // [rows, q_heads, head_dim] bf16
    void *k, *v;  // [batch, tokens, kv_heads, head_dim], heads side by side, strides even
    bool fp32_slots;  // k and v are fp32, else bf16
    int tokens, q_heads, kv_heads, half;  // half = head_dim / 2, even
    int64_t rope_batch_stride, slot_batch_stride, slot_stride;  // in elements; the first is 0 where all samples share it
};

// Of what there is code for; smolvla_fast/ops/cuda/prepared_rows.py asks for no more.
constexpr int kNormProductsMostInputs = 1024;
// Shared memory of a block, at most; and clusters of such blocks that the current device runs at once, 0 where there is no
// code for them.
size_t norm_products_shared_bytes();
int norm_products_clusters();

// With h = x / sqrt(sum of squares / inputs + eps):  y = silu(h * gate^T) * (h * up^T), rounded once.
void norm_swiglu(const NormSwiglu& p, void* stream);
// q = rope(h * q_weight^T), k = rope(h * k_weight^T), v = h * v_weight^T, each rounded once.
void norm_qkv_rope(const NormQkvRope& p, void* stream);

}  // namespace smolvla::cuda
