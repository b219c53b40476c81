// Instructions of a whole warp.
#include "planted.h"

namespace planted {
namespace {

constexpr unsigned ALL = 0xffffffffu;

__global__ void lane_missing_in_mask(Args p) {
    const unsigned mask = p.mended ? ALL : 0xfffffffeu;
    p.a[threadIdx.x] = __shfl_xor_sync(mask, threadIdx.x, 1);
}

__global__ void reads_lane_outside_mask(Args p) {
    if (threadIdx.x < 16) p.a[threadIdx.x] = __shfl_sync(0xffffu, threadIdx.x, p.mended ? 15 : 16);
}

__global__ void reads_lane_that_ended(Args p) {
    if (threadIdx.x >= 24 && !p.mended) return;
    p.a[threadIdx.x] = __shfl_down_sync(ALL, threadIdx.x, 8);
}

__global__ void lane_at_a_barrier(Args p) {
    if (threadIdx.x == 5 && !p.mended) __syncthreads();
    p.a[threadIdx.x] = __ballot_sync(ALL, 1);
    if (threadIdx.x != 5 || p.mended) __syncthreads();
}

__global__ void different_masks(Args p) {
    const unsigned mask = p.mended || threadIdx.x < 16 ? ALL : 0xffff8000u;
    __syncwarp(mask);
}

__global__ void different_instructions(Args p) {
    if (p.mended || threadIdx.x < 16)
        p.a[threadIdx.x] = __shfl_sync(ALL, 1u, 0);
    else
        p.a[threadIdx.x] = static_cast<uint32_t>(__any_sync(ALL, 1));
}

__global__ void odd_width(Args p) { p.a[threadIdx.x] = __shfl_xor_sync(ALL, threadIdx.x, 1, p.mended ? 8 : 12); }

__global__ void mma_of_half_a_warp(Args p) {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (!p.mended && threadIdx.x >= 16) return;
    mma_bf16(d, a, 0, 0);
    p.a[threadIdx.x] = static_cast<uint32_t>(d[0]);
}

__global__ void ldmatrix_of_global_memory(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    for (unsigned i = 0; i < 4; ++i) words[4 * threadIdx.x + i] = i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4_trans(r, p.mended ? words + 4 * threadIdx.x : p.b);
    p.a[threadIdx.x] = r[0];
}

__global__ void ldmatrix_misaligned(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    for (unsigned i = 0; i < 4; ++i) words[4 * threadIdx.x + i] = i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, words + 4 * (threadIdx.x % 31) + (p.mended ? 0 : 2));
    p.a[threadIdx.x] = r[0];
}

}  // namespace

const std::vector<Entry>& warp_kernels() {
    static const Grid one{1, 32, 512};
    static const std::vector<Entry> all = {
        {"lane_missing_in_mask", lane_missing_in_mask, one},
        {"reads_lane_outside_mask", reads_lane_outside_mask, one},
        {"reads_lane_that_ended", reads_lane_that_ended, one},
        {"lane_at_a_barrier", lane_at_a_barrier, one},
        {"different_masks", different_masks, one},
        {"different_instructions", different_instructions, one},
        {"odd_width", odd_width, one},
        {"mma_of_half_a_warp", mma_of_half_a_warp, one},
        {"ldmatrix_of_global_memory", ldmatrix_of_global_memory, one},
        {"ldmatrix_misaligned", ldmatrix_misaligned, one},
    };
    return all;
}

}  // namespace planted
