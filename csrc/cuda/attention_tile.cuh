// Grouped-query attention of one tile of 16 query rows, by a block of 256 threads.
//
// Row r of one KV head is query head kv_head * group + r % group of token r / group: the query heads of a KV head lie
// in one tile, and its keys and values are read once for all. Keys are dealt to the 8 warps in pieces of 32; a warp
// keeps running maximum, sum and output of its share in registers, and the 8 parts are added up through shared memory
// in the order of the warps: equal bits in every run.
//
// Keys and values go from L2 straight into mma fragments, 16 bytes a load: which dimension stands where inside a sum or
// a tile of columns is free as long as both factors agree. Of a dot product, lane (g, t) = (lane / 4, lane % 4) holds
// dimensions 8t .. 8t + 7 of each 32, for queries and keys alike; of the second product it reads dimensions
// 8g .. 8g + 7 of each 64, one for each of 8 column tiles, so that it ends up with outputs 16t .. 16t + 15 of its rows.
// All loads of a piece are on their way at once and none waits on shared memory: bound by a trip to L2.
//
// Everything is read past L1, the mask excepted, which must not change during a launch: queries, keys and values
// may come from other blocks of the same launch.
//
// Shared memory: the caller's threads must be done with it before run(). run() meets at two __syncthreads and at none
// after its last read, so the caller syncs before it writes there again. All 256 threads call it with equal arguments.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/attention_fragments.cuh"
#include "cuda/attention_queries.cuh"

namespace smolvla::cuda {

// HEAD_DIM: 64 or 128, the registers and shared memory that are set aside; smaller heads are filled up with zeros.
// VALUES_AHEAD: values are asked for together with keys where registers hold both. A caller that needs registers of its
// own says false, and they follow the keys, 16 at a time.
template <class Q, class KV, int HEAD_DIM, bool VALUES_AHEAD = true>
struct AttentionTile {
    static_assert(HEAD_DIM == 64 || HEAD_DIM == 128);
    static_assert(std::is_same<KV, float>::value || std::is_same<KV, Q>::value);
    using Args = AttentionArgs<Q, KV>;
    using Eight = attention::Eight<KV>;
    using Narrow = typename std::conditional<std::is_same<KV, float>::value, bf16, KV>::type;  // what mma takes

    // A warp's piece: a lane each for the mask, and 8 warps hold SmolVLA's 241 keys at once. Heads of 128 fill as many
    // registers with half of it, and in fp32 with less: these are loaded when they are needed.
    static constexpr int kKeys = HEAD_DIM == 64 ? 32 : 16;
    static constexpr bool kAhead = HEAD_DIM == 64 || sizeof(KV) == 2;
    static constexpr bool kValuesAhead = kAhead && VALUES_AHEAD;
    static constexpr int kPlanes = Eight::kPlanes;
    static constexpr int kQueryPlanes = std::is_same<Q, Narrow>::value ? 1 : 2;
    using Queries = AttentionQueries<Q, kQueryPlanes, HEAD_DIM>;
    static constexpr int kHalves = HEAD_DIM / 64;
    static constexpr int kParts = 8 * kHalves;  // float4 of output a lane

    static constexpr size_t kStatsBytes = 2 * kAttentionWarps * kAttentionRows * sizeof(float);
    static constexpr size_t kPartsBytes = kAttentionWarps * kParts * 32 * sizeof(float4);
    static constexpr size_t shared_bytes = Queries::shared_bytes + kStatsBytes + kPartsBytes;

    // first_row: a multiple of 16, below tokens * group
    static __device__ __forceinline__ void run(unsigned char* shared, const Args& args, int batch, int kv_head,
                                               int first_row) {
        Q* queries = reinterpret_cast<Q*>(shared);
        float* best_of = reinterpret_cast<float*>(shared + Queries::shared_bytes);
        float* total_of = best_of + kAttentionWarps * kAttentionRows;
        float4* parts = reinterpret_cast<float4*>(total_of + kAttentionWarps * kAttentionRows);
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

        // Queries, keys, values and mask are under way together: two trips to L2 would double the time.
        Queries fetched;
        fetched.fetch(args, batch, kv_head, first_row);
        const int token[2] = {token_of(args, first_row + g), token_of(args, first_row + g + 8)};
        float best[2] = {-INFINITY, -INFINITY}, total[2] = {}, out[8 * kHalves][4] = {};
        const int first_key = warp * kKeys;
        // Every warp runs the first round, for its barrier; beyond the last key nothing is loaded.
#pragma unroll 1
        for (int start = first_key; start == first_key || start < args.keys; start += kAttentionWarps * kKeys) {
            Piece piece;
            load_piece(piece, args, batch, kv_head, token, start);
            if (start == first_key) {
                fetched.store(queries);
                __syncthreads();
            }
            if (start < args.keys) take_piece(queries, piece, args, batch, kv_head, token, start, best, total, out);
        }

#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
            if (t != 0) continue;
            best_of[warp * kAttentionRows + g + 8 * r] = best[r];
            total_of[warp * kAttentionRows + g + 8 * r] = total[r];
        }
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            const int r = i / 4 % 2, c = i / 2 % 2, first = i / 8 * 8 + i % 2 * 4;
            parts[(warp * kParts + i) * 32 + lane] =
                float4{out[first][2 * r + c], out[first + 1][2 * r + c], out[first + 2][2 * r + c],
                       out[first + 3][2 * r + c]};
        }
        __syncthreads();
        combine(best_of, total_of, parts, args, batch, kv_head, first_row);
    }

