#include "cpu/int8_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/integer_level.h"
#include "cpu/integer_simd.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/scratch.h"

namespace smolvla::cpu {
namespace {

// Keys that share a scale of a row's probabilities, and of a channel's values.
constexpr int64_t kBlock = 64;
constexpr int64_t kMostDim = kMostInt8Dim;
constexpr float kMostP = 255.0f, kLog2E = 1.44269504f;
constexpr float kLowest = std::numeric_limits<float>::lowest();
// A query of zeros has equal scores whatever the factor, but what is masked must still be far below them.
constexpr float kLeastFactor = 0x1p-100f;

// One kv head with its queries.
struct Head {
    Head(const Attention& a, int64_t head)
        : keys(a.keys), padded(ceil_div(a.keys, kBlock) * kBlock), head_dim(a.head_dim), group(a.heads / a.kv_heads),
          rows(a.queries * group), k_stride(a.k_strides[1]), v_stride(a.v_strides[1]), batch(head / a.kv_heads),
          first_head(head % a.kv_heads * group),
          k(static_cast<const float*>(a.k) + batch * a.k_strides[0] + head % a.kv_heads * a.k_strides[2]),
          v(static_cast<const float*>(a.v) + batch * a.v_strides[0] + head % a.kv_heads * a.v_strides[2]) {}

    const float* q_row(const Attention& a, int64_t row) const {
        return static_cast<const float*>(a.q) + batch * a.q_strides[0] + row / group * a.q_strides[1] +
               (first_head + row % group) * a.q_strides[2];
    }
    float* out_row(const Attention& a, int64_t row) const {
        return static_cast<float*>(a.out) +
               ((batch * a.queries + row / group) * a.heads + first_head + row % group) * a.head_dim;
    }
    const uint8_t* mask_row(const Attention& a, int64_t row) const {
        return a.mask ? a.mask + batch * a.mask_strides[0] + row / group * a.mask_strides[1] : nullptr;
    }

    int64_t keys, padded, head_dim, group, rows, k_stride, v_stride, batch, first_head;
    const float *k, *v;
};

// Pieces of a thread's scratch, each beginning on a cache line.
class Carve {
public:
    explicit Carve(float* begin) : next_(begin) {}
    float* floats(int64_t count) {
        float* const found = next_;
        next_ += ceil_div(count, 16) * 16;
        return found;
    }
    int32_t* integers(int64_t count) { return reinterpret_cast<int32_t*>(floats(count)); }

private:
    float* next_;
};

SMOLVLA_INLINE float scale_of(float largest) { return largest < kSmallest ? 0.0f : largest / kLargest; }
SMOLVLA_INLINE float inverse_of(float largest) { return largest < kSmallest ? 0.0f : kLargest / largest; }

// Magnitudes compare like their bits.
SMOLVLA_INLINE float largest_of(const float* x, const float* centre, int64_t count) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t bits = bits_of(x[i] - centre[i]) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return float_of(largest);
}

// Rows of a head lie far from each other, and no hardware fetches the next one unasked.
SMOLVLA_INLINE void fetch(const float* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 16) __builtin_prefetch(row + d);
}
constexpr int64_t kAhead = 16;
SMOLVLA_INLINE void fetch_ahead(const float* rows, int64_t stride, int64_t row, int64_t count, int64_t head_dim) {
    if (row + kAhead < count) fetch(rows + (row + kAhead) * stride, head_dim);
}

SMOLVLA_INLINE void mean_of_keys(const Head& h, float* __restrict mean) {
    for (int64_t d = 0; d < h.head_dim; ++d) mean[d] = 0.0f;
    for (int64_t key = 0; key < h.keys; ++key) {
        fetch_ahead(h.k, h.k_stride, key, h.keys, h.head_dim);
        for (int64_t d = 0; d < h.head_dim; ++d) mean[d] += h.k[key * h.k_stride + d];
    }
    for (int64_t d = 0; d < h.head_dim; ++d) mean[d] /= static_cast<float>(h.keys);
}

// So many sums, added in one order, have the same bits at every level.
constexpr int64_t kLanes = 16;
struct Lanes {
    float each[kLanes] = {};
    SMOLVLA_INLINE float sum() {
        for (int64_t half = kLanes / 2; half > 0; half /= 2)
            for (int64_t j = 0; j < half; ++j) each[j] += each[j + half];
        return each[0];
    }
};

// Both of a multiple of kLanes elements.
SMOLVLA_INLINE float dot(const float* a, const float* b, int64_t count) {
    Lanes sums;
    for (int64_t i = 0; i < count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) sums.each[j] += a[i + j] * b[i + j];
    return sums.sum();
}

SMOLVLA_INLINE float square(float x) { return x * x; }

