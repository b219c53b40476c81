#pragma once

#include <array>
#include <cstdint>

#include "cuda/dtype.h"

namespace smolvla::cuda {

// Strides are in elements: batch, token or key, head; of the mask batch, token, key. Elements of a head are contiguous.
struct MaskedAttention {
    const void *q, *k, *v;    // [batch, tokens, heads, head_dim], twice [batch, keys, kv_heads, head_dim]
    DType q_dtype, kv_dtype;  // bfloat16 | float16; the same or float32
    const uint8_t* mask;      // [batch, tokens, keys]
    void* out;                // [batch, tokens, heads, head_dim], contiguous, dtype of q, overlapping nothing
    std::array<int64_t, 3> q_strides, k_strides, v_strides, mask_strides;
    int batch, tokens, heads, head_dim, keys, kv_heads;
    bool dependent;  // may begin while the launch ahead still runs, from sm_90 on
};

// softmax(q * k^T / sqrt(head_dim), where mask) * v. Alignment: see AttentionArgs in attention_args.cuh; heads
// is a multiple of kv_heads, head_dim a multiple of 8 up to 128, nothing is empty. Equal bits in every run.
void masked_attention(const MaskedAttention& p, void* stream);

}  // namespace smolvla::cuda