private:
    static constexpr int kTiles = kKeys / 8, kChunks = HEAD_DIM / 32;
    struct Piece {
        Eight k[kTiles][kChunks], v[kTiles / 2][kHalves][4];
        uint32_t bits[2];
    };

    static __device__ __forceinline__ int token_of(const Args& args, int row) {
        return min(row / args.group, args.tokens - 1);
    }

    // A bit a key from `start` on, for rows g and g + 8: whether the mask shows it. All lanes of the warp call.
    static __device__ __forceinline__ void mask_bits(const Args& args, int batch, const int (&token)[2], int start,
                                                     uint32_t (&bits)[2]) {
        const int lane = threadIdx.x % 32, key = start + lane;
        const bool masked = lane < kKeys && key < args.masked_keys;
        const uint8_t* column = args.mask + batch * args.mask_batch_stride + key * args.mask_key_stride;
        if (args.mask_token_stride == 0) {
            bits[0] = bits[1] = __ballot_sync(0xffffffffu, masked && __ldg(column) != 0);
            return;
        }
        uint8_t shown[kAttentionRows];
#pragma unroll
        for (int r = 0; r < kAttentionRows; ++r) {
            const int row_token = __shfl_sync(0xffffffffu, token[r / 8], r % 8 * 4);
            shown[r] = masked ? __ldg(column + row_token * args.mask_token_stride) : 0;
        }
#pragma unroll
        for (int r = 0; r < kAttentionRows; ++r) {
            const uint32_t ballot = __ballot_sync(0xffffffffu, shown[r] != 0);
            if (r % 8 == lane / 4) bits[r / 8] = ballot;
        }
    }

    // Keys start .. start + kKeys - 1; zeros, and nothing is read, for those beyond the last.
    static __device__ __forceinline__ void load_piece(Piece& piece, const Args& args, int batch, int kv_head,
                                                      const int (&token)[2], int start) {
        if constexpr (kAhead) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
#pragma unroll
                for (int c = 0; c < kChunks; ++c)
                    load_keys(piece.k[n][c], args, batch, kv_head, start + 8 * n, 32 * c);
            }
        }
        if constexpr (kValuesAhead) {
#pragma unroll
            for (int m = 0; m < kTiles / 2; ++m) load_values(piece, m, args, batch, kv_head, start);
        }
        mask_bits(args, batch, token, start, piece.bits);
    }

    // A piece whose first key exists, into this warp's running maximum, sum and output.
    static __device__ __forceinline__ void take_piece(const Q* queries, Piece& piece, const Args& args, int batch,
                                                      int kv_head, const int (&token)[2], int start, float (&best)[2],
                                                      float (&total)[2], float (&out)[8 * kHalves][4]) {
        const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        float scores[kTiles][4] = {};
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            uint32_t a[2][kQueryPlanes][4];
            Queries::fragments(queries, c, g, t, a);
            if constexpr (!kAhead) {
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    load_keys(piece.k[n][c], args, batch, kv_head, start + 8 * n, 32 * c);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    uint32_t b0[kPlanes], b1[kPlanes];
                    piece.k[n][c].pair(2 * step, b0);
                    piece.k[n][c].pair(2 * step + 1, b1);
                    attention::mma_planes<Narrow>(scores[n], a[step], b0, b1);
                }
            }
        }


        if constexpr (kAhead && !kValuesAhead) load_values(piece, 0, args, batch, kv_head, start);
        float highest[2] = {best[0], best[1]};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int r = i / 2, column = 8 * n + 2 * t + i % 2, key = start + column;
                const int own = key - args.masked_keys;  // the token whose key it is, from 0 on
                const bool seen = piece.bits[r] >> column & 1 || (own >= 0 && own <= token[r]);
                const float score = seen ? scores[n][i] * args.scale_log2 : attention::kLowest;
                scores[n][i] = key < args.keys ? score : -INFINITY;
                highest[r] = fmaxf(highest[r], scores[n][i]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
            highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
            // Key `start` exists, so the new maximum is finite and no difference below is inf - inf.
            const float shrink = exp2f(best[r] - highest[r]);
            best[r] = highest[r];
            total[r] *= shrink;
#pragma unroll
            for (int j = 0; j < 8 * kHalves; ++j) out[j][2 * r] *= shrink, out[j][2 * r + 1] *= shrink;
        }
