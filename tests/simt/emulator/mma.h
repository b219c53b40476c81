#pragma once

#include <cstdint>

namespace simt {

float widen_fp16(uint16_t bits);

// d += a · b. The products of 16-bit floats are exact in fp64; they are added up in fp64 in the order of k, then d, and
// the sum is rounded once to fp32. Tensor cores round more often, and in an order that is not documented.
void multiply_tile(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]);

}  // namespace simt
