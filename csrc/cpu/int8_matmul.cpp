// Rows and weights both lie along the inputs, so a tile of outputs is summed with the inputs in the vectors' lanes and
// nothing is packed. Elsewhere than on aarch64 oneDNN has this product, and the plain body alone is here, for tests.
#include "cpu/int8_matmul.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace smolvla::cpu {
namespace {

// Outputs are dealt to threads in whole tiles.
constexpr int64_t kSplit = 8;
// Outputs whose weights stay in L1 or L2 while the rows pass by.
constexpr int64_t kChunkBytes = 64 * 1024;

// The sums of one tile: rows and outputs beyond the last are not written.
template <int kRows, int kOuts>
SMOLVLA_INLINE void finish_tile(const Int8Matmul& a, int64_t row, int64_t out, const int32_t (&sums)[kRows][kOuts]) {
    const int64_t rows = std::min<int64_t>(a.rows - row, kRows), outs = std::min<int64_t>(a.outputs - out, kOuts);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outs; ++o)
            a.sums[(row + r) * a.outputs + out + o] = static_cast<float>(sums[r][o]) * a.scale[out + o];
}

struct Plain {
    static constexpr int kRows = 1, kOuts = 1;
    static void tile(const Int8Matmul& a, int64_t row, int64_t out) {
        const uint8_t* const x = a.data + row * a.inputs;
        const int8_t* const w = a.weight + out * a.inputs;
        int32_t sums[1][1] = {};
        for (int64_t i = 0; i < a.inputs; ++i) sums[0][0] += (static_cast<int32_t>(x[i]) - 128) * w[i];
        finish_tile(a, row, out, sums);
    }
};

#if defined(__aarch64__)
// 16 values of a row: as they lie, or the first `count` and zeros beyond. 128 goes off by a flip of the top bit.
SMOLVLA_INLINE int8x16_t load_last(const void* p, int64_t count) {
    int8_t values[16] = {};
    std::memcpy(values, p, count);
    return vld1q_s8(values);
}
SMOLVLA_INLINE int8x16_t load_weight(const int8_t* p, int64_t left) {
    return left >= 16 ? vld1q_s8(p) : load_last(p, left);
}
SMOLVLA_INLINE int8x16_t load_row(const uint8_t* p, int64_t left) {
    const int8x16_t x = left >= 16 ? vreinterpretq_s8_u8(vld1q_u8(p)) : load_last(p, left);
    return veorq_s8(x, vdupq_n_s8(-128));
}

// A row or an output beyond the last repeats it.
template <int kCount, class T>
SMOLVLA_INLINE void row_pointers(const T* from, int64_t first, int64_t count, int64_t inputs, const T* (&to)[kCount]) {
    for (int i = 0; i < kCount; ++i) to[i] = from + std::min(first + i, count - 1) * inputs;
}

// Inputs in the lanes, which are added up at the end.
template <class Level>
SMOLVLA_INLINE void lanes_tile(const Int8Matmul& a, int64_t row, int64_t out) {
    constexpr int kRows = Level::kRows, kOuts = Level::kOuts;
    const uint8_t* xs[kRows];
    const int8_t* ws[kOuts];
    row_pointers(a.data, row, a.rows, a.inputs, xs);
    row_pointers(a.weight, out, a.outputs, a.inputs, ws);
    int32x4_t lanes[kRows][kOuts] = {};
    for (int64_t i = 0; i < a.inputs; i += 16) {
        int8x16_t w[kOuts];
#pragma GCC unroll 5
        for (int o = 0; o < kOuts; ++o) w[o] = load_weight(ws[o] + i, a.inputs - i);
#pragma GCC unroll 5
        for (int r = 0; r < kRows; ++r) {
            const int8x16_t x = load_row(xs[r] + i, a.inputs - i);
#pragma GCC unroll 5
            for (int o = 0; o < kOuts; ++o) lanes[r][o] = Level::dot(lanes[r][o], x, w[o]);
        }
    }
    int32_t sums[kRows][kOuts];
    for (int r = 0; r < kRows; ++r)
        for (int o = 0; o < kOuts; ++o) sums[r][o] = vaddvq_s32(lanes[r][o]);
    finish_tile(a, row, out, sums);
}

// Products of 16 bits, added in pairs to 32.
struct Neon8 {
    static constexpr int kRows = 3, kOuts = 4;
    static SMOLVLA_INLINE int32x4_t dot(int32x4_t sum, int8x16_t x, int8x16_t w) {
        // One product at a time: 128·128 twice is more than 16 bits hold.
        sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(x), vget_low_s8(w)));
        return vpadalq_s16(sum, vmull_high_s8(x, w));
    }
    static void tile(const Int8Matmul& a, int64_t row, int64_t out) { lanes_tile<Neon8>(a, row, out); }
};

