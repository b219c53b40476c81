// Sums of products of integers, one struct per instruction level; see simd.h for the like of fp32.
//
// A *word* is the 32 bits that one lane consumes: two numbers of 16 bits (`dot_pairs`), or of 8 bits (`dot`) with VNNI four
// bytes, unsigned on one side. Without VNNI bytes are widened to 16 bits, since instructions that add products of bytes in 16
// bits saturate.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/dispatch.h"

#if defined(__x86_64__) && !defined(SMOLVLA_EMULATED)
#include <immintrin.h>
#endif

#if defined(SMOLVLA_EMULATED)
// A test compiles this with functions that compute what the instructions do, for a processor that has none of them.
#define SMOLVLA_AVX2_VNNI
#define SMOLVLA_AVX512_VNNI
#define SMOLVLA_AMX
#elif defined(__x86_64__)
#define SMOLVLA_AVX2_VNNI __attribute__((target("avxvnni,avx2,fma")))
#if defined(__clang__)
#define SMOLVLA_AVX512_VNNI \
    __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#define SMOLVLA_AMX \
    __attribute__((target("amx-int8,amx-tile,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define SMOLVLA_AVX512_VNNI \
    __attribute__((target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#define SMOLVLA_AMX \
    __attribute__((target("amx-int8,amx-tile,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#endif

namespace smolvla::cpu {

// Rows of a register tile, tiles of a block, and words that a step takes at once. Nothing is set up for vectors.
struct Vectors {
    static constexpr int kTileRows = 6, kBlockTiles = 4, kStepWords = 1;
    struct SetUp {
        SMOLVLA_INLINE SetUp() {}
    };
};

struct Pairs : Vectors {
    using Element = int16_t;
    static constexpr int kPerWord = 2;
    // What is added to queries, so that they have no sign.
    static constexpr int kZero = 0;
};

struct Bytes : Vectors {
    using Element = uint8_t;
    static constexpr int kPerWord = 4;
    static constexpr int kZero = 128;
};

struct IntegerBaseline : Pairs {
    static constexpr int kWidth = 4;
    static constexpr int kTileVectors = 2;
    using V = int32_t __attribute__((vector_size(16)));

    static SMOLVLA_INLINE V broadcast(int32_t x) { return V{x, x, x, x}; }
    static SMOLVLA_INLINE V load(const int32_t* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static SMOLVLA_INLINE void store(int32_t* p, V v) { std::memcpy(p, &v, sizeof v); }
    static SMOLVLA_INLINE V dot(V a, V b, V c) {
#if defined(__x86_64__) && !defined(SMOLVLA_EMULATED)
        return c + (V)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
        return c + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
    }
    static SMOLVLA_INLINE V dot_pairs(V a, V b, V c) { return dot(a, b, c); }
};

#if defined(__x86_64__)
#define SMOLVLA_AVX2_INLINE8 SMOLVLA_AVX2 SMOLVLA_INLINE
struct IntegerAvx2 : Pairs {
    static constexpr int kWidth = 8;
    static constexpr int kTileVectors = 2;
    using V = __m256i;

    static SMOLVLA_AVX2_INLINE8 V broadcast(int32_t x) { return _mm256_set1_epi32(x); }
    static SMOLVLA_AVX2_INLINE8 V load(const int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static SMOLVLA_AVX2_INLINE8 void store(int32_t* p, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    }
    static SMOLVLA_AVX2_INLINE8 V dot(V a, V b, V c) {
#if defined(SMOLVLA_EMULATED)
        return _mm256_add_epi32(c, _mm256_madd_epi16(a, b));
#else
        // From functions the compiler makes the same instructions, but all products of a word before their additions, for
        // which there are no registers: sums went to memory and back, at half the speed.
        V products;
        __asm__("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(a), "x"(b));
        __asm__("vpaddd %1, %0, %0" : "+x"(c) : "x"(products));
        return c;
#endif
    }
    static SMOLVLA_AVX2_INLINE8 V dot_pairs(V a, V b, V c) { return dot(a, b, c); }
};

#if defined(SMOLVLA_EMULATED) || __has_include(<avxvnniintrin.h>)
#define SMOLVLA_HAS_AVX2_VNNI 1
#define SMOLVLA_AVX2_VNNI_INLINE SMOLVLA_AVX2_VNNI SMOLVLA_INLINE
struct IntegerAvx2Vnni : Bytes {
    static constexpr int kWidth = 8;
    static constexpr int kTileVectors = 2;
    using V = __m256i;

    static SMOLVLA_AVX2_VNNI_INLINE V broadcast(int32_t x) { return _mm256_set1_epi32(x); }
    static SMOLVLA_AVX2_VNNI_INLINE V load(const int32_t* p) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static SMOLVLA_AVX2_VNNI_INLINE void store(int32_t* p, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
    }
#if defined(SMOLVLA_EMULATED)
    static SMOLVLA_AVX2_VNNI_INLINE V dot(V a, V b, V c) { return _mm256_dpbusd_epi32(c, a, b); }
    static SMOLVLA_AVX2_VNNI_INLINE V dot_pairs(V a, V b, V c) { return _mm256_dpwssd_epi32(c, a, b); }
#else
    static SMOLVLA_AVX2_VNNI_INLINE V dot(V a, V b, V c) { return _mm256_dpbusd_avx_epi32(c, a, b); }
    static SMOLVLA_AVX2_VNNI_INLINE V dot_pairs(V a, V b, V c) { return _mm256_dpwssd_avx_epi32(c, a, b); }
#endif
};
#endif

#define SMOLVLA_AVX512_VNNI_INLINE SMOLVLA_AVX512_VNNI SMOLVLA_INLINE
struct IntegerAvx512Vnni : Bytes {
    static constexpr int kWidth = 16;
    static constexpr int kTileVectors = 4;
    using V = __m512i;

    static SMOLVLA_AVX512_VNNI_INLINE V broadcast(int32_t x) { return _mm512_set1_epi32(x); }
    static SMOLVLA_AVX512_VNNI_INLINE V load(const int32_t* p) { return _mm512_loadu_si512(p); }
    static SMOLVLA_AVX512_VNNI_INLINE void store(int32_t* p, V v) { _mm512_storeu_si512(p, v); }
    static SMOLVLA_AVX512_VNNI_INLINE V dot(V a, V b, V c) { return _mm512_dpbusd_epi32(c, a, b); }
    static SMOLVLA_AVX512_VNNI_INLINE V dot_pairs(V a, V b, V c) { return _mm512_dpwssd_epi32(c, a, b); }
};

// GCC and clang name the header each in their way.
#if defined(SMOLVLA_EMULATED) || __has_include(<amxint8intrin.h>) || __has_include(<amxintrin.h>)
#define SMOLVLA_HAS_AMX 1
// Tiles of 16 rows by 16 words: sums in 0 to 3, rows in 4 and 5, columns in 6 and 7.
struct IntegerAmx : IntegerAvx512Vnni {
    static constexpr int kTileRows = 16, kBlockTiles = 2, kStepWords = 16;
    static constexpr int kZero = 0;  // both sides may have a sign

    // Whoever holds tiles sets them up before, and gives them back: a switch of threads would save them.
    struct SetUp {
        SMOLVLA_AMX SMOLVLA_INLINE SetUp() {
            alignas(64) uint8_t palette[64] = {1};
            for (int tile = 0; tile < 8; ++tile) {
                palette[16 + 2 * tile] = 64;
                palette[48 + tile] = 16;
            }
            // GCC's function says that it reads eight of these bytes.
            __asm__ volatile("" ::"r"(palette) : "memory");
            _tile_loadconfig(palette);
        }
        SMOLVLA_AMX SMOLVLA_INLINE ~SetUp() { _tile_release(); }
    };
};
#endif
#endif

}  // namespace smolvla::cpu
