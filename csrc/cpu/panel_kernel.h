// What attention and linear share, for one instruction level: loads, exponents and a product of packed panels. No include guard:
// see each_level.h.
//
// The right operand is packed: words of a column run down a panel of kPanel columns, so a register tile of the result is
// a sum of outer products, and a vector of it belongs to one row.

namespace SMOLVLA_LEVEL_NAMESPACE {

using S = SMOLVLA_LEVEL;
using V = S::V;
constexpr int kWidth = S::kWidth;
constexpr int kPanel = S::kTileVectors * kWidth;

// 2^t of several vectors, step by step: each step waits for the one before it, and the others are computed meanwhile.
template <int kCount, int kDegree>
SMOLVLA_TARGET SMOLVLA_INLINE void exp2(V* t, const float (&c)[kDegree]) {
    V whole[kCount], f[kCount], p[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) f[j] = S::fraction(t[j], whole[j]);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) p[j] = S::broadcast(c[kDegree - 1]);
#pragma GCC unroll 8
    for (int i = kDegree - 2; i >= -1; --i)
#pragma GCC unroll 4
        for (int j = 0; j < kCount; ++j) p[j] = S::fma(p[j], f[j], S::broadcast(i < 0 ? 1.0f : c[i]));
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) t[j] = S::scale(p[j], whole[j], t[j]);
}

template <bool kPairs>
SMOLVLA_TARGET SMOLVLA_INLINE V dot(V a, V b, V c) {
    if constexpr (kPairs) return S::dot_pairs(a, b, c);
    else return S::fma(a, b, c);
}

template <bool kPairs, class T>
SMOLVLA_TARGET SMOLVLA_INLINE V load_words(const T* p) {
    if constexpr (kPairs) return S::load(reinterpret_cast<const float*>(p));
    else return S::load(p);
}

// The first `count` elements as words, zeros beyond.
template <bool kPairs, class T>
SMOLVLA_TARGET SMOLVLA_INLINE V load_first_words(const T* p, int64_t count) {
#if SMOLVLA_LEVEL_IS_512
    if constexpr (kPairs) return S::load_pairs_first(p, count);
    else return S::load_first(p, count);
#else
    float lanes[kWidth] = {};
    if constexpr (kPairs) std::memcpy(lanes, p, count * sizeof(T));
    else
        for (int64_t i = 0; i < count; ++i) lanes[i] = load(p + i);
    return S::load(lanes);
#endif
}

// c[row, :] (+)= a[row, 0:words] · b[0:words, :] for six rows and kVectors vectors of columns. With kFetch each word also
// fetches the next `bytes` from `ahead` on: small steps, so that loads do not queue behind them.
template <bool kPairs, int kVectors, bool kAccumulate, bool kFetch>
SMOLVLA_TARGET __attribute__((noinline)) void tile(const float* a, int64_t lda, int last_row, const float* b,
                                                   int64_t ldb, int64_t words, float* c, int64_t ldc, const char* ahead,
                                                   int64_t bytes) {
    // Rows beyond the last repeat it; their results land in scratch that nobody reads.
    const float* rows[kTileRows];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) rows[r] = a + (r < last_row ? r : last_row) * lda;
    V sums[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = S::broadcast(0);
    for (int64_t w = 0; w < words; ++w) {
        if constexpr (kFetch) __builtin_prefetch(ahead + w * bytes, 0, 2);
        V columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = S::load(b + v * kWidth);
        b += ldb;
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
            const V row = S::broadcast(rows[r][w]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[r][v] = dot<kPairs>(row, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            // Added at the end, not the start: partial sums of a long row keep their rounding errors small.
            float* const to = c + r * ldc + v * kWidth;
            S::store(to, kAccumulate ? S::load(to) + sums[r][v] : sums[r][v]);
        }
}

// The same for any number of rows and of vectors up to a panel. With kFetch it also fetches from `ahead` on, of as
// many bytes as the rows of a have one of so many shares, rounded down.
template <bool kPairs, bool kAccumulate, bool kFetch = false>
SMOLVLA_TARGET void tiles(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t words,
                          float* c, int64_t ldc, int vectors, const char* ahead = nullptr, int64_t shares = 1) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int last = static_cast<int>(std::min<int64_t>(rows - row, kTileRows)) - 1;
        const float* a_rows = a + row * lda;
        float* c_rows = c + row * ldc;
        const int64_t bytes = (last + 1) * static_cast<int64_t>(sizeof(float)) / shares;
        switch (vectors) {
            case 1: tile<kPairs, 1, kAccumulate, kFetch>(a_rows, lda, last, b, ldb, words, c_rows, ldc, ahead, bytes); break;
            case 2: tile<kPairs, 2, kAccumulate, kFetch>(a_rows, lda, last, b, ldb, words, c_rows, ldc, ahead, bytes); break;
            default:
                if constexpr (S::kTileVectors == 4) {
                    const auto wide = vectors == 3 ? tile<kPairs, 3, kAccumulate, kFetch> : tile<kPairs, 4, kAccumulate, kFetch>;
                    wide(a_rows, lda, last, b, ldb, words, c_rows, ldc, ahead, bytes);
                }
        }
        if constexpr (kFetch) ahead += words * bytes;
    }
}

// c (+)= a · b, summed up in registers over chunks of words whose sums are then added: a long chain of additions would lose
// bits that a blocked matrix product keeps.
template <bool kPairs>
SMOLVLA_TARGET void product(const float* a, int64_t lda, int64_t rows, const float* b, int64_t ldb, int64_t words,
                            int64_t chunk, float* c, int64_t ldc, int64_t vectors, bool accumulate = false) {
    const int count = static_cast<int>(std::min<int64_t>(vectors, S::kTileVectors));
    for (int64_t w = 0; w < words; w += chunk) {
        const int64_t here = std::min(words - w, chunk);
        if (w == 0 && !accumulate) tiles<kPairs, false>(a, lda, rows, b, ldb, here, c, ldc, count);
        else tiles<kPairs, true>(a + w, lda, rows, b + w * ldb, ldb, here, c, ldc, count);
    }
}

// Transposes up to a panel of rows: [words, kPanel], zeros beyond the last row and the last element.
template <bool kPairs, class T>
SMOLVLA_TARGET void pack_panel(const T* rows, int64_t stride, int64_t count, int64_t elements, float* panel) {
    constexpr int64_t per_word = kPairs ? 2 : 1, step = kWidth * per_word;
    for (int64_t first = 0; first < kPanel; first += kWidth)
        for (int64_t at = 0; at < elements; at += step) {
            const int64_t here = std::min(elements - at, step);
            V square[kWidth];
#pragma GCC unroll 16
            for (int i = 0; i < kWidth; ++i) {
                const T* const from = rows + (first + i) * stride + at;
                if (first + i >= count) square[i] = S::broadcast(0);
                else square[i] = here == step ? load_words<kPairs>(from) : load_first_words<kPairs>(from, here);
            }
            S::transpose(square);
            float* const to = panel + at / per_word * kPanel + first;
            const int64_t words = (here + per_word - 1) / per_word;
            if (words == kWidth) {
#pragma GCC unroll 16
                for (int i = 0; i < kWidth; ++i) S::store(to + i * kPanel, square[i]);
            } else {
                for (int64_t i = 0; i < words; ++i) S::store(to + i * kPanel, square[i]);
            }
        }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
