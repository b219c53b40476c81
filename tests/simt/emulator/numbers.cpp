// Conversions between fp32 and 16-bit floats, and the product of two small matrices.
#include <cmath>
#include <cstring>

#include "emulator/mma.h"
#include "emulator/ptx.h"

namespace simt {

uint16_t round_to_bf16(float x) {
    const auto from = bits<uint32_t>(x);
    if (std::isnan(x)) return 0x7fff;  // the NaN that cvt gives
    return static_cast<uint16_t>((from + 0x7fff + (from >> 16 & 1)) >> 16);
}

uint16_t round_to_fp16(float x) {
    const auto from = bits<uint32_t>(x);
    const uint32_t sign = from >> 16 & 0x8000, magnitude = from & 0x7fffffff;
    if (magnitude > 0x7f800000) return 0x7fff;
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from halfway above the largest
    if (magnitude < 0x38800000) {
        // Below the smallest normal number values lie 2^-24 apart; the addition rounds to nearest even.
        const float at = bits<float>(magnitude) + 0.5f;
        return static_cast<uint16_t>(sign | (bits<uint32_t>(at) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

float widen_fp16(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) {
        const float value = static_cast<float>(magnitude) * 0x1p-24f;
        return sign ? -value : value;
    }
    return bits<float>(sign | ((magnitude << 13) + 0x38000000));
}

#if defined(__x86_64__)
// The bits do not depend on which one runs: a product is exact, so a fused multiply-add rounds as the two would.
__attribute__((target_clones("avx512f", "avx2,fma", "default")))
#endif
void multiply_tile(const float (&a)[16][16], const float (&b)[16][8], float (&d)[16][8]) {
    double wide[16][8];
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) wide[k][j] = b[k][j];
    for (int i = 0; i < 16; ++i) {
        double sum[8] = {};
        for (int k = 0; k < 16; ++k)
            for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(a[i][k]) * wide[k][j];
        for (int j = 0; j < 8; ++j) d[i][j] = static_cast<float>(sum[j] + d[i][j]);
    }
}

}  // namespace simt
