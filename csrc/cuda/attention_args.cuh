// What attention_tile.cuh is asked: where queries, keys, values and output lie, and which keys a token sees.
#pragma once

#include "cuda/ptx.cuh"

namespace smolvla::cuda {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionRows = 16;  // of an mma
constexpr int kAttentionWarps = kAttentionThreads / 32;

// In elements. Elements of a head are contiguous; `row` is the step to the next token or key.
struct AttentionStrides {
    int64_t batch, row, head;
};

// Q: bf16 | fp16. KV: the same, or float, which is computed in fp32's exponent range and 16 bits of its mantissa.
template <class Q, class KV>
struct AttentionArgs {
    const Q* q;   // [batch, tokens, heads, head_dim]; 4-byte aligned, strides even
    const KV* k;  // [batch, keys, kv heads, head_dim]; k and v 16-byte aligned, strides multiples of 16 bytes
    const KV* v;
    Q* out;  // [batch, tokens, heads * head_dim], 8-byte aligned, strides multiples of 4; overlaps nothing
    // Key s < masked_keys is seen by token t where mask[batch, t, s] is not 0; a stride of 0 gives all tokens one row.
    // Keys from masked_keys on are the tokens' own: seen by token t where s - masked_keys <= t. A row that sees no key
    // weighs all its keys alike.
    const uint8_t* mask;
    AttentionStrides q_strides, k_strides, v_strides;
    int64_t out_batch_stride, out_token_stride, mask_batch_stride, mask_token_stride, mask_key_stride;
    int tokens, keys, masked_keys;  // keys >= 1
    int group, head_dim;            // head_dim: a multiple of 8, at most HEAD_DIM
    float scale_log2;               // log2(e) / sqrt(head_dim)
};

}  // namespace smolvla::cuda
