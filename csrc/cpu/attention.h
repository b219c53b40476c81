#pragma once

#include <cstdint>
#include <vector>

namespace smolvla::cpu {

// out = softmax(q·kᵀ·scale, where mask) · v; query head h uses kv head h / (heads / kv_heads).
//   q     [batch, queries, heads, head_dim]      k, v  [batch, keys, kv_heads, head_dim]
//         strides in elements over the first three dimensions, the last one contiguous
//   mask  null, or [batch, queries, keys] bytes with any strides; a row that sees nothing averages all keys alike
//   out   [batch, queries, heads, head_dim] contiguous
//   only  null, or the pairs (batch, kv head) to compute, numbered batch·kv_heads + kv head
// T is float or bfloat16. Scores, softmax and sums are fp32. With bf16, the levels avx512_bf16 and neon_bf16 round the
// probabilities to bf16 and treat subnormal inputs as zero; the other levels widen to fp32. Threads never share a row, so
// their number does not change a bit. Scratch is kept per thread: 2·keys·head_dim words for one head and a block of score
// rows.
struct Attention {
    const void *q, *k, *v;
    const uint8_t* mask;
    void* out;
    int64_t batch, queries, keys, heads, kv_heads, head_dim;
    int64_t q_strides[3], k_strides[3], v_strides[3], mask_strides[3];
    float scale;
    const int64_t* only = nullptr;
};

template <class T>
void attention(const Attention& a, int num_threads);

// The same of fp32 for some of the pairs (batch, kv head).
void attention_of_heads(Attention a, const std::vector<int64_t>& heads, int num_threads);

}  // namespace smolvla::cpu
