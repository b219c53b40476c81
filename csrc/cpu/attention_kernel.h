// The attention kernel for one instruction level. No include guard: see each_level.h.
//
// One kv head is packed at a time: K transposed into panels, so that a register tile of scores is an outer product, and V
// in panels of its columns. Both products then run in the same tile. A block of score rows stays whole in L2, so the softmax
// knows its maximum before it starts and nothing is rescaled.

#include "cpu/panel_kernel.h"

namespace SMOLVLA_LEVEL_NAMESPACE {

// The lines of a head's row into L1, early: those of other heads lie between it and the next.
template <class T>
SMOLVLA_INLINE void fetch_head(const T* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// Panels [words of keys, kPanel] of columns; columns = head_dim rounded up to whole vectors with zeros. A tile reads one panel:
// its rows are adjacent, as rows at the distance of head_dim would share a few sets of the L1 cache.
template <bool kPairs, class T>
SMOLVLA_TARGET void pack_values(const T* v, int64_t stride, int64_t keys, int64_t head_dim, int64_t columns, float* to) {
    constexpr int64_t per_word = kPairs ? 2 : 1, kAhead = 16;
    const int64_t panel = ceil_div(keys, per_word) * kPanel;
    for (int64_t key = 0; key < keys; key += per_word, to += kPanel) {
        const T* const row = v + key * stride;
        for (int64_t next = key + kAhead; next < std::min(keys, key + kAhead + per_word); ++next)
            fetch_head(v + next * stride, head_dim);
        for (int64_t d = 0; d < columns; d += kWidth) {
            const int64_t count = std::min<int64_t>(head_dim - d, kWidth);
            float* const vector = to + d / kPanel * panel + d % kPanel;
            if constexpr (!kPairs) {
                S::store(vector, count == kWidth ? S::load(row + d) : load_first_words<false>(row + d, count));
            } else {
#if SMOLVLA_LEVEL_IS_512
                const auto low = _mm512_castps_si512(S::load_first(row + d, count));
                const auto high = key + 1 < keys ? _mm512_castps_si512(S::load_first(row + stride + d, count))
                                                 : _mm512_setzero_si512();
                S::store(vector, _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(low, 16), high)));
#else
                T pairs[2 * kWidth] = {};
                for (int64_t i = 0; i < count; ++i) pairs[2 * i] = row[d + i];
                if (key + 1 < keys)
                    for (int64_t i = 0; i < count; ++i) pairs[2 * i + 1] = row[stride + d + i];
                std::memcpy(vector, pairs, sizeof pairs);
#endif
            }
        }
    }
}

template <bool kPairs, class T>
SMOLVLA_TARGET void pack_query(const T* q, int64_t head_dim, float* to) {
    if constexpr (kPairs) {
        to[(head_dim - 1) / 2] = 0.0f;
        std::memcpy(to, q, head_dim * sizeof(T));
    } else {
        for (int64_t d = 0; d < head_dim; ++d) to[d] = load(q + d);
    }
}

// exp2(factor·(score - subtrahend)) of kCount vectors of a row, added to the sums.
template <bool kPairs, int kCount>
SMOLVLA_TARGET SMOLVLA_INLINE void exp_row(float* scores, int64_t i, V subtrahend, V factor, V* sums) {
    V p[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) p[j] = (S::load(scores + i + j * kWidth) - subtrahend) * factor;
    if constexpr (kPairs) exp2<kCount>(p, kExp2Degree4);
    else exp2<kCount>(p, kExp2Degree6);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
        sums[j % 2] = sums[j % 2] + p[j];
        if constexpr (!kPairs) S::store(scores + i + j * kWidth, p[j]);
        else if (j % 2) S::store(scores + (i + (j - 1) * kWidth) / 2, S::to_pairs(p[j - 1], p[j]));
    }
}

