// The attention kernel in 8-bit integers for one instruction level. No include guard: see each_integer_level.h.
//
// As in attention_kernel.h one kv head is packed at a time, K transposed into panels and V in consecutive rows, and both
// products run in one register tile. Only that tile is written in intrinsics: the rest is plain C++ that a compiler makes
// vectors of, so that levels differ in their width alone.

namespace SMOLVLA_LEVEL_NAMESPACE {

using S = SMOLVLA_LEVEL;
using V = S::V;
using Element = S::Element;
constexpr int kWidth = S::kWidth, kPerWord = S::kPerWord, kTileRows = S::kTileRows;
// Rows that share packed K and V while they are in L1.
constexpr int kBlockRows = S::kBlockTiles * kTileRows;
using F = float __attribute__((vector_size(4 * S::kWidth)));
using I = int32_t __attribute__((vector_size(4 * S::kWidth)));
constexpr int kPanel = S::kTileVectors * kWidth;
constexpr int kBlockWords = kBlock / kPerWord;
static_assert(kBlock % kPanel == 0);

#if defined(SMOLVLA_LEVEL_AMX)
// c[row, :] = a[row, 0:words] · b[0:words, :] for one or two tiles of rows and of columns. Rows beyond the last are multiplied
// as they stand; their results land in scratch that nobody reads. Scores have a sign on both sides, probabilities none.
template <bool kScores, bool kTwoRows, bool kTwoColumns>
SMOLVLA_TARGET SMOLVLA_INLINE void square(const int32_t* a, int64_t lda, const int32_t* b, int64_t ldb, int64_t words, int32_t* c,
                                          int64_t ldc) {
#define SMOLVLA_DOT(to, rows, columns)                   \
    if constexpr (kScores) _tile_dpbssd(to, rows, columns); \
    else _tile_dpbusd(to, rows, columns)
    // GCC's functions do not say that they read memory.
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t w = 0; w < words; w += S::kStepWords) {
        const int32_t* const columns = b + w * ldb;
        _tile_loadd(4, a + w, lda * 4);
        _tile_loadd(6, columns, ldb * 4);
        SMOLVLA_DOT(0, 4, 6);
        if constexpr (kTwoRows) {
            _tile_loadd(5, a + kTileRows * lda + w, lda * 4);
            SMOLVLA_DOT(2, 5, 6);
        }
        if constexpr (kTwoColumns) {
            _tile_loadd(7, columns + kWidth, ldb * 4);
            SMOLVLA_DOT(1, 4, 7);
        }
        if constexpr (kTwoRows && kTwoColumns) {
            SMOLVLA_DOT(3, 5, 7);
        }
    }
#undef SMOLVLA_DOT
    _tile_stored(0, c, ldc * 4);
    if constexpr (kTwoRows) _tile_stored(2, c + kTileRows * ldc, ldc * 4);
    if constexpr (kTwoColumns) _tile_stored(1, c + kWidth, ldc * 4);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + kTileRows * ldc + kWidth, ldc * 4);
    __asm__ volatile("" ::: "memory");
}

template <bool kScores>
SMOLVLA_TARGET void tiles(const int32_t* a, int64_t lda, int64_t rows, const int32_t* b, int64_t ldb, int64_t words,
                          const int32_t*, int32_t* c, int64_t ldc, int64_t vectors) {
    for (int64_t v = 0; v < std::min<int64_t>(vectors, S::kTileVectors); v += 2) {
        const int64_t at = v * kWidth;
        const bool two = vectors - v > 1;
        if (rows > kTileRows) {
            if (two) square<kScores, true, true>(a, lda, b + at, ldb, words, c + at, ldc);
            else square<kScores, true, false>(a, lda, b + at, ldb, words, c + at, ldc);
        } else {
            if (two) square<kScores, false, true>(a, lda, b + at, ldb, words, c + at, ldc);
            else square<kScores, false, false>(a, lda, b + at, ldb, words, c + at, ldc);
        }
    }
}
#else
// c[row, :] = start + a[row, 0:words] · b[0:words, :] for six rows and kVectors vectors of columns.
template <int kVectors>
SMOLVLA_TARGET __attribute__((noinline)) void tile(const int32_t* a, int64_t lda, int last_row, const int32_t* b,
                                                   int64_t ldb, int64_t words, const int32_t* start, int32_t* c,
                                                   int64_t ldc) {
    // Rows beyond the last repeat it; their results land in scratch that nobody reads.
    const int32_t* rows[kTileRows];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r) rows[r] = a + (r < last_row ? r : last_row) * lda;
    V sums[kTileRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = S::load(start + v * kWidth);
    for (int64_t w = 0; w < words; ++w) {
        V columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = S::load(b + v * kWidth);
        b += ldb;
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r) {
            const V row = S::broadcast(rows[r][w]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[r][v] = S::dot(row, columns[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) S::store(c + r * ldc + v * kWidth, sums[r][v]);
}

// The same for any number of rows and of vectors up to a panel.
template <bool kScores>
SMOLVLA_TARGET void tiles(const int32_t* a, int64_t lda, int64_t rows, const int32_t* b, int64_t ldb, int64_t words,
                          const int32_t* start, int32_t* c, int64_t ldc, int64_t vectors) {
    for (int64_t row = 0; row < rows; row += kTileRows) {
        const int last = static_cast<int>(std::min<int64_t>(rows - row, kTileRows)) - 1;
        const int32_t* a_rows = a + row * lda;
        int32_t* c_rows = c + row * ldc;
        if constexpr (S::kTileVectors == 4) {
            if (vectors >= 4) tile<4>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
            else if (vectors == 3) tile<3>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
            else if (vectors == 2) tile<2>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
            else tile<1>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
        } else {
            if (vectors >= 2) tile<2>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
            else tile<1>(a_rows, lda, last, b, ldb, words, start, c_rows, ldc);
        }
    }
}

#endif

// round((x - centre)·inverse) + kAdded in the element of a word, for one row.
template <int kAdded>
SMOLVLA_TARGET SMOLVLA_INLINE void round_row(const float* x, const float* centre, int64_t count, float inverse,
                                             Element* __restrict to) {
    for (int64_t i = 0; i < count; ++i)
        to[i] = static_cast<Element>(bits_of((x[i] - centre[i]) * inverse + kRounder) + kAdded);
}

// The sum of a key's integers times what is added to queries is in its scores; `start` takes that off again.
SMOLVLA_TARGET void pack_keys(const Head& h, const float* centre, int64_t words, int32_t* panels, float* scale,
                              int32_t* start) {
    alignas(64) Element row[kMostDim];
    for (int64_t key = 0; key < h.padded; ++key) {
        int32_t* to = panels + (key / kPanel * words) * kPanel + key % kPanel;
        scale[key] = 0.0f;
        start[key] = 0;
        if (key >= h.keys) {
            for (int64_t w = 0; w < words; ++w) to[w * kPanel] = 0;
            continue;
        }
        const float* k = h.k + key * h.k_stride;
        const float largest = largest_of(k, centre, h.head_dim);
        const float inverse = inverse_of(largest);
        scale[key] = scale_of(largest);
        std::memset(row, 0, words * sizeof(int32_t));
        round_row<0>(k, centre, h.head_dim, inverse, row);
        if constexpr (S::kZero != 0) {
            int32_t sum = 0;
            for (int64_t i = 0; i < h.head_dim; ++i) sum += static_cast<int8_t>(row[i]);
            start[key] = -S::kZero * sum;
        }
        for (int64_t w = 0; w < words; ++w) std::memcpy(to + w * kPanel, row + w * kPerWord, sizeof(int32_t));
    }
}

// [padded keys / kPerWord, columns]; scale [blocks, columns].
SMOLVLA_TARGET void pack_values(const Head& h, int64_t columns, int32_t* to, float* scale) {
    alignas(64) float inverse[kMostDim + kBlock];
    for (int64_t first = 0; first < h.padded; first += kBlock, scale += columns) {
        const int64_t keys = std::min<int64_t>(h.keys - first, kBlock);
        const float* v = h.v + first * h.v_stride;
        for (int64_t d = 0; d < columns; ++d) scale[d] = 0.0f;
        for (int64_t key = 0; key < keys; ++key) {
            fetch_ahead(v, h.v_stride, key, h.keys - first, h.head_dim);
            for (int64_t d = 0; d < h.head_dim; ++d) {
                const float x = std::fabs(v[key * h.v_stride + d]);
                scale[d] = x > scale[d] ? x : scale[d];
            }
        }
        for (int64_t d = 0; d < columns; ++d) {
            inverse[d] = inverse_of(scale[d]);
            scale[d] = scale_of(scale[d]);
        }
        for (int64_t word = 0; word < kBlockWords; ++word, to += columns) {
            std::memset(to, 0, columns * sizeof(int32_t));
            for (int i = 0; i < kPerWord; ++i) {
                const int64_t key = word * kPerWord + i;
                if (key >= keys) break;
                constexpr int32_t kMask = kPerWord == 4 ? 0xff : 0xffff;
                const int shift = 32 / kPerWord * i;
                const float* x = v + key * h.v_stride;
                for (int64_t d = 0; d < h.head_dim; ++d)
                    to[d] |= (bits_of(x[d] * inverse[d] + kRounder) & kMask) << shift;
            }
        }
    }
}

SMOLVLA_TARGET void pack_query(const float* q, const float* zeros, int64_t head_dim, int64_t words, int32_t* to,
                               float* scale) {
    const float largest = largest_of(q, zeros, head_dim);
    Element row[kMostDim];
    std::memset(row, 0, words * sizeof(int32_t));
    round_row<S::kZero>(q, zeros, head_dim, inverse_of(largest), row);
    std::memcpy(to, row, words * sizeof(int32_t));
    *scale = scale_of(largest);
}

// round(255·2^t) for t <= 0: 2^n is written into the exponent, 2^f on [-1/2, 1/2] is Taylor's series to the 4th power, a
// hundredth of a step off. Below 2^-20 it is 0 all the same, also for minus infinity.
SMOLVLA_TARGET SMOLVLA_INLINE void eight_bits_of_power(const F& t, I* rounded) {
    const F least = F{} - 20.0f, clamped = t > least ? t : least, shifted = clamped + kRounder;
    const F f = clamped - (shifted - kRounder);
    F p = F{} + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    I power;
    std::memcpy(&power, &shifted, sizeof power);
    power = (power + 127) << 23;
    F scale;
    std::memcpy(&scale, &power, sizeof scale);
    const F sum = p * scale * kMostP + kRounder;
    std::memcpy(rounded, &sum, sizeof sum);
    *rounded &= 0xff;
}

// The sum of all lanes, or the most, by halves: one lane after the other each would wait for the last.
template <bool kSum, class V>
SMOLVLA_TARGET SMOLVLA_INLINE void join(V& x, const V& y) {
    if constexpr (kSum) x += y;
    else x = x > y ? x : y;
}
template <bool kSum, int kCount, class T>
SMOLVLA_TARGET SMOLVLA_INLINE T fold(T* lanes) {
    if constexpr (kCount == 4) {
        join<kSum>(lanes[0], lanes[2]);
        join<kSum>(lanes[1], lanes[3]);
        join<kSum>(lanes[0], lanes[1]);
        return lanes[0];
    } else {
        typename HalfOf<T, kCount>::Type low, high;
        std::memcpy(&low, lanes, sizeof low);
        std::memcpy(&high, lanes + kCount / 2, sizeof high);
        join<kSum>(low, high);
        std::memcpy(lanes, &low, sizeof low);
        return fold<kSum, kCount / 2>(lanes);
    }
}

// p8 of one row in a block, its largest score and the sum of p8; scores are integers.
SMOLVLA_TARGET SMOLVLA_INLINE void softmax_block(const int32_t* scores, const float* key_scale, const uint8_t* mask,
                                                 int64_t mask_stride, int64_t keys, float factor, Element* __restrict p,
                                                 float* largest, int32_t* sum) {
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    alignas(64) float s[kBlock];
    alignas(64) int32_t rounded[kBlock];
    for (int j = 0; j < kBlock; ++j) s[j] = static_cast<float>(scores[j]) * key_scale[j];
    // The lowest number, not minus infinity: a row that sees nothing averages all its keys.
    if (mask && mask_stride == 1)
        for (int64_t j = 0; j < keys; ++j) s[j] = mask[j] ? s[j] : kLowest;
    else if (mask)
        for (int64_t j = 0; j < keys; ++j) s[j] = mask[j * mask_stride] ? s[j] : kLowest;
    for (int64_t j = keys; j < kBlock; ++j) s[j] = kLeast;
    F most = F{} + kLeast, x;
    for (int j = 0; j < kBlock; j += kWidth) {
        std::memcpy(&x, s + j, sizeof x);
        most = x > most ? x : most;
    }
    alignas(64) float lanes[kWidth];
    std::memcpy(lanes, &most, sizeof most);
    *largest = fold<false, kWidth>(lanes);
    I counts{}, some;
    for (int j = 0; j < kBlock; j += kWidth) {
        std::memcpy(&x, s + j, sizeof x);
        eight_bits_of_power((x - *largest) * factor, &some);
        counts += some;
        std::memcpy(rounded + j, &some, sizeof some);
    }
    alignas(64) int32_t each[kWidth];
    std::memcpy(each, &counts, sizeof counts);
    *sum = fold<true, kWidth>(each);
    for (int j = 0; j < kBlock; ++j) p[j] = static_cast<Element>(rounded[j]);
}

// Largest scores of a row's blocks become w, times one over the sum of all.
SMOLVLA_TARGET SMOLVLA_INLINE void weigh_blocks(float* __restrict weight, const int32_t* sums, int64_t blocks, float factor) {
    float top = weight[0], total = 0.0f;
    for (int64_t b = 1; b < blocks; ++b) top = weight[b] > top ? weight[b] : top;
    for (int64_t b = 0; b < blocks; ++b) weight[b] = power_of_two((weight[b] - top) * factor);
    for (int64_t b = 0; b < blocks; ++b) total += weight[b] * static_cast<float>(sums[b]);
    const float inverse = 1.0f / total;
    for (int64_t b = 0; b < blocks; ++b) weight[b] *= inverse;
}

SMOLVLA_TARGET void measure(const Attention& a, const Head& h, float* error, float* spread) {
    measure_head(a, h, error, spread);
}

// Ranges of the flat list (one of `heads`, tile of kTileRows rows), a row being (query, head of the group).
SMOLVLA_TARGET void run(const Attention& a, const int64_t* heads, Ranges& ranges) {
    int64_t begin, end;
    if (!ranges.next(begin, end)) return;
    const int64_t words = ceil_div(a.head_dim, kPerWord * S::kStepWords) * S::kStepWords, columns = ceil_div(a.head_dim, kWidth) * kWidth;
    const int64_t blocks = ceil_div(a.keys, kBlock), padded = blocks * kBlock;
    const int64_t rows = a.queries * (a.heads / a.kv_heads), row_tiles = ceil_div(rows, kTileRows);
    // Off a power of two, as in attention_kernel.h.
    const int64_t p_stride = padded / kPerWord + 16;
    Carve carve(Scratch::reserve(padded * words + padded / kPerWord * columns + blocks * columns + 2 * padded + 2 * kMostDim +
                                 kBlockRows * (words + kBlock + p_stride + 2 * blocks + 2 * columns) + 256));
    int32_t* const packed_k = carve.integers(padded * words);
    int32_t* const packed_v = carve.integers(padded / kPerWord * columns);
    float* const value_scale = carve.floats(blocks * columns);
    float* const key_scale = carve.floats(padded);
    int32_t* const start = carve.integers(padded);
    float* const centre = carve.floats(kMostDim);
    float* const zeros = carve.floats(kMostDim);
    int32_t* const packed_q = carve.integers(kBlockRows * words);
    int32_t* const scores = carve.integers(kBlockRows * kBlock);
    int32_t* const p = carve.integers(kBlockRows * p_stride);
    float* const weight = carve.floats(kBlockRows * blocks);
    int32_t* const counts = carve.integers(kBlockRows * blocks);
    int32_t* const products = carve.integers(kBlockRows * columns);
    float* const sums = carve.floats(kBlockRows * columns);
    std::memset(zeros, 0, kMostDim * sizeof(float));
    const auto* const nothing = reinterpret_cast<const int32_t*>(zeros);

    [[maybe_unused]] const S::SetUp set_up;
    int64_t packed_head = -1;
    while (begin < end || ranges.next(begin, end)) {
        const int64_t head = heads[begin / row_tiles], first_tile = begin % row_tiles;
        const int64_t tiles_here = std::min({row_tiles - first_tile, end - begin, int64_t{S::kBlockTiles}});
        const int64_t first = first_tile * kTileRows, count = std::min(rows - first, tiles_here * kTileRows);
        const Head h(a, head);
        begin += tiles_here;
        if (head != packed_head) {
            mean_of_keys(h, centre);
            pack_keys(h, centre, words, packed_k, key_scale, start);
            pack_values(h, columns, packed_v, value_scale);
            packed_head = head;
        }
        float factor[kBlockRows];
        for (int64_t row = 0; row < count; ++row) {
            if (first + row + count < h.rows) fetch(h.q_row(a, first + row + count), h.head_dim);
            pack_query(h.q_row(a, first + row), zeros, h.head_dim, words, packed_q + row * words, factor + row);
            factor[row] = std::max(factor[row] * (a.scale * kLog2E), kLeastFactor);
        }
        // Scores of a block stay in L1, for nothing of another block is needed before the weights.
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t from = b * kBlock, keys = std::min<int64_t>(h.keys - from, kBlock);
            for (int64_t key = from; key < from + kBlock; key += kPanel)
                tiles<true>(packed_q, words, count, packed_k + key * words, kPanel, words, start + key, scores + key - from, kBlock,
                      S::kTileVectors);
            for (int64_t row = 0; row < count; ++row) {
                const uint8_t* mask = h.mask_row(a, first + row);
                softmax_block(scores + row * kBlock, key_scale + from, mask ? mask + from * a.mask_strides[2] : nullptr,
                              a.mask_strides[2], keys, factor[row], reinterpret_cast<Element*>(p + row * p_stride) + from,
                              weight + row * blocks + b, counts + row * blocks + b);
            }
        }
        for (int64_t row = 0; row < count; ++row)
            weigh_blocks(weight + row * blocks, counts + row * blocks, blocks, factor[row]);
        for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t d = 0; d < columns; d += kPanel)
                tiles<false>(p + b * kBlockWords, p_stride, count, packed_v + b * kBlockWords * columns + d, columns,
                      kBlockWords, nothing, products + d, columns, (columns - d) / kWidth);
            const float* const scale = value_scale + b * columns;
            for (int64_t row = 0; row < count; ++row) {
                const float w = weight[row * blocks + b];
                float* __restrict to = sums + row * columns;
                const int32_t* from = products + row * columns;
                if (b == 0)
                    for (int64_t d = 0; d < columns; ++d) to[d] = static_cast<float>(from[d]) * scale[d] * w;
                else
                    for (int64_t d = 0; d < columns; ++d) to[d] += static_cast<float>(from[d]) * scale[d] * w;
            }
        }
        for (int64_t row = 0; row < count; ++row)
            std::memcpy(h.out_row(a, first + row), sums + row * columns, h.head_dim * sizeof(float));
    }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
