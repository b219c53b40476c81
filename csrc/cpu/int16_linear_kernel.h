// The product of 16-bit integers for one instruction level. No include guard: see each_integer_level.h.
//
// Weights are packed in panels when they are quantised. A register tile is a sum of outer products: a word of a row times the
// words of a panel. Only the tile is written in intrinsics.

namespace SMOLVLA_LEVEL_NAMESPACE {

using S = SMOLVLA_LEVEL;
using V = S::V;
using F = float __attribute__((vector_size(4 * S::kWidth)));
using I = int32_t __attribute__((vector_size(4 * S::kWidth)));
constexpr int kWidth = S::kWidth, kVectors = 2;
static_assert(kInt16Panel % (kVectors * kWidth) == 0, "a panel is whole tiles");

// c[row, :] (+)= a[row, 0:words] · b[0:words, :] for six rows and kVectors vectors of a panel.
template <bool kAccumulate>
SMOLVLA_TARGET __attribute__((noinline)) void tile(const int32_t* a, int64_t lda, int last_row, const int32_t* b,
                                                   int64_t words, float* c, int64_t ldc) {
    // Rows beyond the last repeat it; their results land in scratch that nobody reads.
    const int32_t* rows[kTileRows];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) rows[r] = a + (r < last_row ? r : last_row) * lda;
    V sums[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = S::broadcast(0);
    for (int64_t w = 0; w < words; ++w, b += kInt16Panel) {
        V columns[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) columns[v] = S::load(b + v * kWidth);
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
            const V row = S::broadcast(rows[r][w]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] = S::dot_pairs(row, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            I whole;
            std::memcpy(&whole, &sums[r][v], sizeof whole);
            F sum = __builtin_convertvector(whole, F), before;
            float* const to = c + r * ldc + v * kWidth;
            if constexpr (kAccumulate) {
                std::memcpy(&before, to, sizeof before);
                sum = before + sum;
            }
            std::memcpy(to, &sum, sizeof sum);
        }
}

// c[row, 0:panels·kInt16Panel] = x · weightᵀ for some panels that lie behind each other.
SMOLVLA_TARGET void panel_products(const int32_t* x, int64_t rows, int64_t words, const int32_t* panels, int64_t count,
                                   float* c, int64_t ldc) {
    constexpr int64_t kWords = kInt16Sum / 2;
    for (int64_t w = 0; w < words; w += kWords) {
        const int64_t here = std::min(words - w, kWords);
        for (int64_t p = 0; p < count; ++p)
            for (int64_t row = 0; row < rows; row += kTileRows) {
                const int last = static_cast<int>(std::min<int64_t>(rows - row, kTileRows)) - 1;
                for (int64_t v = 0; v < kInt16Panel; v += kVectors * kWidth) {
                    const auto some = w == 0 ? tile<false> : tile<true>;
                    some(x + row * words + w, words, last, panels + (p * words + w) * kInt16Panel + v, here,
                         c + row * ldc + p * kInt16Panel + v, ldc);
                }
            }
    }
}

template <Activation kActivation>
SMOLVLA_TARGET __attribute__((noinline)) void activate_row(float* __restrict v, int64_t count) {
    for (int64_t i = 0; i < count; ++i) v[i] = activate<kActivation>(v[i]);
}

// What follows the product, for outputs [out, out + count) of a row; sums and up are used up.
template <Activation kActivation>
SMOLVLA_TARGET void finish(const Int16Linear& a, int64_t row, int64_t out, int64_t count, float* __restrict sums,
                           float* __restrict up) {
    const float x_scale = a.x_scale[row];
    float* const y = a.y + row * a.outputs + out;
    for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] * a.scale[out + i] * x_scale;
    if (a.bias)
        for (int64_t i = 0; i < count; ++i) sums[i] += a.bias[out + i];
    if constexpr (kActivation != Activation::none) activate_row<kActivation>(sums, count);
    if (a.up_weight)
        for (int64_t i = 0; i < count; ++i) sums[i] *= up[i] * a.up_scale[out + i] * x_scale;
    if (a.residual)
        for (int64_t i = 0; i < count; ++i) sums[i] += a.residual[row * a.outputs + out + i];
    std::memcpy(y, sums, count * sizeof(float));
}

// Ranges of the flat list (group of panels, block of rows).
template <Activation kActivation>
SMOLVLA_TARGET void run(const Int16Linear& a, const Sizes& sizes, Ranges& ranges) {
    const int64_t width = sizes.group * kInt16Panel, sums = sizes.block * width;
    float* const c = Scratch::reserve(a.up_weight ? 2 * sums : sums);
    const auto* const x = reinterpret_cast<const int32_t*>(a.x);
    const auto* const weight = reinterpret_cast<const int32_t*>(a.weight);
    const auto* const up_weight = reinterpret_cast<const int32_t*>(a.up_weight);
    for (int64_t begin, end; ranges.next(begin, end);)
        for (; begin < end; ++begin) {
            const int64_t panel = begin / sizes.blocks * sizes.group, out = panel * kInt16Panel;
            const int64_t count = std::min(sizes.group, sizes.panels - panel), outs = std::min(width, a.outputs - out);
            const int64_t row = begin % sizes.blocks * sizes.block, rows = std::min(sizes.block, a.rows - row);
            const int64_t at = panel * a.words * kInt16Panel;
            panel_products(x + row * a.words, rows, a.words, weight + at, count, c, width);
            if (a.up_weight) panel_products(x + row * a.words, rows, a.words, up_weight + at, count, c + sums, width);
            for (int64_t r = 0; r < rows; ++r)
                finish<kActivation>(a, row + r, out, outs, c + r * width, c + sums + r * width);
        }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
