// Vectors for the compute-bound kernels: one struct per instruction level, the same names in each.
//
// A *word* is the 32 bits that one multiply-add lane consumes: an fp32, or a pair of adjacent bf16. Words travel as
// float; moving them never changes their bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"

#if defined(__x86_64__) && !defined(SMOLVLA_EMULATED)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about the "undefined" operands inside its own AVX-512 header, wherever it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace smolvla::cpu {

// 2^f on [0, 1) as 1 + f·(c0 + c1·f + ...): minimax in relative error, exact at 0 so that the largest weight is 1.
// Degree 6 stays within 1.1 units of 2^-24; degree 4 (2.9e-6) is for results that are rounded to bf16 (2e-3).
constexpr float kExp2Degree6[] = {0.6931470632553101f,   0.2402293086051941f,    0.055485282093286514f,
                                  0.009675451554358006f, 0.0012467846972867846f, 0.00021612914861179888f};
constexpr float kExp2Degree4[] = {0.6930448412895203f, 0.241280198097229f, 0.052242472767829895f,
                                  0.013426683843135834f};

// The least exponent of a power of two that is made by shifting bits.
constexpr float kLeastExponent = -126.0f;

// Rows of a register tile whose row has a struct's kTileVectors: they, one row of the right operand and a broadcast fit the
// registers.
constexpr int kTileRows = 6;

// Named, never called, at levels that cannot multiply pairs or blocks of them, so that the kernels are the same text for all.
struct NoPairs {
    static constexpr bool kBlocks = false;
    template <class V>
    static void join_halves(V a, V b, V* to);
    template <class V>
    static V dot_blocks(V a, V b, V c);
    template <class V>
    static V dot_pairs(V a, V b, V c);
    template <class V>
    static V to_pairs(V low, V high);
    static float load_pairs_first(const void* p, int64_t count);
};

struct Baseline : NoPairs {
    static constexpr int kWidth = 4;
    static constexpr int kTileVectors = 2, kRegisters = 16;
    using V = float __attribute__((vector_size(16)));
    using I = int32_t __attribute__((vector_size(16)));

