// The tile of linear_lanes_kernel.h at levels that multiply blocks: two rows by two outputs, four inputs of each. No include
// guard: see each_level.h.
//
// An instruction does twice the work of a product in lanes, and its sums are whole: no lanes are added up at the end.

namespace SMOLVLA_LEVEL_NAMESPACE {

// Whole tiles of an action chunk's 50 rows: 20 sums, the operands of eight outputs and of two rows fit 32 registers.
constexpr int kBlockTall = 10, kBlockWide = 8;
// One or two rows: more outputs, so that eight sums go on while each waits for its last product.
constexpr int kFewTall = 2, kFewWide = 16;

// sums[row / 2, out / 2] += x · wᵀ over inputs [i, i + 2·kWidth).
template <int kTall, int kWide, class T>
SMOLVLA_TARGET SMOLVLA_INLINE void add_blocks(const T* const* xs, const T* const* ws, int64_t i, V* sums) {
    V columns[kWide / 2][2];
#pragma GCC unroll 8
    for (int o = 0; o < kWide; o += 2)
        S::join_halves(load_words<true>(ws[o] + i), load_words<true>(ws[o + 1] + i), columns[o / 2]);
#pragma GCC unroll 5
    for (int r = 0; r < kTall; r += 2, sums += kWide / 2) {
        V rows[2];
        S::join_halves(load_words<true>(xs[r] + i), load_words<true>(xs[r + 1] + i), rows);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
            for (int o = 0; o < kWide / 2; ++o) sums[o] = S::dot_blocks(rows[half], columns[o][half], sums[o]);
    }
}

// As lane_tile, but outputs are adjacent in c, so that its last parameter is not asked, and rows of c beyond the last are not
// written.
template <bool kAccumulate, int kTall, int kWide, class T>
SMOLVLA_TARGET __attribute__((noinline)) void block_tile(const T* x, int64_t x_stride, int last_row, const T* w,
                                                         int64_t w_stride, int last_out, int64_t inputs, const T* ahead,
                                                         float* c, int64_t c_row, int64_t) {
    constexpr int kSums = kTall / 2 * kWide / 2;
    constexpr int64_t step = 2 * kWidth;
    const T *xs[kTall], *ws[kWide];
    for (int r = 0; r < kTall; ++r) xs[r] = x + std::min(r, last_row) * x_stride;
    for (int o = 0; o < kWide; ++o) ws[o] = w + std::min(o, last_out) * w_stride;

    V sums[kSums];
#pragma GCC unroll 20
    for (int j = 0; j < kSums; ++j) sums[j] = S::broadcast(0);
    int64_t i = 0;
    for (; i + step <= inputs; i += step) {
        __builtin_prefetch(ahead + i, 0, 2);
        add_blocks<kTall, kWide>(xs, ws, i, sums);
    }
    if (i < inputs) {
        // The last inputs, zeros beyond.
        T ends[kTall + kWide][step] = {};
        for (int j = 0; j < kTall + kWide; ++j) {
            const T*& row = j < kTall ? xs[j] : ws[j - kTall];
            std::memcpy(ends[j], row + i, (inputs - i) * sizeof(T));
            row = ends[j];
        }
        add_blocks<kTall, kWide>(xs, ws, 0, sums);
    }
#pragma GCC unroll 20
    for (int j = 0; j < kSums; j += 2) {
        V rows[2];
        S::join_halves(sums[j], sums[j + 1], rows);
        const int row = j / (kWide / 2) * 2, out = j % (kWide / 2) * 2;
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
            float* const to = c + (row + r) * c_row + out;
            if (row + r <= last_row) S::store(to, kAccumulate ? S::load(to) + rows[r] : rows[r]);
        }
    }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
