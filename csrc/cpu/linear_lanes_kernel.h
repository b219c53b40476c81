// The linear kernel that packs nothing, for one instruction level: bf16, fp32 with 32 registers, and with 16 fewer than 48
// rows, fewer than 16 outputs and the last rows beside columns. No include guard: see each_level.h.
//
// x and nn.Linear's weight are both contiguous along the inputs, so a tile of outputs is summed with the inputs in the
// vector's lanes, and the lanes are added up at the end: no operand is transposed. Levels that multiply blocks of bf16 have a
// tile of their own, linear_blocks_kernel.h.

namespace SMOLVLA_LEVEL_NAMESPACE {

// Accumulators, one column of operands and one of a row fit the 32 or 16 vector registers.
constexpr bool kFewRegisters = S::kRegisters == 16;
constexpr int kRows = kFewRegisters ? 4 : 5, kOuts = kFewRegisters ? 3 : 5;
// Inputs that are summed in one go: fewer where there are four lanes, whose sums are longer and less exact than eager's.
constexpr int64_t kPart = kWidth == 4 ? kPartInputs / 2 : kPartInputs;
constexpr int kChunk = kOuts * kUnits;
constexpr int kChunkStride = (kChunk + kWidth - 1) / kWidth * kWidth;
static_assert(kSplit<kFewRegisters> % kOuts == 0, "what a thread is dealt is whole tiles");
static_assert(kChunk % kBlockWide + kChunk % kFewWide == 0 || !S::kBlocks, "a chunk is whole tiles of blocks");

// c[row, out] (+)= x[row, 0:inputs] · w[out, 0:inputs]. Rows and outputs beyond the last repeat it; their results are not
// wanted.
template <bool kPairs, bool kAccumulate, int kTall, int kWide, class T>
SMOLVLA_TARGET __attribute__((noinline)) void lane_tile(const T* x, int64_t x_stride, int last_row, const T* w,
                                                        int64_t w_stride, int last_out, int64_t inputs, const T* ahead,
                                                        float* c, int64_t c_row, int64_t c_out) {
    // Sums of the tile, in whole vectors: they are added up a vector full at a time.
    constexpr int kSums = (kTall * kWide + kWidth - 1) / kWidth * kWidth;
    const T *xs[kTall], *ws[kWide];
#pragma GCC unroll 6
    for (int r = 0; r < kTall; ++r) xs[r] = x + (r < last_row ? r : last_row) * x_stride;
#pragma GCC unroll 6
    for (int o = 0; o < kWide; ++o) ws[o] = w + (o < last_out ? o : last_out) * w_stride;

    V sums[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = S::broadcast(0);
    constexpr int64_t step = kPairs ? 2 * kWidth : kWidth;
    int64_t i = 0;
    for (; i + step <= inputs; i += step) {
        __builtin_prefetch(ahead + i, 0, 2);
        V columns[kWide];
#pragma GCC unroll 6
        for (int o = 0; o < kWide; ++o) columns[o] = load_words<kPairs>(ws[o] + i);
#pragma GCC unroll 6
        for (int r = 0; r < kTall; ++r) {
            const V row = load_words<kPairs>(xs[r] + i);
#pragma GCC unroll 6
            for (int o = 0; o < kWide; ++o) sums[r * kWide + o] = dot<kPairs>(row, columns[o], sums[r * kWide + o]);
        }
    }
    if (i < inputs) {
        V columns[kWide];
#pragma GCC unroll 6
        for (int o = 0; o < kWide; ++o) columns[o] = load_first_words<kPairs>(ws[o] + i, inputs - i);
#pragma GCC unroll 6
        for (int r = 0; r < kTall; ++r) {
            const V row = load_first_words<kPairs>(xs[r] + i, inputs - i);
#pragma GCC unroll 6
            for (int o = 0; o < kWide; ++o) sums[r * kWide + o] = dot<kPairs>(row, columns[o], sums[r * kWide + o]);
        }
    }
    alignas(64) float flat[kSums];
#pragma GCC unroll 8
    for (int j = 0; j < kSums; j += kWidth) S::store(flat + j, S::sum_each(sums + j));
#pragma GCC unroll 6
    for (int r = 0; r < kTall; ++r)
#pragma GCC unroll 6
        for (int o = 0; o < kWide; ++o) {
            float* const to = c + r * c_row + o * c_out;
            *to = kAccumulate ? *to + flat[r * kWide + o] : flat[r * kWide + o];
        }
}

// The tile that serves one or two rows, where there is one for them, or more.
template <bool kPairs, bool kAccumulate, class T>
auto tile_for(bool few) {
    if constexpr (kPairs && S::kBlocks)
        return few ? block_tile<kAccumulate, kFewTall, kFewWide, T> : block_tile<kAccumulate, kBlockTall, kBlockWide, T>;
    else if constexpr (kFewRegisters)
        return few ? lane_tile<kPairs, kAccumulate, kTileRows, 2, T> : lane_tile<kPairs, kAccumulate, kRows, kOuts, T>;
    else return lane_tile<kPairs, kAccumulate, kRows, kOuts, T>;
}

// c[row, 0:outs] = x · wᵀ for a chunk of outputs; `after` is where the weights begin that are wanted next. x is
// [inputs / part, rows, part].
template <bool kPairs, class T>
SMOLVLA_TARGET void lane_products(const T* x, int64_t part, int64_t rows, const T* w, int64_t outs, int64_t inputs,
                                  const T* after, float* c) {
    constexpr bool by_blocks = kPairs && S::kBlocks;
    // With few registers x and w exchange places for one or two rows: six outputs by two, so that no row is computed twice over.
    const bool few = rows <= 2, exchanged = few && kFewRegisters;
    const int unit_rows = by_blocks ? kBlockTall : kRows;
    const int unit_outs = by_blocks ? (few ? kFewWide : kBlockWide) : exchanged ? kTileRows : kOuts;
    for (int64_t i = 0; i < inputs; i += part) {
        const int64_t here = std::min(inputs - i, part);
        const auto tile = i == 0 ? tile_for<kPairs, false, T>(few) : tile_for<kPairs, true, T>(few);
        const T* const then = i + here < inputs ? w + i + here : after;
        for (int64_t out = 0; out < outs; out += unit_outs) {
            const T* const unit = w + out * inputs + i;
            const T* const next = out + unit_outs < outs ? unit + unit_outs * inputs : then;
            const int last_out = static_cast<int>(std::min<int64_t>(outs - out, unit_outs)) - 1;
            if (exchanged) {
                tile(unit, inputs, last_out, x + i * rows, here, static_cast<int>(rows) - 1, here, next, c + out, 1,
                     kChunkStride);
                continue;
            }
            for (int64_t row = 0; row < rows; row += unit_rows) {
                // While this unit is in cache, each tile fetches one row of the next.
                const T* const ahead = next + std::min<int64_t>(row / unit_rows, last_out) * inputs;
                const int last_row = static_cast<int>(std::min<int64_t>(rows - row, unit_rows)) - 1;
                tile(x + i * rows + row * here, here, last_row, unit, inputs, last_out, here, ahead,
                     c + row * kChunkStride + out, kChunkStride, 1);
            }
        }
    }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