// The spread of a row's scores s over the n keys that it sees, and the square of what rounding does to its output. A number
// rounded to a multiple of t is off by t/sqrt(12), so score s by the root of (sq²·|k[s]|² + sk[s]²·|q|²)·scale²/12, and an
// output, for values of 1, by the root of the sum over s of the square of that times p[s]².
//   s, seen  [width], width a multiple of kLanes; behind the last key nothing is seen      key_square, key_step  [width]
SMOLVLA_INLINE void measure_row(const Attention& a, const Head& h, int64_t row, int64_t width, float* __restrict s,
                                float* __restrict seen, const float* key_square, const float* key_step, float query_square,
                                float query_step, float* error, float* spread) {
    const uint8_t* mask = h.mask_row(a, row);
    for (int64_t key = 0; key < h.keys; ++key) seen[key] = !mask || mask[key * a.mask_strides[2]] ? 1.0f : 0.0f;
    Lanes n, sum, squares, total, moved;
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t key = 0; key < width; key += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) {
            s[key + j] *= a.scale * seen[key + j];
            n.each[j] += seen[key + j];
            sum.each[j] += s[key + j];
        }
    for (int64_t key = 0; key < h.keys; ++key) top = seen[key] != 0.0f && s[key] > top ? s[key] : top;
    const float count = n.sum(), mean = sum.sum() / std::max(count, 1.0f);
    for (int64_t key = 0; key < width; key += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) {
            const int64_t i = key + j;
            const float below = s[i] - top;  // of a key that is not seen it may be above
            const float p = power_of_two((below < 0.0f ? below : 0.0f) * kLog2E) * seen[i];
            squares.each[j] += square(s[i] - mean) * seen[i];
            total.each[j] += p;
            moved.each[j] += p * p * (query_step * key_square[i] + key_step[i] * query_square);
        }
    *spread = std::sqrt(squares.sum() / std::max(count, 1.0f));
    // One that sees nothing has no score that could be off.
    *error = count > 0.0f ? square(a.scale) / 12.0f * moved.sum() / square(total.sum()) : 0.0f;
}

// Queries of a kv head that are looked at, evenly spaced, all query heads of the group together.
constexpr int64_t kSamples = kLanes;

SMOLVLA_INLINE void measure_head(const Attention& a, const Head& h, float* error, float* spread) {
    const int64_t width = ceil_div(h.head_dim, kLanes) * kLanes, keys = ceil_div(h.keys, kLanes) * kLanes;
    const int64_t each = std::min(a.queries, ceil_div(kSamples, h.group));
    const int64_t samples = each * h.group, lanes = ceil_div(samples, kSamples) * kSamples;
    Carve carve(Scratch::reserve(3 * width + 3 * keys + lanes * (2 * width + keys) + 144));
    float* const mean = carve.floats(width);
    float* const zeros = carve.floats(width);
    float* const k = carve.floats(width);
    float* const key_square = carve.floats(keys);
    float* const key_step = carve.floats(keys);
    float* const seen = carve.floats(keys);
    float* const q = carve.floats(lanes * width);
    float* const columns = carve.floats(width * lanes);  // of q
    float* const s = carve.floats(samples * keys);
    const auto row_of = [&](int64_t i) { return i % each * a.queries / each * h.group + i / each; };
    std::memset(zeros, 0, width * sizeof(float));
    std::memset(k, 0, width * sizeof(float));
    std::memset(q, 0, lanes * width * sizeof(float));
    std::memset(s, 0, samples * keys * sizeof(float));
    for (float* const each : {key_square, key_step, seen}) std::fill(each + h.keys, each + keys, 0.0f);
    mean_of_keys(h, mean);
    float finite = 0.0f;
    for (int64_t row = 0; row < h.rows; ++row) finite += 0.0f * largest_of(h.q_row(a, row), zeros, h.head_dim);
    for (int64_t i = 0; i < samples; ++i) std::memcpy(q + i * width, h.q_row(a, row_of(i)), h.head_dim * sizeof(float));
    for (int64_t i = 0; i < lanes; ++i)
        for (int64_t d = 0; d < width; ++d) columns[d * lanes + i] = q[i * width + d];
    for (int64_t key = 0; key < h.keys; ++key) {
        fetch_ahead(h.v, h.v_stride, key, h.keys, h.head_dim);
        for (int64_t d = 0; d < h.head_dim; ++d) k[d] = h.k[key * h.k_stride + d] - mean[d];
        for (int64_t first = 0; first < samples; first += kSamples) {
            float scores[kSamples] = {};
            for (int64_t d = 0; d < h.head_dim; ++d)
                for (int64_t i = 0; i < kSamples; ++i) scores[i] += k[d] * columns[d * lanes + first + i];
            for (int64_t i = first; i < std::min(samples, first + kSamples); ++i) s[i * keys + key] = scores[i - first];
        }
        key_square[key] = dot(k, k, width);
        key_step[key] = square(largest_of(k, zeros, h.head_dim) / kLargest);
        finite += 0.0f * key_step[key] + 0.0f * largest_of(h.v + key * h.v_stride, zeros, h.head_dim);
    }
    *error = *spread = 0.0f;
    for (int64_t first = 0; first < samples; first += each) {
        float moved = 0.0f, spreads = 0.0f;
        for (int64_t i = first; i < first + each; ++i) {
            float* const row = q + i * width;
            const float step = square(largest_of(row, zeros, h.head_dim) / kLargest);
            float error_of_row, spread_of_row;
            measure_row(a, h, row_of(i), keys, s + i * keys, seen, key_square, key_step, dot(row, row, width), step,
                        &error_of_row, &spread_of_row);
            moved += error_of_row / static_cast<float>(each);
            spreads += square(spread_of_row) / static_cast<float>(each);
        }
        *error = std::max(*error, std::sqrt(moved));
        *spread = std::max(*spread, std::sqrt(spreads));
    }
    *error += finite;
    *spread += finite;
}

