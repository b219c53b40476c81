// The linear kernels for one instruction level: what comes before and after their products, which all share. No include
// guard: see each_level.h.

#include "cpu/panel_kernel.h"

namespace SMOLVLA_LEVEL_NAMESPACE {

// x / (1 + exp(-z)), the form of both: z = x for silu, and gelu's tanh is a logistic function of twice its argument.
template <Activation kActivation, int kCount>
SMOLVLA_TARGET SMOLVLA_INLINE void activate(float* c) {
    V x[kCount], power[kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
        x[j] = S::load(c + j * kWidth);
        V z = x[j];
        if constexpr (kActivation == Activation::gelu_tanh) {
            const V slope = S::fma(x[j] * x[j], S::broadcast(0.07135481627f), S::broadcast(1.59576912161f));
            z = x[j] * slope;
        }
        power[j] = S::min(S::broadcast(126.0f), z * S::broadcast(-1.44269504f));
    }
    exp2<kCount>(power, kExp2Degree6);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) S::store(c + j * kWidth, x[j] / (S::broadcast(1) + power[j]));
}

// Whole vectors of a row, the last one beyond `count`.
template <Activation kActivation>
SMOLVLA_TARGET void activate_row(float* c, int64_t count) {
    int64_t i = 0;
    for (; i + 3 * kWidth < count; i += 4 * kWidth) activate<kActivation, 4>(c + i);
    for (; i < count; i += kWidth) activate<kActivation, 1>(c + i);
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

// Rows of x as T, normalised where there is a weight for that; in parts, as `lane_products` reads them.
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

}  // namespace SMOLVLA_LEVEL_NAMESPACE

#include "cpu/linear_blocks_kernel.h"
#include "cpu/linear_lanes_kernel.h"
#include "cpu/linear_columns_kernel.h"
#include "cpu/linear_panels_kernel.h"
