// The linear kernel of few rows for one instruction level. No include guard: see each_level.h.
//
// x and nn.Linear's weight are both contiguous along the inputs, so a tile of outputs is summed with the inputs in the
// vector's lanes, and the lanes are added up at the end: no operand is transposed.

#include "cpu/panel_kernel.h"

namespace SMOLVLA_LEVEL_NAMESPACE {

// Accumulators plus one column of operands fit the 32 or 16 vector registers.
constexpr int kRows = S::kRegisters == 32 ? 5 : 4, kOuts = S::kRegisters == 32 ? 5 : 3;
// Sums of a tile, which are added up a vector full at a time.
constexpr int kSums = (kRows * kOuts + kWidth - 1) / kWidth * kWidth;
constexpr int kChunk = kOuts * kUnits;
constexpr int kChunkStride = (kChunk + kWidth - 1) / kWidth * kWidth;

// c[row, out] (+)= x[row, 0:inputs] · w[out, 0:inputs]. Rows and outputs beyond the last repeat it; their results are not
// wanted.
template <bool kPairs, bool kAccumulate, class T>
SMOLVLA_TARGET __attribute__((noinline)) void lane_tile(const T* x, int64_t x_stride, int last_row, const T* w,
                                                        int64_t w_stride, int last_out, int64_t inputs, const T* ahead,
                                                        float* c) {
    const T *xs[kRows], *ws[kOuts];
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r) xs[r] = x + (r < last_row ? r : last_row) * x_stride;
#pragma GCC unroll 5
    for (int o = 0; o < kOuts; ++o) ws[o] = w + (o < last_out ? o : last_out) * w_stride;

    V sums[kSums];
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sums[i] = S::broadcast(0);
    constexpr int64_t step = kPairs ? 2 * kWidth : kWidth;
    int64_t i = 0;
    for (; i + step <= inputs; i += step) {
        __builtin_prefetch(ahead + i, 0, 2);
        V columns[kOuts];
#pragma GCC unroll 5
        for (int o = 0; o < kOuts; ++o) columns[o] = load_words<kPairs>(ws[o] + i);
#pragma GCC unroll 5
        for (int r = 0; r < kRows; ++r) {
            const V row = load_words<kPairs>(xs[r] + i);
#pragma GCC unroll 5
            for (int o = 0; o < kOuts; ++o) sums[r * kOuts + o] = dot<kPairs>(row, columns[o], sums[r * kOuts + o]);
        }
    }
    if (i < inputs) {
        V columns[kOuts];
#pragma GCC unroll 5
        for (int o = 0; o < kOuts; ++o) columns[o] = load_first_words<kPairs>(ws[o] + i, inputs - i);
#pragma GCC unroll 5
        for (int r = 0; r < kRows; ++r) {
            const V row = load_first_words<kPairs>(xs[r] + i, inputs - i);
#pragma GCC unroll 5
            for (int o = 0; o < kOuts; ++o) sums[r * kOuts + o] = dot<kPairs>(row, columns[o], sums[r * kOuts + o]);
        }
    }
    alignas(64) float flat[kSums];
#pragma GCC unroll 8
    for (int j = 0; j < kSums; j += kWidth) S::store(flat + j, S::sum_each(sums + j));
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 5
        for (int o = 0; o < kOuts; ++o) {
            float* const to = c + r * kChunkStride + o;
            *to = kAccumulate ? *to + flat[r * kOuts + o] : flat[r * kOuts + o];
        }
}

// c[row, 0:outs] = x · wᵀ for a chunk of outputs; `after` are the weights that will be wanted next. x lies in parts of so many
// inputs, each with all its rows behind one another.
template <bool kPairs, class T>
SMOLVLA_TARGET void products(const T* x, int64_t part, int64_t rows, const T* w, int64_t outs, int64_t inputs,
                             const T* after, float* c) {
    for (int64_t i = 0; i < inputs; i += part) {
        const int64_t here = std::min(inputs - i, part);
        const auto tile_of = i == 0 ? lane_tile<kPairs, false, T> : lane_tile<kPairs, true, T>;
        const T* const then = i + here < inputs ? w + i + here : after;
        for (int64_t out = 0; out < outs; out += kOuts) {
            const T* const unit = w + out * inputs + i;
            const T* const next = out + kOuts < outs ? unit + kOuts * inputs : then;
            const int last_out = static_cast<int>(std::min<int64_t>(outs - out, kOuts)) - 1;
            for (int64_t row = 0; row < rows; row += kRows) {
                // While this unit is in cache, each tile fetches one row of the next.
                const T* const ahead = next + std::min<int64_t>(row / kRows, last_out) * inputs;
                const int last_row = static_cast<int>(std::min<int64_t>(rows - row, kRows)) - 1;
                tile_of(x + i * rows + row * here, here, last_row, unit, inputs, last_out, here, ahead,
                        c + row * kChunkStride + out);
            }
        }
    }
}

// x / (1 + exp(-z)), the form of both: z = x for silu, and gelu's tanh is a logistic function of twice its argument.
template <Activation kActivation>
SMOLVLA_TARGET SMOLVLA_INLINE V activate(V x) {
    V z = x;
    if constexpr (kActivation == Activation::gelu_tanh) {
        const V slope = S::fma(x * x, S::broadcast(0.07135481627f), S::broadcast(1.59576912161f));
        z = x * slope;
    }
    const V power = S::min(S::broadcast(126.0f), z * S::broadcast(-1.44269504f));
    return x / (S::broadcast(1) + S::template exp2<6>(power, kExp2Degree6));
}