    static SMOLVLA_INLINE V broadcast(float x) { return V{x, x, x, x}; }
    static SMOLVLA_INLINE V load(const float* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static SMOLVLA_INLINE V load(const bfloat16* p) {
        return V{cpu::load(p), cpu::load(p + 1), cpu::load(p + 2), cpu::load(p + 3)};
    }
    static SMOLVLA_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
    static SMOLVLA_INLINE V fma(V a, V b, V c) { return a * b + c; }
    // Lane i of the result is the sum of the lanes of v[i].
    static SMOLVLA_INLINE V sum_each(const V* v) {
        V sums;
        for (int i = 0; i < kWidth; ++i) sums[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
        return sums;
    }
    // Lane j of the result's vector i is lane i of v[j].
    static SMOLVLA_INLINE void transpose(V* v) {
        for (int i = 0; i < kWidth; ++i)
            for (int j = 0; j < i; ++j) {
                const float held = v[i][j];
                v[i][j] = v[j][i];
                v[j][i] = held;
            }
    }
    // Of a number and a NaN, the second argument.
    static SMOLVLA_INLINE V max(V a, V b) { return a > b ? a : b; }
    static SMOLVLA_INLINE V min(V a, V b) { return a < b ? a : b; }
    // Of an exponent t: t - floor(t), or what poses for it where `scale` gives zero; a NaN stays one. `whole` is for `scale`.
    static SMOLVLA_INLINE V fraction(V t, V& whole) {
        const V clamped = max(t, broadcast(kLeastExponent));
        whole = __builtin_convertvector(__builtin_convertvector(clamped, I), V);
        // A true lane is -1: truncation becomes floor.
        whole += __builtin_convertvector(clamped < whole, V);
        return t - whole;
    }
    // p·2^floor(t). Zero where t is below -126; AVX-512's instruction for it goes on to subnormals.
    static SMOLVLA_INLINE V scale(V p, V whole, V t) {
        const I bits = (__builtin_convertvector(whole, I) + 127) << 23;
        V power;
        std::memcpy(&power, &bits, sizeof power);
        return t < broadcast(kLeastExponent) ? V{} : p * power;
    }
};

#if defined(__x86_64__)
#define SMOLVLA_AVX2_INLINE SMOLVLA_AVX2 SMOLVLA_INLINE
struct Avx2 : NoPairs {
    static constexpr int kWidth = 8;
    static constexpr int kTileVectors = 2, kRegisters = 16;
    using V = __m256;

    static SMOLVLA_AVX2_INLINE V broadcast(float x) { return _mm256_set1_ps(x); }
    static SMOLVLA_AVX2_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
    static SMOLVLA_AVX2_INLINE V load(const bfloat16* p) {
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    static SMOLVLA_AVX2_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static SMOLVLA_AVX2_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static SMOLVLA_AVX2_INLINE V sum_each(const V* v) {
        const V low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
        const V high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
        return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    }
    static SMOLVLA_AVX2_INLINE void transpose(V* v) {
        V t[8];
#pragma GCC unroll 4
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m256d low = _mm256_castps_pd(t[i + j]), high = _mm256_castps_pd(t[i + j + 2]);
                v[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
                v[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const V low = v[i], high = v[i + 4];
            v[i] = _mm256_permute2f128_ps(low, high, 0x20);
            v[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
        }
    }
    static SMOLVLA_AVX2_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
    static SMOLVLA_AVX2_INLINE V min(V a, V b) { return _mm256_min_ps(a, b); }
    static SMOLVLA_AVX2_INLINE V fraction(V t, V& whole) {
        whole = _mm256_floor_ps(_mm256_max_ps(t, broadcast(kLeastExponent)));
        return _mm256_sub_ps(t, whole);
    }
    static SMOLVLA_AVX2_INLINE V scale(V p, V whole, V t) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
        const V scaled = _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
        return _mm256_andnot_ps(_mm256_cmp_ps(t, broadcast(kLeastExponent), _CMP_LT_OQ), scaled);
    }
};

#define SMOLVLA_AVX512_INLINE SMOLVLA_AVX512 SMOLVLA_INLINE
struct Avx512 : NoPairs {
    static constexpr int kWidth = 16;
    static constexpr int kTileVectors = 4, kRegisters = 32;
    using V = __m512;

    static SMOLVLA_AVX512_INLINE V broadcast(float x) { return _mm512_set1_ps(x); }
    static SMOLVLA_AVX512_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
    static SMOLVLA_AVX512_INLINE V load(const bfloat16* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    // The first `count` (0 to 16) elements, zero beyond; memory beyond is not touched.
    static SMOLVLA_AVX512_INLINE V load_first(const float* p, int64_t count) {
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
    }
    static SMOLVLA_AVX512_INLINE V load_first(const bfloat16* p, int64_t count) {
        const __m256i halves = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1u), p);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static SMOLVLA_AVX512_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static SMOLVLA_AVX512_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    // Each step adds halves and joins two vectors in one.
    static SMOLVLA_AVX512_INLINE V sum_each(const V* v) {
        V t[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i)
            t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512d low = _mm512_castps_pd(t[2 * i]), high = _mm512_castps_pd(t[2 * i + 1]);
            const V first = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            t[i] = _mm512_add_ps(first, _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i)
            t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(t[2 * i], t[2 * i + 1], 0xdd));
        return _mm512_add_ps(_mm512_shuffle_f32x4(t[0], t[1], 0x88), _mm512_shuffle_f32x4(t[0], t[1], 0xdd));
    }
    static SMOLVLA_AVX512_INLINE void transpose(V* rows) {
        V t[16];
#pragma GCC unroll 8
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
            for (int j = 0; j < 2; ++j) {
                const __m512d low = _mm512_castps_pd(t[i + j]), high = _mm512_castps_pd(t[i + j + 2]);
                rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
                rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
            }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            t[i] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            rows[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
            rows[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
            rows[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
            rows[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
        }
    }
    static SMOLVLA_AVX512_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
    static SMOLVLA_AVX512_INLINE V min(V a, V b) { return _mm512_min_ps(a, b); }
    // Scaling takes the floor by itself, and goes down to zero.
    static SMOLVLA_AVX512_INLINE V fraction(V t, V& whole) { return _mm512_reduce_ps(whole = t, 0x09); }
    static SMOLVLA_AVX512_INLINE V scale(V p, V whole, V) { return _mm512_scalef_ps(p, whole); }
};

// Pairs of bf16 as words. The dot product instruction treats subnormals as zero.
#define SMOLVLA_AVX512_BF16_INLINE SMOLVLA_AVX512_BF16 SMOLVLA_INLINE
struct Avx512Bf16 : Avx512 {
    static SMOLVLA_AVX512_BF16_INLINE V dot_pairs(V a, V b, V c) {
        return _mm512_dpbf16_ps(c, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    // 2·kWidth values as kWidth words, in order.
    static SMOLVLA_AVX512_BF16_INLINE V to_pairs(V low, V high) {
        return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
    static SMOLVLA_AVX512_BF16_INLINE V load_pairs_first(const bfloat16* p, int64_t count) {
        const auto mask = static_cast<__mmask32>((uint64_t{1} << count) - 1u);
        return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
    }
};
#endif

}  // namespace smolvla::cpu

#if defined(__aarch64__)
#include "cpu/simd_neon.h"
#endif
