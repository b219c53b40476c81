// The 16 rows of queries of attention_tile.cuh: rotated on their way to shared memory, from there to mma fragments.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/attention_fragments.cuh"
#include "cuda/rope.cuh"

namespace smolvla::cuda {

// PLANES is 2 where fp16 is computed as the sum of two bf16, 1 where Q is what mma takes.
template <class Q, int PLANES, int HEAD_DIM>
struct AttentionQueries {
    // 64 bytes beyond a multiple of 128: two rows, which one phase of 16-byte reads takes, lie in different banks.
    static constexpr int kPitch = HEAD_DIM + 32;
    static constexpr size_t shared_bytes = kAttentionRows * kPitch * sizeof(Q);

    // The tile's queries on their way from L2: a thread takes two dimensions of the lower half of a head, and of the
    // upper half their partners in rotation.
    template <class Args>
    __device__ __forceinline__ void fetch(const Args& args, int batch, int kv_head, int first_row) {
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            const int row = first_row + row_of(n), i = dim_of(n), half = args.head_dim / 2;
            const int token = row / args.group, head = kv_head * args.group + row % args.group;
            low[n] = high[n] = 0;
            if (token >= args.tokens || i >= half) continue;
            const Q* from =
                args.q + batch * args.q_strides.batch + token * args.q_strides.row + head * args.q_strides.head + i;
            low[n] = load_l2(reinterpret_cast<const uint32_t*>(from));
            high[n] = load_l2(reinterpret_cast<const uint32_t*>(from + half));
        }
    }

    // And to shared memory, rotated where asked for; zeros in rows and dimensions that do not exist.
    template <class Args>
    __device__ __forceinline__ void store(Q* queries, const Args& args, int batch, int first_row) {
#pragma unroll
        for (int n = 0; n < kItems; ++n) {
            const int r = row_of(n), i = dim_of(n), half = args.head_dim / 2;
            uint32_t* row = reinterpret_cast<uint32_t*>(queries + r * kPitch);
            if (i >= half) {
                row[i] = row[i + 1] = 0;  // dimensions 2i .. 2i + 3: as many as are missing to HEAD_DIM
                continue;
            }
            if (args.offset)
                rotate(low[n], high[n], args.offset[batch * args.offset_stride] + (first_row + r) / args.group, i,
                       args.head_dim);
            row[i / 2] = low[n];
            row[(half + i) / 2] = high[n];
        }
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
                    attention::split(attention::low_half<Q>(words[step][i]), attention::high_half<Q>(words[step][i]),
                                     a[step][0][i], a[step][1][i]);
                else
                    a[step][0][i] = words[step][i];
            }
        }
    }

private:
    static constexpr int kPairs = HEAD_DIM / 4, kItems = kAttentionRows * kPairs / kAttentionThreads;
    uint32_t low[kItems], high[kItems];

    static __device__ __forceinline__ int row_of(int n) { return (n * kAttentionThreads + threadIdx.x) / kPairs; }
    static __device__ __forceinline__ int dim_of(int n) { return (n * kAttentionThreads + threadIdx.x) % kPairs * 2; }

    static __device__ __forceinline__ void rotate(uint32_t& low, uint32_t& high, int position, int i, int head_dim) {
        using namespace attention;
        const float x1[] = {low_half<Q>(low), high_half<Q>(low)}, x2[] = {low_half<Q>(high), high_half<Q>(high)};
        float y1[2], y2[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float sin, cos;
            sin_cos(rope_angle(position, i + j, head_dim), sin, cos);
            y1[j] = x1[j] * cos - x2[j] * sin;
            y2[j] = x2[j] * cos + x1[j] * sin;
        }
        low = pack<Q>(y1[0], y1[1]);
        high = pack<Q>(y2[0], y2[1]);
    }
};

}  // namespace smolvla::cuda