// Whole vectors of a row, the last one beyond `count`.
template <Activation kActivation>
SMOLVLA_TARGET void activate_row(float* c, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth) S::store(c + i, activate<kActivation>(S::load(c + i)));
}

// What follows the product, for outputs [out, out + outs) of a row.
template <class T, class Out>
SMOLVLA_TARGET void finish_row(const Linear& a, int64_t row, int64_t out, int64_t outs, float* sums, const float* up) {
    const T* const bias = static_cast<const T*>(a.bias);
    Out* const y = static_cast<Out*>(a.y) + row * a.outputs + out;
    if (bias)
        for (int64_t i = 0; i < outs; ++i) sums[i] += load(bias + out + i);
    if (a.activation == Activation::silu) activate_row<Activation::silu>(sums, outs);
    if (a.activation == Activation::gelu_tanh) activate_row<Activation::gelu_tanh>(sums, outs);
    if (a.up_weight)
        for (int64_t i = 0; i < outs; ++i) sums[i] *= up[i];
    if (a.residual) {
        const Out* const residual = static_cast<const Out*>(a.residual) + row * a.outputs + out;
        for (int64_t i = 0; i < outs; ++i) store(y + i, sums[i] + load(residual + i));
    } else {
        for (int64_t i = 0; i < outs; ++i) store(y + i, sums[i]);
    }
}

// Rows of x as T, normalised where there is a weight for that; in parts, as `products` reads them.
template <class X, class T>
SMOLVLA_TARGET void prepare_rows(const X* x, const float* norm_weight, float eps, int64_t rows, int64_t inputs,
                                 int64_t part, T* h) {
    constexpr int kLanes = 16;
    for (int64_t row = 0; row < rows; ++row, x += inputs) {
        float scale = 1.0f;
        if (norm_weight) {
            float squares[kLanes] = {};
            int64_t i = 0;
            for (; i + kLanes <= inputs; i += kLanes)
                for (int lane = 0; lane < kLanes; ++lane) squares[lane] += load(x + i + lane) * load(x + i + lane);
            for (; i < inputs; ++i) squares[0] += load(x + i) * load(x + i);
            for (int half = kLanes / 2; half > 0; half /= 2)
                for (int lane = 0; lane < half; ++lane) squares[lane] += squares[lane + half];
            scale = 1.0f / std::sqrt(squares[0] / static_cast<float>(inputs) + eps);
        }
        for (int64_t begin = 0; begin < inputs; begin += part) {
            const int64_t here = std::min(inputs - begin, part);
            T* const to = h + begin * rows + row * here;
            if (norm_weight)
                for (int64_t i = 0; i < here; ++i) store(to + i, load(x + begin + i) * scale * norm_weight[begin + i]);
            else
                for (int64_t i = 0; i < here; ++i) store(to + i, load(x + begin + i));
        }
    }
}

// Ranges of the outputs, in splits, of all rows.
template <bool kPairs, class X, class T, class Out>
SMOLVLA_TARGET void run_lanes(const Linear& a, Ranges& ranges) {
    int64_t first, last;
    if (!ranges.next(first, last)) return;
    const T *weight = static_cast<const T*>(a.weight), *up_weight = static_cast<const T*>(a.up_weight);
    const int64_t fitting = std::max<int64_t>(kBlockBytes / (a.inputs * static_cast<int64_t>(sizeof(T))), kLeastRows);
    const int64_t block = std::min(fitting / kRows, ceil_div(a.rows, kRows)) * kRows;
    const int64_t parts = ceil_div(a.inputs, kPartInputs), part = ceil_div(ceil_div(a.inputs, parts), 32) * 32;
    const bool prepared = a.norm_weight || sizeof(X) != sizeof(T) || parts > 1;
    float* const c = Scratch::reserve(2 * block * kChunkStride + (prepared ? block * a.inputs : 0));
    float* const up = c + block * kChunkStride;
    T* const h = reinterpret_cast<T*>(up + block * kChunkStride);
    // The last tiles may leave columns unwritten that the activation then reads.
    std::fill(c, up, 0.0f);
    int64_t prepared_row = -1;
    do for (int64_t row = 0; row < a.rows; row += block) {
        const int64_t begin = first * kSplit, end = std::min(last * kSplit, a.outputs);
        const int64_t rows = std::min(a.rows - row, block);
        const X* const from = static_cast<const X*>(a.x) + row * a.inputs;
        const T* x = h;
        // Every thread prepares all rows for itself: microseconds, where a barrier would cost as much.
        if (!prepared) x = reinterpret_cast<const T*>(from);
        else if (row != prepared_row)
            prepare_rows(from, static_cast<const float*>(a.norm_weight), a.eps, rows, a.inputs, part, h);
        prepared_row = row;
        for (int64_t out = begin; out < end; out += kChunk) {
            const int64_t outs = std::min<int64_t>(end - out, kChunk);
            const T* const w = weight + out * a.inputs;
            const T* const next_w = out + outs < end ? w + outs * a.inputs : w;
            const T* const up_w = up_weight ? up_weight + out * a.inputs : nullptr;
            products<kPairs>(x, part, rows, w, outs, a.inputs, up_w ? up_w : next_w, c);
            if (up_w) products<kPairs>(x, part, rows, up_w, outs, a.inputs, next_w, up);
            for (int64_t r = 0; r < rows; ++r)
                finish_row<T, Out>(a, row + r, out, outs, c + r * kChunkStride, up + r * kChunkStride);
        }
    } while (ranges.next(first, last));
}

}  // namespace SMOLVLA_LEVEL_NAMESPACE

#include "cpu/linear_panels_kernel.h"
