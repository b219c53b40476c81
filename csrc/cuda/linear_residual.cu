// Output projection and residual add of few rows and a long K, from sm_90 on: the eight blocks of a cluster share K.
//
// A tile of 64 x 64 outputs has a cluster, and each block an eighth of K, of which all or most is in flight at once. A block
// finishes every eighth row: the others store their sums of it in its shared memory, and its barrier counts their bytes
// (st.async). A barrier of the cluster would do as well, but its release is a fence of all memory. Parts are added in the order
// of K, so bits never depend on arrival. Triton's kernel sends parts to L2 and waits there three times: for its stores, a
// counter, the loads.
//
// Few instructions stand behind one another: a copy has one address for all of K, and lanes have sums of four neighbouring
// columns, which one instruction sends. Where no launch ahead writes the weight, its loads begin before the launches ahead
// have ended (programmatic dependent launch).
#include "cuda/linear_residual.h"

#include "cuda/values.cuh"

namespace smolvla::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kRanks = 8;
constexpr int kRows = 64, kCols = kLinearResidualCols, kDepth = 64;
constexpr int kPitch = 2 * kDepth;  // bytes of a tile's row; its 16-byte pieces are exchanged so that no bank is met twice
constexpr int kTileBytes = 64 * kPitch, kStageBytes = 2 * kTileBytes;
constexpr int kBarrierBytes = 128;  // one mbarrier, and tiles begin at multiples of a row
constexpr int kOwned = kRows / kRanks;  // rows that a block finishes, one a warp
static_assert(kRows == 64 && kCols == 64, "a tile of activations is as large as one of weights");
static_assert(kOwned == kWarps);

constexpr size_t shared_bytes_of(int stages) {
    return kBarrierBytes + stages * kStageBytes + sizeof(float) * kRanks * kOwned * kCols;
}

#if SMOLVLA_SM_90

// Widened where they are used: the warp does not wait for them before.
__device__ __forceinline__ uint32_t read_bits(const void* from, int64_t at, bool fp32) {
    return fp32 ? static_cast<const uint32_t*>(from)[at] : static_cast<const uint16_t*>(from)[at];
}
__device__ __forceinline__ float widen(uint32_t bits, bool fp32) { return __uint_as_float(fp32 ? bits : bits << 16); }

// What a thread copies of a tile at every step of K: a piece of 16 bytes of two rows. What is beyond the matrix is zeros; of
// rows that only saves traffic, as their sums are never stored.
struct Copies {
    const bf16* from[2];
    bool wanted[2];
    unsigned char* to;

    __device__ __forceinline__ Copies(unsigned char* tile, int exchanged, const void* matrix, int64_t stride, int first,
                                      int rows, int k) {
        const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
        to = tile + row * kPitch + ((piece ^ exchanged) << 4);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            wanted[i] = first + row + 32 * i < rows;
            from[i] = static_cast<const bf16*>(matrix) + min(first + row + 32 * i, rows - 1) * stride + k + 8 * piece;
        }
    }
    __device__ __forceinline__ void settle_addresses() { settle(from[0]), settle(from[1]), settle(to); }
    __device__ __forceinline__ void request(int stage, int step, bool there) const {
#pragma unroll
        for (int i = 0; i < 2; ++i)
            cp_async_16(to + stage * kStageBytes + 32 * i * kPitch, from[i] + step * kDepth, wanted[i] && there);
    }
};

#endif

template <int STAGES>
__global__ void __launch_bounds__(kThreads) linear_residual_fwd_kernel(const LinearResidual p) {
#if SMOLVLA_SM_90
    SMOLVLA_SHARED(shared);
    const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int col_tile = blockIdx.x / kRanks, first_col = col_tile * kCols, first_row = blockIdx.y * kRows;
    const int rows = min(p.rows - first_row, kRows);
    const int all_steps = (p.inputs + kDepth - 1) / kDepth;
    const int first_step = rank * all_steps / kRanks, steps = (rank + 1) * all_steps / kRanks - first_step;
    auto* const parts_come = reinterpret_cast<uint64_t*>(shared);
    unsigned char* const stages = shared + kBarrierBytes;
    float* const parts = reinterpret_cast<float*>(stages + STAGES * kStageBytes);  // [rank][row of this block][column]

    if (threadIdx.x == 0) {
        init_copy_barrier(parts_come);
        expect_copies(parts_come, sizeof(float) * kRanks * ((rows - rank + kRanks - 1) / kRanks) * kCols);
        publish_store_barriers();
    }
    cluster_arrive_relaxed();

    // Rows of weights lie in the order in which a lane's four columns are neighbours; the exchange counts in that order.
    const int k = first_step * kDepth, row = threadIdx.x / 8;
    const Copies weights(stages + kTileBytes, (row / 4 * 2 + row % 2) % 8, p.weight, p.weight_stride, first_col, p.outputs, k);
    Copies x(stages, row % 8, p.x, p.x_stride, first_row, p.rows, k);
    const auto there = [&](int step) { return k + step * kDepth + 8 * static_cast<int>(threadIdx.x % 8) < p.inputs; };

    x.settle_addresses();
    if (!p.weight_settled) await_earlier_launches();
#pragma unroll
    for (int step = 0; step < STAGES; ++step)
        if (step < steps) weights.request(step, step, there(step));
    await_earlier_launches();
    let_next_launch_begin();  // not earlier: blocks that wait would take the places of the launch that runs
    // A group a step, the first with all weights, empty ones behind the last: the same number may be pending at each wait.
#pragma unroll
    for (int step = 0; step < STAGES; ++step) {
        if (step < steps) x.request(step, step, there(step));
        cp_async_commit();
    }

    // The warp finishes a row, of which a lane has two columns.
    const int own = rank + kRanks * warp;
    const auto at = [&](int64_t stride, int half) { return (first_row + own) * stride + first_col + 32 * half + lane; };
    const auto wanted = [&](int half) { return own < rows && first_col + 32 * half + lane < p.outputs; };
    uint32_t residual[2] = {}, norm_weight[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!wanted(half)) continue;
        residual[half] = read_bits(p.residual, at(p.residual_stride, half), p.fp32_stream);
        if (p.norm_weight) norm_weight[half] = read_bits(p.norm_weight, first_col + 32 * half + lane, p.fp32_norm);
    }
    cluster_wait();  // the barriers of all blocks are there

    // The warp multiplies 16 rows by 32 columns.
    const int matrix = lane / 8, within = lane % 8;
    const int a_at = (16 * (warp % 4) + 8 * (matrix % 2) + within) * kPitch + ((matrix / 2 ^ within) << 4);
    const int b_row = 32 * (warp / 4) + 4 * (within / 2) + 2 * (matrix / 2) + within % 2;
    const int b_at = kTileBytes + b_row * kPitch + ((matrix % 2 ^ within) << 4);
    float sums[4][4] = {};
    for (int first = 0; first < steps; first += STAGES) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            if (first + stage >= steps) break;
            cp_async_wait<STAGES - 1>();
            __syncthreads();
