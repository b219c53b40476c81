#pragma once

#include "cpu/attention.h"

namespace smolvla::cpu {

// Attention of fp32 q, k, v in 8-bit integers (SageAttention, arXiv 2410.02367, with finer probabilities):
//   q8[t] = round(q[t] / sq[t]),  k8[s] = round((k[s] - mean(k)) / sk[s])      sq, sk = largest magnitude of the row / 127
//   score[t, s] = (q8[t]·k8[s])·sk[s]·(sq[t]·scale)                            the mean adds the same to all scores of a row
//   p8[t, s] = round(255·2^(log2(e)·(score[t, s] - m[t, B]))),  m the largest score of t in B, s's block of 64 keys
//   v8[s, d] = round(v[s, d] / sv[B, d])                                       sv = largest magnitude of the block / 127
//   out[t] = Σ_B w[t, B]·sv[B]·(p8[t, B]·v8[B]) / Σ_B w[t, B]·Σ p8[t, B],      w[t, B] = e^(m[t, B] - max_B m[t, B])
// Integer sums are exact at every level, what is fp32 runs in one order without contraction: equal bits at every level and
// for any number of threads. Mask and rows that see nothing as in Attention.
//
// Each kv head with its queries is measured first, in fp32, by the scores of about 16 evenly spaced queries, all query heads
// of its group together, with every key that they see; of the query heads the largest counts:
//   spread [batch, kv_heads]  standard deviation of the scores of a row, root mean square over rows
//   error  [batch, kv_heads]  standard deviation of what rounding q and k to 8 bits does to an output, over the values'
// Both are NaN where an operand is not finite. A head whose error is not finite and at most `limit`, and every head of
// head_dim above kMostInt8Dim, is computed by attention_of_heads. With out null nothing is computed but these two.
constexpr int64_t kMostInt8Dim = 256;
void int8_attention(const Attention& a, float limit, float* error, float* spread, int num_threads);

}  // namespace smolvla::cpu
