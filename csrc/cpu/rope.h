#pragma once

#include <cstdint>

namespace smolvla::cpu {

// y = [x1·cos - x2·sin, x2·cos + x1·sin] for the halves x1, x2 of every head
//   x  [batch, tokens, heads, head_dim]  T, contiguous
//   y  the same shape, T, with strides in elements for all but the last dimension: a slot of the cache; may be x itself,
//      else overlaps nothing
//   sin, cos  [batch, tokens, head_dim / 2]  float, the first dimension with a stride: 0 where samples share a table
// Products and sums in fp32, each rounded as torch rounds it, y rounded once: the reference's bits at every level.
struct Rope {
    const void* x;
    void* y;
    const float *sin, *cos;
    int64_t batch, tokens, heads, head_dim;
    int64_t y_strides[3];
    int64_t table_stride;
};

// T is float or bfloat16.
template <class T>
void rope(const Rope& a, int num_threads);

}  // namespace smolvla::cpu