#pragma unroll
            for (int i = 0; i < kDepth / 16; ++i) {
                uint32_t a[4], b[2][4];
                ldmatrix_x4(a, stages + stage * kStageBytes + (a_at ^ 32 * i));
                ldmatrix_x4(b[0], stages + stage * kStageBytes + (b_at ^ 32 * i));
                ldmatrix_x4(b[1], stages + stage * kStageBytes + 16 * kPitch + (b_at ^ 32 * i));
#pragma unroll
                for (int tile = 0; tile < 4; ++tile)
                    mma_bf16(sums[tile], a, b[tile / 2][tile % 2 * 2], b[tile / 2][tile % 2 * 2 + 1]);
            }
            const int next = first + stage + STAGES;
            if (next < steps) {
                __syncthreads();
                weights.request(stage, next, there(next));
                x.request(stage, next, there(next));
            }
            cp_async_commit();
        }
    }

    // Row r of the tile belongs to block r % 8: all rows of a lane to one. A block may end behind its stores: their values
    // were in registers, and where they go a block waits for them.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int group = 2 * (warp % 4) + half;
        float* const to = parts + (rank * kOwned + group) * kCols + 32 * (warp / 4) + lane % 4 * 4;
        if (lane / 4 + kRanks * group >= rows) continue;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const float *left = sums[2 * pair] + 2 * half, *right = sums[2 * pair + 1] + 2 * half;
            store_to_rank(to + 16 * pair, lane / 4, float4{left[0], left[1], right[0], right[1]}, parts_come);
        }
    }
    if (own >= rows) return;  // whole warps
    await_stores(parts_come);
    float y[2] = {}, squares = 0.0f;
#pragma unroll
    for (int from = 0; from < kRanks; ++from) {
#pragma unroll
        for (int half = 0; half < 2; ++half) y[half] += parts[(from * kOwned + warp) * kCols + 32 * half + lane];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!wanted(half)) continue;
        float stored = y[half] + widen(residual[half], p.fp32_stream);
        if (p.fp32_stream) {
            static_cast<float*>(p.y)[at(p.outputs, half)] = stored;
        } else {
            const bf16 rounded = to_bf16(stored);
            static_cast<bf16*>(p.y)[at(p.outputs, half)] = rounded;
            stored = to_float(rounded);
        }
        if (p.norm_weight)
            static_cast<bf16*>(p.next_rows)[at(p.outputs, half)] = to_bf16(stored * widen(norm_weight[half], p.fp32_norm));
        squares += stored * stored;
    }
    if (!p.norm_weight) return;
    squares = warp_sum(squares);
    if (lane == 0) p.next_squares[static_cast<int64_t>(col_tile) * p.rows + first_row + own] = squares;
#else
    __trap();  // the launcher's caller asks for clusters first
#endif
}

Grid grid_of(const LinearResidual& p, int stages) {
    Grid grid;
    grid.blocks = dim3(kRanks * ((p.outputs + kCols - 1) / kCols), (p.rows + kRows - 1) / kRows);
    grid.threads = dim3(kThreads);
    grid.shared_bytes = shared_bytes_of(stages);
    grid.cluster = kRanks;
    grid.dependent = p.dependent;
    return grid;
}

template <int STAGES>
void start(const LinearResidual& p, void* stream) {
    const auto to = static_cast<cudaStream_t>(stream);
    launch("linear_residual", linear_residual_fwd_kernel<STAGES>, grid_of(p, STAGES), to, p);
}

constexpr int kMostStages = 4;

}  // namespace

int linear_residual_clusters() {
    LinearResidual one{};
    one.rows = one.outputs = 1;
    return clusters_at_once(linear_residual_fwd_kernel<kMostStages>, grid_of(one, kMostStages));
}

void linear_residual(const LinearResidual& p, void* stream) {
    // Of several tiles of rows three blocks find a place on a multiprocessor, of a short K four.
    if (p.inputs <= 2 * kRanks * kDepth)
        start<2>(p, stream);
    else if (p.rows > kRows)
        start<3>(p, stream);
    else
        start<kMostStages>(p, stream);
}

}  // namespace smolvla::cuda
