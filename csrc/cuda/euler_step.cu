// The end of a denoise step: final RMSNorm, velocity, guidance and Euler, one warp a token and action.
//
// The row's statistic and its product with one row of the projection are sums over the same columns, so one pass takes
// both, and the scale is applied to the finished product: a warp waits for memory once. The statistic is taken anew by
// each of a row's warps, which costs reads from L1; 50 tokens of 32 actions are 1600 warps where tiles for tensor cores
// would fill four. Bound by latency. Guidance reads its weight from memory: a captured graph serves every chunk.
#include "cuda/euler_step.h"

#include "cuda/values.cuh"

namespace smolvla::cuda {
namespace {

// Of one row, to share its h in L1; 4 blocks a row at 32 actions spread 50 rows over all multiprocessors.
constexpr int kWarps = 8;
// One load a lane: 16 bytes of fp32, 8 of the others.
constexpr int kColumns = 4;

__device__ __forceinline__ void load(const float* from, float (&x)[kColumns]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
template <class T>
__device__ __forceinline__ void load(const T* from, float (&x)[kColumns]) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    const uint32_t pairs[] = {four.x, four.y};
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
        x[i] = to_float(T{static_cast<uint16_t>(i % 2 ? pairs[i / 2] >> 16 : pairs[i / 2] & 0xffff)});
}

__device__ __forceinline__ float read(const void* from, int64_t at, DType dtype) {
    if (dtype == DType::float32) return static_cast<const float*>(from)[at];
    if (dtype == DType::bfloat16) return to_float(static_cast<const bf16*>(from)[at]);
    return to_float(static_cast<const fp16*>(from)[at]);
}

// wide: width is a multiple of four, and four columns at a time are aligned in h and both weights
template <class H, class N, class W>
__global__ void __launch_bounds__(32 * kWarps) euler_step_fwd_kernel(const EulerStep p, const bool wide) {
    const int lane = threadIdx.x % 32, row = blockIdx.x;
    const int action = blockIdx.y * kWarps + threadIdx.x / 32;
    if (action >= p.actions) return;  // whole warps, and no barrier follows

    const H* h_row = static_cast<const H*>(p.h) + static_cast<int64_t>(row) * p.width;
    const N* norm_weight = static_cast<const N*>(p.norm_weight);
    const W* weight_row = static_cast<const W*>(p.out_weight) + static_cast<int64_t>(action) * p.width;
    float squares = 0.0f, product = 0.0f;
    if (wide) {
        // Six rounds at 720 columns: all their loads can be on their way at once.
#pragma unroll 6
        for (int col = lane * kColumns; col < p.width; col += 32 * kColumns) {
            float h[kColumns], norm[kColumns], weight[kColumns];
            load(h_row + col, h);
            load(norm_weight + col, norm);
            load(weight_row + col, weight);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                squares = fmaf(h[i], h[i], squares);
                product = fmaf(h[i] * norm[i], weight[i], product);
            }
        }
    } else {
        for (int start = lane * kColumns; start < p.width; start += 32 * kColumns) {
            for (int col = start; col < start + kColumns && col < p.width; ++col) {
                const float h = to_float(h_row[col]);
                squares = fmaf(h, h, squares);
                product = fmaf(h * to_float(norm_weight[col]), to_float(weight_row[col]), product);
            }
        }
    }
    squares = warp_sum(squares);
    product = warp_sum(product);
    if (lane != 0) return;

    const float scale = 1.0f / sqrtf(squares / static_cast<float>(p.width) + p.eps);
    float v = product * scale + read(p.out_bias, action, p.bias_dtype);
    const int64_t place = static_cast<int64_t>(row) * p.actions + action;
    const float x = p.x[place];
    if (p.previous) {
        const int64_t batch = row / p.tokens, token = row % p.tokens;
        const float previous = p.previous[batch * p.previous_batch_stride + token * p.previous_token_stride +
                                          action * p.previous_action_stride];
        const float error = (previous - (x - p.time * v)) * p.weights[token * p.weights_stride];
        v -= *p.strength * error;
    }
    p.v[place] = v;
    p.new_x[place] = x + p.dt * v;
}

template <class T>
bool aligned(const void* address) {
    return reinterpret_cast<uintptr_t>(address) % (kColumns * sizeof(T)) == 0;
}

template <class H, class N, class W>
void start(const EulerStep& p, void* stream) {
    const bool wide =
        p.width % kColumns == 0 && aligned<H>(p.h) && aligned<N>(p.norm_weight) && aligned<W>(p.out_weight);
    Grid grid;
    grid.blocks = dim3(p.rows, (p.actions + kWarps - 1) / kWarps);
    grid.threads = dim3(32 * kWarps);
    launch("euler_step", euler_step_fwd_kernel<H, N, W>, grid, static_cast<cudaStream_t>(stream), p, wide);
}

// f(T{}) with the element type of that name
template <class F>
void with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(float{});
        case DType::bfloat16: return f(bf16{});
        case DType::float16: return f(fp16{});
        default: throw std::invalid_argument("euler_step: not a float");
    }
}

}  // namespace

void euler_step(const EulerStep& p, void* stream) {
    with_type(p.h_dtype, [&](auto h) {
        with_type(p.norm_dtype, [&](auto norm) {
            with_type(p.weight_dtype,
                      [&](auto weight) { start<decltype(h), decltype(norm), decltype(weight)>(p, stream); });
        });
    });
}

}  // namespace smolvla::cuda