#pragma unroll
        for (int m = 0; m < kTiles / 2; ++m) {
            uint32_t a[kPlanes][4];
            if constexpr (kAhead && !kValuesAhead)
                if (m + 1 < kTiles / 2) load_values(piece, m + 1, args, batch, kv_head, start);
            weights(scores[2 * m], scores[2 * m + 1], best, total, a);
#pragma unroll
            for (int h = 0; h < kHalves; ++h) {
                if constexpr (!kAhead)
                    load_values(piece.v[m][h], args, batch, kv_head, start + 16 * m, 64 * h);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    uint32_t b0[kPlanes], b1[kPlanes];
                    piece.v[m][h][0].pair(piece.v[m][h][1], j, b0);
                    piece.v[m][h][2].pair(piece.v[m][h][3], j, b1);
                    attention::mma_planes<Narrow>(out[8 * h + j], a, b0, b1);
                }
            }
        }
    }

    // Key g from `start` on, dimensions 8t .. 8t + 7 from `dim` on.
    static __device__ __forceinline__ void load_keys(Eight& k, const Args& args, int batch, int kv_head, int start,
                                                     int dim) {
        const KV* k_rows = args.k + batch * args.k_strides.batch + kv_head * args.k_strides.head;
        const int key = start + threadIdx.x % 32 / 4, first = dim + threadIdx.x % 4 * 8;
        k.load(k_rows + key * args.k_strides.row + first, key < args.keys && first < args.head_dim);
    }

    // Keys 16m .. 16m + 15 of a piece.
    static __device__ __forceinline__ void load_values(Piece& piece, int m, const Args& args, int batch, int kv_head,
                                                       int start) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h)
            load_values(piece.v[m][h], args, batch, kv_head, start + 16 * m, 64 * h);
    }

    // Keys 2t, 2t + 1, 2t + 8, 2t + 9 from `start` on, dimensions 8g .. 8g + 7 from `dim` on.
    static __device__ __forceinline__ void load_values(Eight (&v)[4], const Args& args, int batch, int kv_head,
                                                       int start, int dim) {
        const KV* v_rows = args.v + batch * args.v_strides.batch + kv_head * args.v_strides.head;
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int key = start + 2 * t + i / 2 * 8 + i % 2;
            v[i].load(v_rows + key * args.v_strides.row + dim + 8 * g, key < args.keys && dim + 8 * g < args.head_dim);
        }
    }

    // What scores of 16 keys weigh, as `a` of an mma: two tiles of scores lie as one such fragment does.
    static __device__ __forceinline__ void weights(const float (&first)[4], const float (&second)[4],
                                                   const float (&best)[2], float (&total)[2],
                                                   uint32_t (&a)[kPlanes][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = i % 2;
            const float(&scores)[4] = i < 2 ? first : second;
            const float x = exp2f(scores[2 * r] - best[r]), y = exp2f(scores[2 * r + 1] - best[r]);
            total[r] += x + y;
            if constexpr (kPlanes == 2)
                split(x, y, a[0][i], a[1][i]);
            else
                a[0][i] = attention::pack<KV>(x, y);
        }
    }

    // The sum of the 8 warps' parts in their order, each brought to the common maximum, over the sum of their totals.
    static __device__ __forceinline__ void combine(const float* best_of, const float* total_of, const float4* parts,
                                                   const Args& args, int batch, int kv_head, int first_row) {
        const int lane = threadIdx.x % 32;
        for (int i = threadIdx.x / 32; i < kParts; i += kAttentionWarps) {
            const int r = lane / 4 + i / 4 % 2 * 8, dim = i / 8 * 64 + lane % 4 * 16 + i / 2 % 2 * 8 + i % 2 * 4;
            float highest = best_of[r];
            for (int w = 1; w < kAttentionWarps; ++w) highest = fmaxf(highest, best_of[w * kAttentionRows + r]);
            float total = 0.0f, sum[4] = {};
#pragma unroll
            for (int w = 0; w < kAttentionWarps; ++w) {
                // 0 for a warp that had no key: its maximum is -inf, the common one is not.
                const float weight = exp2f(best_of[w * kAttentionRows + r] - highest);
                const float4 part = parts[(w * kParts + i) * 32 + lane];
                total = fmaf(total_of[w * kAttentionRows + r], weight, total);
                sum[0] = fmaf(part.x, weight, sum[0]), sum[1] = fmaf(part.y, weight, sum[1]);
                sum[2] = fmaf(part.z, weight, sum[2]), sum[3] = fmaf(part.w, weight, sum[3]);
            }
            const int row = first_row + r, token = row / args.group, head = kv_head * args.group + row % args.group;
            if (token >= args.tokens || dim >= args.head_dim) continue;
            Q* to = args.out + batch * args.out_batch_stride + token * args.out_token_stride + head * args.head_dim;
            *reinterpret_cast<uint2*>(to + dim) = uint2{attention::pack<Q>(sum[0] / total, sum[1] / total),
                                                        attention::pack<Q>(sum[2] / total, sum[3] / total)};
        }
    }
};

}  // namespace smolvla::cuda
