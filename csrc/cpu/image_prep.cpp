// A row of the result is made in two steps: the two rows of the frame that it lies between are blended into floats, over
// whole rows and so in vectors, then their columns are blended. The floats of one row of three channels stay in L1; the
// frame is read about once from memory and the result written once.
#include "cpu/image_prep.h"

#include <algorithm>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace smolvla::cpu {
namespace {

SMOLVLA_INLINE float value(const float* p) { return *p; }
SMOLVLA_INLINE float value(const uint8_t* p) { return static_cast<float>(*p) / 255.0f; }

// Where a target index lies between two source indices: weights low_weight of the first and weight of the second. Where
// the size stays, both are the index itself, as in torch: nothing that is not a number comes in from a neighbour.
struct Source {
    int32_t low, high;
    float low_weight, weight;
};

SMOLVLA_INLINE Source source(int64_t target, int64_t size, int64_t new_size) {
    const float scale = static_cast<float>(size) / static_cast<float>(new_size);
    // In double and rounded once: what torch's fused multiply-add gives, whether there is one here or not.
    const float place =
        std::max(static_cast<float>(static_cast<double>(scale) * (static_cast<double>(target) + 0.5) - 0.5), 0.0f);
    const int32_t last = static_cast<int32_t>(size - 1), low = std::min(static_cast<int32_t>(place), last);
    const float weight = std::min(place - static_cast<float>(low), 1.0f);
    return {low, size == new_size ? low : std::min(low + 1, last), 1.0f - weight, weight};
}

template <class X>
SMOLVLA_INLINE void blend_rows(const X* upper, const X* lower, float upper_weight, float lower_weight, int64_t count,
                               float* __restrict v) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] = upper_weight * value(upper + i) + lower_weight * value(lower + i);
}

template <class X>
SMOLVLA_INLINE void copy_row(const X* x, int64_t count, float* __restrict v) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) v[i] = value(x + i);
}

// Rows [begin, end) of the flat list (image, row of the result), each of three channels.
template <class X, class Y>
SMOLVLA_INLINE void make_rows(const ImagePrep& a, int64_t begin, int64_t end) {
    const int64_t left = a.width - a.new_width, top = a.height - a.new_height;
    const bool as_it_is = a.height == a.frame_height && a.width == a.frame_width;
    const bool packed = a.col_stride != 1;  // one run of three channels a row, else three runs
    const int64_t runs = packed ? 1 : 3, run_size = packed ? 3 * a.frame_width : a.frame_width;

    float* const v = Scratch::reserve(3 * a.frame_width + 4 * a.new_width);
    float* const low_weight = v + 3 * a.frame_width;
    float* const weight = low_weight + a.new_width;
    int32_t* const low = reinterpret_cast<int32_t*>(weight + a.new_width);
    int32_t* const high = low + a.new_width;
    const int32_t step = packed ? 3 : 1;
    for (int64_t i = 0; i < a.new_width; ++i) {
        const Source s = source(i, a.frame_width, a.new_width);
        low[i] = s.low * step;
        high[i] = s.high * step;
        low_weight[i] = s.low_weight;
        weight[i] = s.weight;
    }
    for (int64_t row = begin; row < end; ++row) {
        const int64_t image = row / a.height, target = row % a.height;
        Y* const y = static_cast<Y*>(a.y) + (image * 3 * a.height + target) * a.width;
        const int64_t plane = a.height * a.width;
        if (target < top) {
            for (int channel = 0; channel < 3; ++channel)
                for (int64_t i = 0; i < a.width; ++i) store(y + channel * plane + i, -1.0f);
            continue;
        }
        const X* const x = static_cast<const X*>(a.x) + image * a.batch_stride;
        const Source s = source(target - top, a.frame_height, a.new_height);
        for (int64_t run = 0; run < runs; ++run) {
            const X* const from = x + run * a.channel_stride;
            float* const to = v + run * a.frame_width;
            if (as_it_is) copy_row(from + (target - top) * a.row_stride, run_size, to);
            else
                blend_rows(from + s.low * a.row_stride, from + s.high * a.row_stride, s.low_weight, s.weight, run_size, to);
        }
        for (int channel = 0; channel < 3; ++channel) {
            Y* const to = y + channel * plane;
            const float* const from = v + channel * (packed ? 1 : a.frame_width);
            for (int64_t i = 0; i < left; ++i) store(to + i, -1.0f);
            if (as_it_is) {
                for (int64_t i = 0; i < a.new_width; ++i) store(to + left + i, from[low[i]] * 2.0f - 1.0f);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < a.new_width; ++i) {
                    const float blended = low_weight[i] * from[low[i]] + weight[i] * from[high[i]];
                    store(to + left + i, blended * 2.0f - 1.0f);
                }
            }
        }
    }
}

template <class X, class Y>
void rows_baseline(const ImagePrep& a, int64_t begin, int64_t end) {
    make_rows<X, Y>(a, begin, end);
}
template <class X, class Y>
SMOLVLA_AVX2 void rows_avx2(const ImagePrep& a, int64_t begin, int64_t end) {
    make_rows<X, Y>(a, begin, end);
}
template <class X, class Y>
SMOLVLA_AVX512 void rows_avx512(const ImagePrep& a, int64_t begin, int64_t end) {
    make_rows<X, Y>(a, begin, end);
}

}  // namespace

template <class X, class Y>
void image_prep(const ImagePrep& a, int num_threads) {
    const auto run = pick(rows_baseline<X, Y>, rows_avx2<X, Y>, rows_avx512<X, Y>);
    parallel_rows(a.batch * a.height, 3 * a.width, num_threads,
                  [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

template void image_prep<uint8_t, float>(const ImagePrep&, int);
template void image_prep<uint8_t, bfloat16>(const ImagePrep&, int);
template void image_prep<float, float>(const ImagePrep&, int);
template void image_prep<float, bfloat16>(const ImagePrep&, int);

}  // namespace smolvla::cpu
