// What attention_tile.cuh feeds to mma: eight values of a row as they lie in memory, 16-bit or fp32 split in two.
#pragma once

#include <type_traits>

#include "cuda/values.cuh"

namespace smolvla::cuda {
namespace attention {

// Of keys that a row does not see: finite, so that a row that sees none weighs all alike. Keys beyond the last: -inf.
constexpr float kLowest = -3.402823466e38f;

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same<T, fp16>::value) return pack_fp16(low, high);
    return pack_bf16(low, high);
}
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, fp16>::value)
        mma_fp16(d, a, b0, b1);
    else
        mma_bf16(d, a, b0, b1);
}

// Eight consecutive values of a row as they lie in memory.
template <class T>
struct Eight {
    static constexpr int kLoads = sizeof(T) / 2, kPlanes = sizeof(T) / 2;
    uint4 raw[kLoads];

    __device__ __forceinline__ void load(const T* from, bool wanted) {
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            raw[i] = wanted ? load_l2(reinterpret_cast<const uint4*>(from) + i) : uint4{0, 0, 0, 0};
    }
    __device__ __forceinline__ uint32_t word(int i) const {
        const uint4& four = raw[i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    }
    __device__ __forceinline__ float value(int i) const { return __uint_as_float(word(i)); }  // T = float
    // Values 2i and 2i + 1.
    __device__ __forceinline__ void pair(int i, uint32_t (&planes)[kPlanes]) const {
        if constexpr (kPlanes == 2)
            split(value(2 * i), value(2 * i + 1), planes[0], planes[1]);
        else
            planes[0] = word(i);
    }
    // Value i of this row and of another.
    __device__ __forceinline__ void pair(const Eight& other, int i, uint32_t (&planes)[kPlanes]) const {
        if constexpr (kPlanes == 2) {
            split(value(i), other.value(i), planes[0], planes[1]);
        } else {
            const uint32_t a = word(i / 2), b = other.word(i / 2);
            planes[0] = i % 2 ? (a >> 16) | (b & 0xffff0000u) : (a & 0xffff) | (b << 16);
        }
    }
};

// d += a * b, each the sum of its planes, without the product of two low planes.
template <class T, int A, int B>
__device__ __forceinline__ void mma_planes(float (&d)[4], const uint32_t (&a)[A][4], const uint32_t (&b0)[B],
                                           const uint32_t (&b1)[B]) {
    // Small terms first.
    if constexpr (A == 2) mma<T>(d, a[1], b0[0], b1[0]);
    if constexpr (B == 2) mma<T>(d, a[0], b0[1], b1[1]);
    mma<T>(d, a[0], b0[0], b1[0]);
}

}  // namespace attention
}  // namespace smolvla::cuda