#if SMOLVLA_NEON_EXTENSIONS
// Four products a lane. 20 sums, 5 operands and 1 row fit the registers.
struct Dotprod {
    static constexpr int kRows = 4, kOuts = 5;
    // Without a target of its own, so that it can be inlined in `lanes_tile`, and that in `tile`, which has one.
    static SMOLVLA_INLINE int32x4_t dot(int32x4_t sum, int8x16_t x, int8x16_t w) {
        __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(x), "w"(w));
        return sum;
    }
    SMOLVLA_NEON_DOTPROD static __attribute__((noinline)) void tile(const Int8Matmul& a, int64_t row, int64_t out) {
        lanes_tile<Dotprod>(a, row, out);
    }
};

// Two rows by two outputs, eight products each. 16 sums, 8 halves of outputs and 4 of rows fit the registers.
struct I8mm {
    static constexpr int kRows = 8, kOuts = 8, kPairs = 4;
    SMOLVLA_NEON_I8MM static SMOLVLA_INLINE void halves(int8x16_t a, int8x16_t b, int8x16_t (&to)[2]) {
        to[0] = vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
        to[1] = vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
    }
    SMOLVLA_NEON_I8MM static SMOLVLA_INLINE int32x4_t product(int32x4_t sum, int8x16_t a, int8x16_t b) {
        __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(a), "w"(b));
        return sum;
    }
    SMOLVLA_NEON_I8MM static __attribute__((noinline)) void tile(const Int8Matmul& a, int64_t row, int64_t out) {
        const uint8_t* xs[kRows];
        const int8_t* ws[kOuts];
        row_pointers(a.data, row, a.rows, a.inputs, xs);
        row_pointers(a.weight, out, a.outputs, a.inputs, ws);
        int32x4_t squares[kPairs][kPairs] = {};
        for (int64_t i = 0; i < a.inputs; i += 16) {
            const int64_t left = a.inputs - i;
            int8x16_t w[kPairs][2];
#pragma GCC unroll 4
            for (int o = 0; o < kPairs; ++o)
                halves(load_weight(ws[2 * o] + i, left), load_weight(ws[2 * o + 1] + i, left), w[o]);
#pragma GCC unroll 4
            for (int r = 0; r < kPairs; ++r) {
                int8x16_t x[2];
                halves(load_row(xs[2 * r] + i, left), load_row(xs[2 * r + 1] + i, left), x);
#pragma GCC unroll 2
                for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
                    for (int o = 0; o < kPairs; ++o) squares[r][o] = product(squares[r][o], x[half], w[o][half]);
            }
        }
        int32_t sums[kRows][kOuts];
        for (int r = 0; r < kPairs; ++r)
            for (int o = 0; o < kPairs; ++o) {
                vst1_s32(&sums[2 * r][2 * o], vget_low_s32(squares[r][o]));
                vst1_s32(&sums[2 * r + 1][2 * o], vget_high_s32(squares[r][o]));
            }
        finish_tile(a, row, out, sums);
    }
};
#endif
#endif

// Outputs [begin, end) of all rows, by chunks of outputs that stay in cache.
template <class Level>
void run(const Int8Matmul& a, int64_t begin, int64_t end) {
    const int64_t fitting = std::max<int64_t>(kChunkBytes / (a.inputs * Level::kOuts), 1) * Level::kOuts;
    for (int64_t chunk = begin; chunk < end; chunk += fitting)
        for (int64_t row = 0; row < a.rows; row += Level::kRows)
            for (int64_t out = chunk; out < std::min(chunk + fitting, end); out += Level::kOuts)
                Level::tile(a, row, out);
}

auto kernel() {
#if defined(__aarch64__)
    const Level here = level();
#if SMOLVLA_NEON_EXTENSIONS
    if (here >= Level::neon_i8mm) return run<I8mm>;
    if (here == Level::neon_dotprod) return run<Dotprod>;
#endif
    if (here != Level::baseline) return run<Neon8>;
#endif
    return run<Plain>;
}

}  // namespace

void int8_matmul(const Int8Matmul& a, int num_threads) {
    const auto run = kernel();
    const int64_t splits = (a.outputs + kSplit - 1) / kSplit;
    parallel_rows(splits, kSplit * a.rows * a.inputs / 64, num_threads,
                  [&](int64_t begin, int64_t end) { run(a, begin * kSplit, std::min(end * kSplit, a.outputs)); });
}

}  // namespace smolvla::cpu
