// The vectors of aarch64; simd.h says what each name means and includes this.
#pragma once

#include <arm_neon.h>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"

namespace smolvla::cpu {

struct Neon : NoPairs {
    static constexpr int kWidth = 4;
    static constexpr int kTileVectors = 4, kRegisters = 32;
    using V = float32x4_t;

    static SMOLVLA_INLINE V broadcast(float x) { return vdupq_n_f32(x); }
    static SMOLVLA_INLINE V load(const float* p) { return vld1q_f32(p); }
    static SMOLVLA_INLINE V load(const bfloat16* p) {
        return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
    }
    static SMOLVLA_INLINE void store(float* p, V v) { vst1q_f32(p, v); }
    static SMOLVLA_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
    static SMOLVLA_INLINE V sum_each(const V* v) {
        return vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
    }
    static SMOLVLA_INLINE void transpose(V* v) {
        const V a = vtrn1q_f32(v[0], v[1]), b = vtrn2q_f32(v[0], v[1]);
        const V c = vtrn1q_f32(v[2], v[3]), d = vtrn2q_f32(v[2], v[3]);
        const auto wide = [](V x) { return vreinterpretq_f64_f32(x); };
        v[0] = vreinterpretq_f32_f64(vtrn1q_f64(wide(a), wide(c)));
        v[1] = vreinterpretq_f32_f64(vtrn1q_f64(wide(b), wide(d)));
        v[2] = vreinterpretq_f32_f64(vtrn2q_f64(wide(a), wide(c)));
        v[3] = vreinterpretq_f32_f64(vtrn2q_f64(wide(b), wide(d)));
    }
    static SMOLVLA_INLINE V max(V a, V b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
    static SMOLVLA_INLINE V min(V a, V b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
    static SMOLVLA_INLINE V fraction(V t, V& whole) {
        whole = vrndmq_f32(vmaxq_f32(t, broadcast(kLeastExponent)));
        return vsubq_f32(t, whole);
    }
    static SMOLVLA_INLINE V scale(V p, V whole, V t) {
        const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(whole), vdupq_n_s32(127)), 23);
        const V scaled = vmulq_f32(p, vreinterpretq_f32_s32(exponent));
        return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(scaled), vcltq_f32(t, broadcast(kLeastExponent))));
    }
};

#if SMOLVLA_NEON_EXTENSIONS
// Pairs of bf16 as words, for attention's panels, and blocks of two rows by two pairs, for linear. Products treat subnormals
// as zero and round their sums to odd.
#define SMOLVLA_NEON_BF16_INLINE SMOLVLA_NEON_BF16 SMOLVLA_INLINE
struct NeonBf16 : Neon {
    static SMOLVLA_NEON_BF16_INLINE V dot_pairs(V a, V b, V c) {
        __asm__("bfdot %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    static constexpr bool kBlocks = true;
    // to[i] is half i of a, then half i of b. Of two rows, each is a block.
    static SMOLVLA_NEON_BF16_INLINE void join_halves(V a, V b, V* to) {
        const auto wide = [](V x) { return vreinterpretq_f64_f32(x); };
        to[0] = vreinterpretq_f32_f64(vzip1q_f64(wide(a), wide(b)));
        to[1] = vreinterpretq_f32_f64(vzip2q_f64(wide(a), wide(b)));
    }
    // Lane 2i + j of c grows by row i of block a times row j of block b.
    static SMOLVLA_NEON_BF16_INLINE V dot_blocks(V a, V b, V c) {
        __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    // 2·kWidth values as kWidth words, in order.
    static SMOLVLA_NEON_BF16_INLINE V to_pairs(V low, V high) {
        V pairs;
        __asm__("bfcvtn %0.4h, %1.4s" : "=w"(pairs) : "w"(low));
        __asm__("bfcvtn2 %0.8h, %1.4s" : "+w"(pairs) : "w"(high));
        return pairs;
    }
};
#endif

}  // namespace smolvla::cpu
