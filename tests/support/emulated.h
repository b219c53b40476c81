// AVX-512, bf16, VNNI and AMX as functions, for a processor that lacks them: SIMDe's, and here those that SIMDe 0.7 lacks or
// computes in another way. Included before each source of csrc/cpu; emulated.py builds them.
#pragma once

#define SMOLVLA_EMULATED
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace emulated {

template <class T>
struct Lanes {
    T at[64 / sizeof(T)];
};
template <class T>
struct HalfLanes {
    T at[32 / sizeof(T)];
};

template <class To, class From>
To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Elements whose bit is not set are zero, and their memory is not touched.
template <class Vector, class Element>
Vector load_some(uint32_t mask, const void* p) {
    constexpr int count = sizeof(Vector) / sizeof(Element);
    Element lanes[count] = {};
    for (int i = 0; i < count; ++i)
        if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const Element*>(p) + i, sizeof(Element));
    Vector v;
    std::memcpy(&v, lanes, sizeof v);
    return v;
}

inline __m512i widen(__m256i halves) {
    const auto from = as<HalfLanes<uint16_t>>(halves);
    Lanes<uint32_t> to;
    for (int i = 0; i < 16; ++i) to.at[i] = from.at[i];
    return as<__m512i>(to);
}

// The one form in use, x - floor(x) rounded down; of infinity it is zero.
template <int kControl>
__m512 reduce(__m512 x) {
    static_assert(kControl == 0x09);
    auto lanes = as<Lanes<float>>(x);
    for (float& lane : lanes.at) {
        const double exact = lane - std::floor(static_cast<double>(lane));
        const auto nearest = static_cast<float>(exact);
        lane = std::isinf(lane) ? 0.0f : nearest > exact ? std::nextafter(nearest, 0.0f) : nearest;
    }
    return as<__m512>(lanes);
}

// p·2^floor(t)
inline __m512 scale(__m512 p, __m512 t) {
    auto lanes = as<Lanes<float>>(p);
    const auto exponents = as<Lanes<float>>(t);
    for (int i = 0; i < 16; ++i) {
        const float whole = std::floor(exponents.at[i]);
        // ldexp takes an int; beyond these every result is zero or infinite.
        lanes.at[i] = std::isnan(whole) ? whole : std::ldexp(lanes.at[i], static_cast<int>(std::fmin(std::fmax(whole, -999), 999)));
    }
    return as<__m512>(lanes);
}

template <int kControl>
__m512 shuffle(__m512 a, __m512 b) {
    const auto low = as<Lanes<float>>(a), high = as<Lanes<float>>(b);
    Lanes<float> to;
    for (int i = 0; i < 16; ++i) to.at[i] = (i < 8 ? low : high).at[4 * (kControl >> 2 * (i / 4) & 3) + i % 4];
    return as<__m512>(to);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// To the nearest, ties to even; a subnormal becomes zero.
inline uint16_t to_bfloat16(float x) {
    const auto bits = as<uint32_t>(flushed(x));
    if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __m512i to_pairs(__m512 high, __m512 low) {
    Lanes<uint16_t> to;
    for (int i = 0; i < 16; ++i) {
        to.at[i] = to_bfloat16(as<Lanes<float>>(low).at[i]);
        to.at[16 + i] = to_bfloat16(as<Lanes<float>>(high).at[i]);
    }
    return as<__m512i>(to);
}

// The odd product first, each addition fused and rounded; subnormals are zero.
inline __m512 dot_pairs(__m512 sums, __m512i a, __m512i b) {
    auto lanes = as<Lanes<float>>(sums);
    const auto x = as<Lanes<uint16_t>>(a), y = as<Lanes<uint16_t>>(b);
    const auto wide = [](uint16_t half) { return flushed(as<float>(static_cast<uint32_t>(half) << 16)); };
    for (int i = 0; i < 32; ++i) {
        const int at = i ^ 1;
        lanes.at[i / 2] = flushed(std::fma(wide(x.at[at]), wide(y.at[at]), flushed(lanes.at[i / 2])));
    }
    return as<__m512>(lanes);
}

// Tiles of 16 rows of 64 bytes, of the thread that has set them up.
struct Tiles {
    bool set_up = false;
    uint8_t at[8][16][64];
};
inline thread_local Tiles tiles;

inline void load_config(const void* palette) {
    const auto* const bytes = static_cast<const uint8_t*>(palette);
    for (int i = 0; i < 8; ++i)
        if (bytes[0] != 1 || bytes[16 + 2 * i] != 64 || bytes[48 + i] != 16) std::abort();
    std::memset(&tiles, 0, sizeof tiles);
    tiles.set_up = true;
}
// What a tile holds is lost.
inline void release() { std::memset(&tiles, 0x5a, sizeof tiles), tiles.set_up = false; }
inline auto& tile(int i) {
    if (!tiles.set_up) std::abort();
    return tiles.at[i];
}
inline void zero(int to) { std::memset(tile(to), 0, sizeof tiles.at[0]); }
inline void load(int to, const void* from, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(tile(to)[row], static_cast<const uint8_t*>(from) + row * stride, 64);
}
inline void store(int from, void* to, int64_t stride) {
    for (int row = 0; row < 16; ++row) std::memcpy(static_cast<uint8_t*>(to) + row * stride, tile(from)[row], 64);
}
// Sums wrap as the processor's do.
template <class Left>
void dot_tiles(int to, int left, int right) {
    for (int row = 0; row < 16; ++row)
        for (int column = 0; column < 16; ++column) {
            uint32_t sum;
            std::memcpy(&sum, &tile(to)[row][4 * column], sizeof sum);
            for (int i = 0; i < 64; ++i)
                sum += static_cast<Left>(tile(left)[row][i]) * static_cast<int8_t>(tile(right)[i / 4][4 * column + i % 4]);
            std::memcpy(&tile(to)[row][4 * column], &sum, sizeof sum);
        }
}

}  // namespace emulated

#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbusd emulated::dot_tiles<uint8_t>
#define _tile_dpbssd emulated::dot_tiles<int8_t>

#define __m512bh __m512i
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::load_some<__m256i, uint16_t>
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::load_some<__m512i, uint16_t>
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::load_some<__m512, float>
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::widen
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::to_pairs
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::dot_pairs
#undef _mm512_reduce_ps
#define _mm512_reduce_ps(x, control) emulated::reduce<control>(x)
#undef _mm512_scalef_ps
#define _mm512_scalef_ps emulated::scale
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, control) emulated::shuffle<control>(a, b)