// Half of so many lanes. Compilers take no size of a vector from a template.
template <class T, int kCount>
struct HalfOf;
template <>
struct HalfOf<float, 16> {
    using Type = float __attribute__((vector_size(32)));
};
template <>
struct HalfOf<float, 8> {
    using Type = float __attribute__((vector_size(16)));
};
template <>
struct HalfOf<int32_t, 16> {
    using Type = int32_t __attribute__((vector_size(32)));
};
template <>
struct HalfOf<int32_t, 8> {
    using Type = int32_t __attribute__((vector_size(16)));
};

#define SMOLVLA_KERNEL "cpu/int8_attention_kernel.h"
#define SMOLVLA_KERNEL_HAS_AMX
#include "cpu/each_integer_level.h"

struct Kernel {
    template <class Level>
    Kernel(Level, void (*measure)(const Attention&, const Head&, float*, float*),
           void (*run)(const Attention&, const int64_t*, Ranges&))
        : measure(measure), run(run), tile_rows(Level::kTileRows), block_tiles(Level::kBlockTiles) {}
    void (*measure)(const Attention&, const Head&, float*, float*);
    void (*run)(const Attention&, const int64_t*, Ranges&);
    int64_t tile_rows, block_tiles;
};

Kernel kernel(IntegerLevel level) {
    switch (level) {
#if defined(__x86_64__)
#if defined(SMOLVLA_HAS_AMX)
        case IntegerLevel::amx: return {IntegerAmx(), amx::measure, amx::run};
#endif
        case IntegerLevel::avx512_vnni: return {IntegerAvx512Vnni(), avx512_vnni::measure, avx512_vnni::run};
#if defined(SMOLVLA_HAS_AVX2_VNNI)
        case IntegerLevel::avx2_vnni: return {IntegerAvx2Vnni(), avx2_vnni::measure, avx2_vnni::run};
#endif
        case IntegerLevel::avx2: return {IntegerAvx2(), avx2::measure, avx2::run};
#endif
        default: return {IntegerBaseline(), baseline::measure, baseline::run};
    }
}

void attend(const Attention& a, const Kernel& kernel, float limit, float* error, float* spread, int num_threads) {
    const int64_t heads = a.batch * a.kv_heads;
    parallel_rows(heads, a.keys * a.head_dim * 4, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t head = begin; head < end; ++head)
            kernel.measure(a, Head(a, head), error + head, spread + head);
    });
    if (!a.out) return;
    std::vector<int64_t> narrow, wide;
    // So written that NaN is wide, and infinity whatever the limit.
    for (int64_t head = 0; head < heads; ++head)
        (error[head] <= limit && std::isfinite(error[head]) && a.head_dim <= kMostDim ? narrow : wide).push_back(head);
    if (!wide.empty()) attention_of_heads(a, wide, num_threads);
    const int64_t tiles = ceil_div(a.queries * (a.heads / a.kv_heads), kernel.tile_rows);
    // As in attention.cpp.
    parallel_ranges(static_cast<int64_t>(narrow.size()) * tiles, kernel.tile_rows * a.keys * 4, kernel.block_tiles,
                    tiles, num_threads, [&](Ranges& ranges) { kernel.run(a, narrow.data(), ranges); });
}

}  // namespace

void int8_attention(const Attention& a, float limit, float* error, float* spread, int num_threads) {
    attend(a, kernel(integer_level()), limit, error, spread, num_threads);
}

}  // namespace smolvla::cpu