// exp(scale·(score - largest)) over a row padded to whole pairs of vectors; returns the sum. As pairs, in place.
template <bool kPairs>
SMOLVLA_TARGET float softmax_row(float* scores, int64_t padded, float scale) {
    const V lowest = S::broadcast(-std::numeric_limits<float>::infinity());
    V largest[4] = {lowest, lowest, lowest, lowest};
    int64_t i = 0;
    for (; i + 4 * kWidth <= padded; i += 4 * kWidth)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) largest[j] = S::max(S::load(scores + i + j * kWidth), largest[j]);
    for (; i < padded; i += kWidth) largest[0] = S::max(S::load(scores + i), largest[0]);
    float lanes[kWidth];
    S::store(lanes, S::max(S::max(largest[0], largest[1]), S::max(largest[2], largest[3])));
    float top = lanes[0];
    for (int lane = 1; lane < kWidth; ++lane) top = std::max(top, lanes[lane]);

    // The difference first: equal scores must give exactly 1, however large they are.
    const V subtrahend = S::broadcast(top), factor = S::broadcast(scale * 1.44269504f);
    V sums[2] = {S::broadcast(0), S::broadcast(0)};
    for (i = 0; i + 4 * kWidth <= padded; i += 4 * kWidth) exp_row<kPairs, 4>(scores, i, subtrahend, factor, sums);
    for (; i < padded; i += 2 * kWidth) exp_row<kPairs, 2>(scores, i, subtrahend, factor, sums);
    S::store(lanes, sums[0] + sums[1]);
    for (int half = kWidth / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

SMOLVLA_TARGET SMOLVLA_INLINE void apply_mask(float* scores, const uint8_t* mask, int64_t stride, int64_t keys) {
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    if (stride == 1) {
        for (int64_t s = 0; s < keys; ++s) scores[s] = mask[s] ? scores[s] : kLowest;
    } else {
        for (int64_t s = 0; s < keys; ++s) scores[s] = mask[s * stride] ? scores[s] : kLowest;
    }
}

// Ranges of the flat list (batch, kv head, tile of six rows), a row being (query, head of the group).
template <bool kPairs, class T>
SMOLVLA_TARGET void run(const Attention& a, Ranges& ranges) {
    int64_t begin, end;
    if (!ranges.next(begin, end)) return;
    constexpr int64_t per_word = kPairs ? 2 : 1;
    const int64_t group = a.heads / a.kv_heads, rows = a.queries * group, row_tiles = ceil_div(rows, kTileRows);
    const int64_t q_words = ceil_div(a.head_dim, per_word), p_words = ceil_div(a.keys, per_word);
    const int64_t columns = ceil_div(a.head_dim, kWidth) * kWidth, panels = ceil_div(a.keys, kPanel);
    const int64_t padded = ceil_div(a.keys, 2 * kWidth) * 2 * kWidth;
    // Off a power of two: rows a multiple of 4 KiB apart would share a few sets of the L1 cache.
    const int64_t score_stride = std::max(padded, panels * kPanel) + kWidth;

    const int64_t key_words = panels * q_words * kPanel, value_words = ceil_div(columns, kPanel) * kPanel * p_words;
    float* base = Scratch::reserve(key_words + value_words + kBlockRows * (q_words + score_stride + columns) + 64);
    float* const packed_k = base;
    float* const packed_v = packed_k + key_words;
    float* const scores = packed_v + value_words;
    float* const sums = scores + kBlockRows * score_stride;
    float* const packed_q = sums + kBlockRows * columns;

    int64_t packed_head = -1;
    while (begin < end || ranges.next(begin, end)) {
        const int64_t nth = begin / row_tiles, first_tile = begin % row_tiles, head = a.only ? a.only[nth] : nth;
        const int64_t tiles_here = std::min({row_tiles - first_tile, end - begin, int64_t{kBlockRows / kTileRows}});
        const int64_t first = first_tile * kTileRows, count = std::min(rows - first, tiles_here * kTileRows);
        const int64_t b = head / a.kv_heads, kv_head = head % a.kv_heads;
        begin += tiles_here;
        if (head != packed_head) {
            const T* k = static_cast<const T*>(a.k) + b * a.k_strides[0] + kv_head * a.k_strides[2];
            for (int64_t p = 0; p < panels; ++p) {
                for (int64_t key = (p + 1) * kPanel; key < std::min(a.keys, (p + 2) * kPanel); ++key)
                    fetch_head(k + key * a.k_strides[1], a.head_dim);
                pack_panel<kPairs>(k + p * kPanel * a.k_strides[1], a.k_strides[1],
                                   std::min<int64_t>(a.keys - p * kPanel, kPanel), a.head_dim,
                                   packed_k + p * q_words * kPanel);
            }
            const T* v = static_cast<const T*>(a.v) + b * a.v_strides[0] + kv_head * a.v_strides[2];
            pack_values<kPairs>(v, a.v_strides[1], a.keys, a.head_dim, columns, packed_v);
            packed_head = head;
        }
        for (int64_t row = 0; row < count; ++row) {
            const int64_t t = (first + row) / group, h = kv_head * group + (first + row) % group;
            const T* q = static_cast<const T*>(a.q) + b * a.q_strides[0] + t * a.q_strides[1] + h * a.q_strides[2];
            const int64_t next = t + ceil_div(count, group);
            if (next < a.queries) fetch_head(q + (next - t) * a.q_strides[1], a.head_dim);
            pack_query<kPairs>(q, a.head_dim, packed_q + row * q_words);
        }
        for (int64_t p = 0; p < panels; ++p)
            product<kPairs>(packed_q, q_words, count, packed_k + p * q_words * kPanel, kPanel, q_words, kScoreWords,
                            scores + p * kPanel, score_stride, ceil_div(a.keys - p * kPanel, kWidth));
        float inverse[kBlockRows];
        for (int64_t row = 0; row < count; ++row) {
            float* const row_scores = scores + row * score_stride;
            if (a.mask) {
                const uint8_t* mask = a.mask + b * a.mask_strides[0] + (first + row) / group * a.mask_strides[1];
                apply_mask(row_scores, mask, a.mask_strides[2], a.keys);
            }
            // Minus infinity, not the lowest number: padding must not count in a row that sees nothing.
            std::fill(row_scores + a.keys, row_scores + padded, -std::numeric_limits<float>::infinity());
            inverse[row] = 1.0f / softmax_row<kPairs>(row_scores, padded, a.scale);
        }
        for (int64_t d = 0; d < columns; d += kPanel)
            product<kPairs>(scores, score_stride, count, packed_v + d * p_words, kPanel, p_words, kValueWords, sums + d, columns,
                            (columns - d) / kWidth);
        for (int64_t row = 0; row < count; ++row) {
            const int64_t t = (first + row) / group, h = kv_head * group + (first + row) % group;
            T* out = static_cast<T*>(a.out) + ((b * a.queries + t) * a.heads + h) * a.head_dim;
            for (int64_t d = 0; d < a.head_dim; ++d) store(out + d, sums[row * columns + d] * inverse[row]);
        }
    }
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE
