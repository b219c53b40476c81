// Output projection and residual add of few rows and a long K, from sm_90 on: the blocks of a cluster share K.
//
// A tile of 64 x 64 outputs has a cluster of 2, 4 or 8 blocks, each with its part of K. Partial sums stay in shared memory;
// behind a barrier of the cluster each block adds up some rows of all parts, in the order of K, so bits never depend on
// arrival. Triton's kernel sends the parts to L2 and waits there three times: for its stores, a counter, the loads.
//
// 256 of K are in flight at once, which is all that a block has of K = 2048. Where no launch ahead writes the weight, its
// loads begin before those launches have ended (programmatic dependent launch).
#include "cuda/linear_residual.h"

#include "cuda/values.cuh"

namespace smolvla::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kMostRanks = 8;
constexpr int kRows = 64, kCols = kLinearResidualCols, kDepth = 64, kStages = 4;
// Of rows of 128 bytes, whose 16-byte pieces are exchanged so that ldmatrix meets no bank twice.
constexpr int kTileBytes = 64 * 2 * kDepth, kStageBytes = 2 * kTileBytes;
constexpr int kPitch = kCols + 8;  // of partial sums: the rows of a fragment begin in banks of their own
constexpr size_t kSharedBytes = kStages * kStageBytes + sizeof(float) * kRows * kPitch;
static_assert(kRows == 64 && kCols == 64, "a tile of activations is as large as one of weights");

#if SMOLVLA_SM_90

__device__ __forceinline__ unsigned char* piece_of(unsigned char* tile, int row, int piece) {
    return tile + row * (2 * kDepth) + ((piece ^ row % 8) << 4);
}

// Rows first .. first + 63 at k .. k + 63 of a matrix; zeros beyond it.
__device__ __forceinline__ void request(unsigned char* tile, const void* matrix, int64_t stride, int first, int rows, int k,
                                        int inputs) {
#pragma unroll
    for (int i = threadIdx.x; i < 64 * 8; i += kThreads) {
        const int row = i / 8, at = k + 8 * (i % 8);
        const bool wanted = first + row < rows && at < inputs;
        const bf16* from = static_cast<const bf16*>(matrix) + (wanted ? (first + row) * stride + at : 0);
        cp_async_16(piece_of(tile, row, i % 8), from, wanted);
    }
}

// The warp's 16 x 32 outputs over one step of K.
__device__ __forceinline__ void multiply(float (&sums)[4][4], unsigned char* x, unsigned char* weight) {
    const int warp = threadIdx.x / 32, row = threadIdx.x % 8, matrix = threadIdx.x % 32 / 8;
#pragma unroll
    for (int piece = 0; piece < kDepth / 8; piece += 2) {
        uint32_t a[4];
        ldmatrix_x4(a, piece_of(x, 16 * (warp % 4) + 8 * (matrix % 2) + row, piece + matrix / 2));
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            uint32_t b[4];
            ldmatrix_x4(b, piece_of(weight, 32 * (warp / 4) + 16 * pair + 8 * (matrix / 2) + row, piece + matrix % 2));
            mma_bf16(sums[2 * pair], a, b[0], b[1]);
            mma_bf16(sums[2 * pair + 1], a, b[2], b[3]);
        }
    }
}

#endif

template <int RANKS>
__global__ void __launch_bounds__(kThreads) linear_residual_fwd_kernel(const LinearResidual p) {
#if SMOLVLA_SM_90
    SMOLVLA_SHARED(shared);
    // Rows that a warp finishes, every so manieth of the tile, and of each row two columns a lane.
    constexpr int kFinished = kRows / (RANKS * kWarps), kHalves = kCols / 32;
    const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int col_tile = blockIdx.x / RANKS, first_col = col_tile * kCols, first_row = blockIdx.y * kRows;
    const int all_steps = (p.inputs + kDepth - 1) / kDepth;
    const int first_step = rank * all_steps / RANKS, steps = (rank + 1) * all_steps / RANKS - first_step;
    const auto stage = [&](int step) { return shared + step % kStages * kStageBytes; };
    const auto request_x = [&](int step) {
        request(stage(step), p.x, p.x_stride, first_row, p.rows, (first_step + step) * kDepth, p.inputs);
    };
    const auto request_weight = [&](int step) {
        request(stage(step) + kTileBytes, p.weight, p.weight_stride, first_col, p.outputs, (first_step + step) * kDepth,
                p.inputs);
    };

    if (!p.weight_settled) await_earlier_launches();
    for (int step = 0; step < kStages && step < steps; ++step) request_weight(step);
    await_earlier_launches();
    let_next_launch_begin();  // one waits behind a running one: more stand where that one could run
    // A group a step, empty ones behind the last, so that the same number may be pending at each wait.
    for (int step = 0; step < kStages; ++step) {
        if (step < steps) request_x(step);
        cp_async_commit();
    }
    float residual[kFinished][kHalves], norm_weight[kHalves];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
        const int col = first_col + 32 * half + lane;
        norm_weight[half] = p.norm_weight && col < p.outputs ? read(p.norm_weight, col, p.fp32_norm) : 0.0f;
#pragma unroll
        for (int i = 0; i < kFinished; ++i) {
            const int row = first_row + rank + RANKS * (warp + kWarps * i);
            const bool there = row < p.rows && col < p.outputs;
            residual[i][half] = there ? read(p.residual, row * p.residual_stride + col, p.fp32_stream) : 0.0f;
        }
    }

    float sums[4][4] = {};
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<kStages - 1>();
        __syncthreads();
        multiply(sums, stage(step), stage(step) + kTileBytes);
        if (step + kStages < steps) {
            __syncthreads();
            request_weight(step + kStages);
            request_x(step + kStages);
        }
        cp_async_commit();
    }

    float* parts = reinterpret_cast<float*>(shared + kStages * kStageBytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float* to = parts + (16 * (warp % 4) + lane / 4) * kPitch + 32 * (warp / 4) + 8 * i + lane % 4 * 2;
        *reinterpret_cast<float2*>(to) = float2{sums[i][0], sums[i][1]};
        *reinterpret_cast<float2*>(to + 8 * kPitch) = float2{sums[i][2], sums[i][3]};
    }
    cluster_arrive();
    cluster_wait();
    float y[kFinished][kHalves] = {};
#pragma unroll
    for (int i = 0; i < kFinished; ++i) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const float* own = parts + (rank + RANKS * (warp + kWarps * i)) * kPitch + 32 * half + lane;
            // All loads are on their way before the first is added.
            float part[RANKS];
#pragma unroll
            for (int from = 0; from < RANKS; ++from) part[from] = load_cluster(own, from);
#pragma unroll
            for (int from = 0; from < RANKS; ++from) y[i][half] += part[from];
        }
    }
    cluster_arrive();  // this block needs no other's memory any more

#pragma unroll
    for (int i = 0; i < kFinished; ++i) {
        const int row = first_row + rank + RANKS * (warp + kWarps * i);
        if (row >= p.rows) continue;  // whole warps
        float squares = 0.0f;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            const int col = first_col + 32 * half + lane;
            if (col >= p.outputs) continue;
            const int64_t at = static_cast<int64_t>(row) * p.outputs + col;
            float stored = y[i][half] + residual[i][half];
            if (p.fp32_stream) {
                static_cast<float*>(p.y)[at] = stored;
            } else {
                const bf16 rounded = to_bf16(stored);
                static_cast<bf16*>(p.y)[at] = rounded;
                stored = to_float(rounded);
            }
            if (p.norm_weight) static_cast<bf16*>(p.next_rows)[at] = to_bf16(stored * norm_weight[half]);
            squares += stored * stored;
        }
        if (!p.norm_weight) continue;
        squares = warp_sum(squares);
        if (lane == 0) p.next_squares[static_cast<int64_t>(col_tile) * p.rows + row] = squares;
    }
    cluster_wait();  // until no other block needs this one's memory
#else
    __trap();  // the launcher's caller asks for clusters first
#endif
}

template <int RANKS>
Grid grid_of(const LinearResidual& p) {
    Grid grid;
    grid.blocks = dim3(RANKS * ((p.outputs + kCols - 1) / kCols), (p.rows + kRows - 1) / kRows);
    grid.threads = dim3(kThreads);
    grid.shared_bytes = kSharedBytes;
    grid.cluster = RANKS;
    grid.dependent = p.dependent;
    return grid;
}

template <int RANKS>
void start(const LinearResidual& p, void* stream) {
    launch("linear_residual", linear_residual_fwd_kernel<RANKS>, grid_of<RANKS>(p), static_cast<cudaStream_t>(stream), p);
}

}  // namespace

int linear_residual_clusters() {
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, linear_residual_fwd_kernel<kMostRanks>), "cudaFuncGetAttributes");
    if (code.ptxVersion < 90) return 0;
    LinearResidual one{};
    one.rows = one.outputs = 1;
    return clusters_at_once(linear_residual_fwd_kernel<kMostRanks>, grid_of<kMostRanks>(one));
}

void linear_residual(const LinearResidual& p, void* stream) {
    // As many as have a step of K each.
    const int steps = (p.inputs + kDepth - 1) / kDepth;
    if (steps >= 8)
        start<8>(p, stream);
    else if (steps >= 4)
        start<4>(p, stream);
    else
        start<2>(p, stream);
}

}  // namespace smolvla::cuda
