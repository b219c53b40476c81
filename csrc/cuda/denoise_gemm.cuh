// One unit of a matrix product: all rows of the activations times the weight rows of one slab.
//
// The 8 warps of a block split k, in pieces of 32 that they take in turn; each holds the sums of 64 rows in registers, and
// the 8 parts are added up through shared memory in the order of the warps. The sum of an output is the same whatever
// block computes it and however many there are.
//
// Activations go from L2 straight into mma fragments. Which k stands where inside a sum is free as long as both factors
// agree: thread t of a quad holds k = 8t .. 8t + 7 of each 32, one 16-byte load a row, of activations and weights alike.
// The load of the next piece is on its way while the current one is multiplied.
#pragma once

#include "cuda/denoise_plan.cuh"
#include "cuda/values.cuh"

namespace smolvla::cuda::denoise {

template <int PLANES>
struct Sums {
    float of[kRowTiles][PLANES][4];
};

// Values k .. k + 7 of rows first_row + g + 8i for i < 2 * kRowTiles; zeros beyond the matrix, where nothing is read.
__device__ __forceinline__ void load_rows(uint4 (&x)[kRowTiles][2], const void* matrix, int first_row, int rows, int k,
                                          int inputs) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + 16 * i + 8 * half + g;
            const bf16* from = static_cast<const bf16*>(matrix) + static_cast<int64_t>(row) * inputs + k;
            x[i][half] = row < rows && k < inputs ? load_l2(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
        }
    }
}

__device__ __forceinline__ void mma_32(float (&sum)[4], const uint4& upper, const uint4& lower, const uint4& w) {
    mma_bf16(sum, {upper.x, lower.x, upper.y, lower.y}, w.x, w.y);
    mma_bf16(sum, {upper.z, lower.z, upper.w, lower.w}, w.z, w.w);
}

// bf16 activations [rows, inputs], by the planes of each slab in turn. meanwhile(): what can be done while the first of them are on their way.
template <int PLANES, int SLABS, class Meanwhile>
__device__ __forceinline__ void multiply(Sums<PLANES>& sums, const void* activations, int first_row, int rows,
                                         const Product& product, const unsigned char* const (&slabs)[SLABS],
                                         Meanwhile meanwhile) {
    constexpr int kOfSlab = PLANES / SLABS;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, inputs = product.inputs;
    uint4 next[kRowTiles][2];
    load_rows(next, activations, first_row, rows, kChunk * warp + 8 * t, inputs);
    meanwhile();
    for (int start = kChunk * warp; start < inputs; start += kChunk * kWarps) {
        const int k = start + 8 * t;
        uint4 x[kRowTiles][2];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) x[i][0] = next[i][0], x[i][1] = next[i][1];
        load_rows(next, activations, first_row, rows, k + kChunk * kWarps, inputs);
        uint4 w[PLANES];
#pragma unroll
        for (int plane = 0; plane < PLANES; ++plane) {
            const unsigned char* row = slabs[plane / kOfSlab] + (plane % kOfSlab * kUnit + g) * product.pitch;
            w[plane] = k < inputs ? *reinterpret_cast<const uint4*>(row + 2 * k) : uint4{0, 0, 0, 0};
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            if (first_row + 16 * i >= rows) continue;
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) mma_32(sums.of[i][plane], x[i][0], x[i][1], w[plane]);
        }
    }
}

// Activations that are the sum of two bf16 planes, with weights that are bf16 or fp32: fp32's products but for the last
// bits of the mantissa, on tensor cores. Left out is the product of the two low planes, 2^-16 of the whole and less.
template <bool FP32>
__device__ __forceinline__ void multiply_split(Sums<1>& sums, const void* high, const void* low, int first_row, int rows,
                                               const Product& product, const unsigned char* slab) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, inputs = product.inputs;
    for (int start = kChunk * warp; start < inputs; start += kChunk * kWarps) {
        const int k = start + 8 * t;
        uint4 x[kRowTiles][2], y[kRowTiles][2];
        load_rows(x, high, first_row, rows, k, inputs);
        load_rows(y, low, first_row, rows, k, inputs);
        uint4 w = {0, 0, 0, 0}, w_low = {0, 0, 0, 0};
        const unsigned char* row = slab + g * product.pitch;
        if (k < inputs) {
            if (FP32) {
                const float4 a = reinterpret_cast<const float4*>(row + 4 * k)[0];
                const float4 b = reinterpret_cast<const float4*>(row + 4 * k)[1];
                split(a.x, a.y, w.x, w_low.x);
                split(a.z, a.w, w.y, w_low.y);
                split(b.x, b.y, w.z, w_low.z);
                split(b.z, b.w, w.w, w_low.w);
            } else {
                w = *reinterpret_cast<const uint4*>(row + 2 * k);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            if (first_row + 16 * i >= rows) continue;
            // Small terms first.
            if (FP32) mma_32(sums.of[i][0], x[i][0], x[i][1], w_low);
            mma_32(sums.of[i][0], y[i][0], y[i][1], w);
            mma_32(sums.of[i][0], x[i][0], x[i][1], w);
        }
    }
}

// The warps' parts of a row block in shared memory: [kPlanes][kWarps][kRowBlock][kUnit].
struct Parts {
    float* sums;

    static constexpr size_t kBytes = sizeof(float) * kPlanes * kWarps * kRowBlock * kUnit;

    // PLANES of them from `first` on.
    template <int PLANES, int ALL>
    __device__ __forceinline__ void store(const float (&own)[kRowTiles][ALL][4], int first) const {
        const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
            for (int plane = 0; plane < PLANES; ++plane) {
                const float(&sum)[4] = own[i][first + plane];
                float* to = sums + ((plane * kWarps + warp) * kRowBlock + 16 * i + g) * kUnit + 2 * t;
                *reinterpret_cast<float2*>(to) = float2{sum[0], sum[1]};
                *reinterpret_cast<float2*>(to + 8 * kUnit) = float2{sum[2], sum[3]};
            }
        }
    }

    // Two neighbouring columns of a row.
    __device__ __forceinline__ float2 sum(int plane, int row, int column) const {
        float2 total = {0.0f, 0.0f};
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
            const float* from = sums + ((plane * kWarps + warp) * kRowBlock + row) * kUnit + column;
            const float2 part = *reinterpret_cast<const float2*>(from);
            total.x += part.x, total.y += part.y;
        }
        return total;
    }
};

// The sum over the four threads of a quad, in each of them. The other quads of the warp may be elsewhere.
__device__ __forceinline__ float quad_sum(float x) {
    const unsigned quad = 0xfu << (threadIdx.x % 32 / 4 * 4);
    x += __shfl_xor_sync(quad, x, 1);
    return x + __shfl_xor_sync(quad, x, 2);
}

}  // namespace smolvla::cuda::denoise
