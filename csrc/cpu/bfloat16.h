// bf16 is the upper half of an fp32. Integer arithmetic on purpose: the AVX512-BF16 conversion flushes subnormals to
// zero, torch does not, and every level must give the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/dispatch.h"

namespace smolvla::cpu {

struct bfloat16 {
    uint16_t bits;
};

SMOLVLA_INLINE float load(const float* p) { return *p; }

SMOLVLA_INLINE float load(const bfloat16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

SMOLVLA_INLINE void store(float* p, float value) { *p = value; }

// Round to nearest, ties to even. Rounding a NaN up could carry it into infinity, so it is replaced by the quiet one.
SMOLVLA_INLINE void store(bfloat16* p, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

}  // namespace smolvla::cpu
