// The 16 rows of queries of attention_tile.cuh: to shared memory, from there to mma fragments.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/attention_fragments.cuh"

namespace smolvla::cuda {

// PLANES is 2 where fp16 is computed as the sum of two bf16, 1 where Q is what mma takes.
template <class Q, int PLANES, int HEAD_DIM>
struct AttentionQueries {
    // 64 bytes beyond a multiple of 128: two rows, which one phase of 16-byte reads takes, lie in different banks.
    static constexpr int kPitch = HEAD_DIM + 32;
    static constexpr size_t shared_bytes = kAttentionRows * kPitch * sizeof(Q);

    // The tile's queries on their way from L2, two dimensions at a time; zeros in rows and dimensions that do not exist.
    template <class Args>
    __device__ __forceinline__ void fetch(const Args& args, int batch, int kv_head, int first_row) {
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            const int row = first_row + row_of(n), i = dim_of(n);
            const int token = row / args.group, head = kv_head * args.group + row % args.group;
            pairs[n] = 0;
            if (token >= args.tokens || i >= args.head_dim) continue;
            const Q* from =
                args.q + batch * args.q_strides.batch + token * args.q_strides.row + head * args.q_strides.head + i;
            pairs[n] = load_l2(reinterpret_cast<const uint32_t*>(from));
        }
    }

    // And to shared memory.
    __device__ __forceinline__ void store(Q* queries) {
#pragma unroll
        for (int n = 0; n < kItems; ++n)
            *reinterpret_cast<uint32_t*>(queries + row_of(n) * kPitch + dim_of(n)) = pairs[n];
    }

    // Dimensions 32c + 8t .. + 7 of rows g and g + 8, as `a` of the two mma that take 16 of these 32 dimensions each.
    static __device__ __forceinline__ void fragments(const Q* queries, int c, int g, int t,
                                                     uint32_t (&a)[2][PLANES][4]) {
        const uint4 x = *reinterpret_cast<const uint4*>(queries + g * kPitch + 32 * c + 8 * t);
        const uint4 y = *reinterpret_cast<const uint4*>(queries + (g + 8) * kPitch + 32 * c + 8 * t);
        const uint32_t words[2][4] = {{x.x, y.x, x.y, y.y}, {x.z, y.z, x.w, y.w}};
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (PLANES == 2)
                    split(low_half<Q>(words[step][i]), high_half<Q>(words[step][i]), a[step][0][i], a[step][1][i]);
                else
                    a[step][0][i] = words[step][i];
            }
        }
    }

private:
    static constexpr int kPairs = HEAD_DIM / 2, kItems = kAttentionRows * kPairs / kAttentionThreads;
    uint32_t pairs[kItems];

    static __device__ __forceinline__ int row_of(int n) { return (n * kAttentionThreads + threadIdx.x) / kPairs; }
    static __device__ __forceinline__ int dim_of(int n) { return (n * kAttentionThreads + threadIdx.x) % kPairs * 2; }
};

}  // namespace smolvla::cuda
