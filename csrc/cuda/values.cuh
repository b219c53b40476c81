// What several kernels make of values: halves of a pair, fp32 in two planes, either dtype read, a warp's sum.
#pragma once

#include "cuda/ptx.cuh"

namespace smolvla::cuda {

template <class T>
__device__ __forceinline__ float low_half(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair & 0xffff)});
}
template <class T>
__device__ __forceinline__ float high_half(uint32_t pair) {
    return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

// Two fp32 as bf16 planes, high + low: 16 bits of each mantissa.
__device__ __forceinline__ void split(float x, float y, uint32_t& high, uint32_t& low) {
    high = pack_bf16(x, y);
    low = pack_bf16(x - low_half<bf16>(high), y - high_half<bf16>(high));
}

__device__ __forceinline__ float read(const void* from, int64_t at, bool fp32) {
    return fp32 ? static_cast<const float*>(from)[at] : to_float(static_cast<const bf16*>(from)[at]);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

}  // namespace smolvla::cuda
