// Two products of normed rows and what follows them, of prepared rows (ops/next_norm.py), from sm_90 on but not on 12.x:
// norm_swiglu, whose pairs of columns are gate and up, and norm_qkv_rope, whose pairs are what a rotation mixes.
//
// A block has 8 to 24 pairs of weight rows and up to 64 rows of x. All its weights are on their way to shared memory before
// the launches ahead have ended (programmatic dependent launch), and so is every address. Then x comes in four groups along
// K; products begin with the first. All blocks of a cluster multiply the same x: each brings a part of its rows, for all of
// them (bulk copies with multicast), so that L2 gives x once a cluster. One instruction copies a row of a weight, or of a
// group of x.
//
// The bound is a warp's chain of instructions and what comes from L2, not tensor cores: so two halves of the rows times
// four shares of K have a warp each, and each step of K is 7 to 17 instructions with constant offsets. Sums of the shares
// are added up in the order of their number. 1/rms is a factor of a whole row, applied to sums.
#include "cuda/norm_products.h"

#include <algorithm>

#include "cuda/ptx.cuh"

namespace smolvla::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kMostRanks = 8;
constexpr int kRows = 64, kShares = 4, kGroups = 4;
constexpr int kBarrierBytes = 8 * kGroups;  // an mbarrier of each group, ahead of all else
static_assert(kBarrierBytes % 16 == 0, "operands begin at multiples of 16 bytes");
[[maybe_unused]] constexpr int kChunk = 16 * kShares;  // of K: one instruction's 16 for each share

// Rows of a matrix in shared memory: whole 16s of K and 16 bytes, so that ldmatrix meets no bank twice.
__host__ __device__ constexpr int operand_pitch(int inputs) { return 32 * ((inputs + 15) / 16) + 16; }
// Floats between rows of partial sums: those of a fragment begin in banks of their own.
__host__ __device__ constexpr int sums_pitch(int pairs) { return 2 * pairs + 8; }

size_t shared_bytes_of(int pairs, int rows, int inputs) {
    const size_t operands = static_cast<size_t>(2 * pairs + std::min(rows, kRows)) * operand_pitch(inputs);
    // Sums take the place of operands.
    return kBarrierBytes + std::max(operands, sizeof(float) * kShares * kRows * sums_pitch(pairs));
}

template <int COUNT>
__device__ __forceinline__ void load(const float* from, float (&x)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(from + i);
            x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            const float2 two = *reinterpret_cast<const float2*>(from + i);
            x[i] = two.x, x[i + 1] = two.y;
        }
    }
}

// What a block's pairs of columns are, and what a thread does with those it finishes: kEach pairs from `pair` on, of `row`.
// A cluster's last blocks may have no pair: they multiply the last weights again and store nothing.
template <int PAIRS>
struct Tile {
    static constexpr int kPairs = PAIRS, kEach = PAIRS / 4, kTwos = kEach / 2;
    bool wanted[kTwos];  // of each two pairs that a thread finishes
};

template <int PAIRS>
struct Swiglu : Tile<PAIRS> {
    using Params = NormSwiglu;
    using Of = Tile<PAIRS>;
    using Of::kEach, Of::kPairs, Of::kTwos, Of::wanted;
    uint32_t* to;

    __device__ __forceinline__ Swiglu(const Params& p, int row, int pair) {
        const int col = blockIdx.x * kPairs + pair;
#pragma unroll
        for (int two = 0; two < kTwos; ++two) wanted[two] = row < p.rows && col + 2 * two < p.outputs;
        to = reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.y) + static_cast<int64_t>(row) * p.outputs + col);
    }
    static __device__ __forceinline__ const bf16* weight_row(const Params& p, int pair, bool second) {
        const int64_t col = min(static_cast<int>(blockIdx.x) * kPairs + pair, p.outputs - 1);
        return second ? static_cast<const bf16*>(p.up) + col * p.up_stride
                      : static_cast<const bf16*>(p.gate) + col * p.gate_stride;
    }
    __device__ __forceinline__ void settle_addresses() { settle(to); }
    __device__ __forceinline__ void request() {}
    __device__ __forceinline__ void finish(const Params&, const float (&gate)[kEach], const float (&up)[kEach]) {
        float y[kEach];
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            y[i] = gate[i] * approximate_reciprocal(1.0f + approximate_exp2(-1.44269504f * gate[i])) * up[i];
#pragma unroll
        for (int two = 0; two < kTwos; ++two)
            if (wanted[two]) to[two] = pack_bf16(y[2 * two], y[2 * two + 1]);
    }
};

template <int PAIRS>
struct QkvRope : Tile<PAIRS> {
    using Params = NormQkvRope;
    using Of = Tile<PAIRS>;
    using Of::kEach, Of::kPairs, Of::kTwos, Of::wanted;
    bool rotated, fp32;
    const float *sin_at, *cos_at;
    unsigned char* to;  // the first of a pair; the second is head_dim / 2 behind it
    float2 sin[kTwos], cos[kTwos];

    // Heads of q, then of k, then of v; a head has whole blocks.
    struct Place {
        int first, head, which;
        bool there;
        __device__ __forceinline__ explicit Place(const Params& p) {
            const int tiles = (p.half + kPairs - 1) / kPairs, most = p.q_heads + 2 * p.kv_heads - 1;
            head = static_cast<int>(blockIdx.x) / tiles;
            first = (static_cast<int>(blockIdx.x) - head * tiles) * kPairs;
            there = head <= most;
            head = min(head, most);
            which = head < p.q_heads ? 0 : head < p.q_heads + p.kv_heads ? 1 : 2;
            head -= which == 0 ? 0 : which == 1 ? p.q_heads : p.q_heads + p.kv_heads;
        }
    };
    __device__ __forceinline__ QkvRope(const Params& p, int row, int pair) {
        const Place at(p);
        const int i = at.first + pair, batch = row / p.tokens, token = row - batch * p.tokens;
#pragma unroll
        for (int two = 0; two < kTwos; ++two) wanted[two] = at.there && row < p.rows && i + 2 * two < p.half;
        rotated = at.which < 2;
        fp32 = at.which > 0 && p.fp32_slots;
        const int64_t angle = batch * p.rope_batch_stride + static_cast<int64_t>(token) * p.half + i;
        sin_at = p.sin + angle, cos_at = p.cos + angle;
        const int head_dim = 2 * p.half;
        const int64_t row_at = at.which ? batch * p.slot_batch_stride + token * p.slot_stride
                                        : static_cast<int64_t>(row) * (p.q_heads * head_dim);
        void* const base = at.which == 0 ? p.q : at.which == 1 ? p.k : p.v;
        to = static_cast<unsigned char*>(base) + (row_at + at.head * head_dim + i) * (fp32 ? 4 : 2);
    }
    static __device__ __forceinline__ const bf16* weight_row(const Params& p, int pair, bool second) {
        const Place at(p);
        const void* const weight = at.which == 0 ? p.q_weight : at.which == 1 ? p.k_weight : p.v_weight;
        const int64_t stride = at.which == 0 ? p.q_stride : at.which == 1 ? p.k_stride : p.v_stride;
        const int row = at.head * 2 * p.half + min(at.first + pair, p.half - 1) + (second ? p.half : 0);
        return static_cast<const bf16*>(weight) + row * stride;
    }
    __device__ __forceinline__ void settle_addresses() { settle(sin_at), settle(cos_at), settle(to); }
    __device__ __forceinline__ void request() {
#pragma unroll
        for (int two = 0; two < kTwos; ++two) {
            sin[two] = float2{0.0f, 0.0f}, cos[two] = float2{1.0f, 1.0f};
            if (!wanted[two] || !rotated) continue;
            sin[two] = load_l2(reinterpret_cast<const float2*>(sin_at) + two);
            cos[two] = load_l2(reinterpret_cast<const float2*>(cos_at) + two);
        }
    }
    __device__ __forceinline__ void finish(const Params& p, const float (&x)[kEach], const float (&y)[kEach]) {
#pragma unroll
        for (int two = 0; two < kTwos; ++two) {
            if (!wanted[two]) continue;
            const float2 a{x[2 * two], x[2 * two + 1]}, b{y[2 * two], y[2 * two + 1]}, s = sin[two], c = cos[two];
            float2 first = a, second = b;
            if (rotated) {
                first = float2{a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y};
                second = float2{b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y};
            }
            if (fp32) {
                *reinterpret_cast<float2*>(to + 8 * two) = first;
                *reinterpret_cast<float2*>(to + 8 * two + 4 * p.half) = second;
            } else {
                *reinterpret_cast<uint32_t*>(to + 4 * two) = pack_bf16(first.x, first.y);
                *reinterpret_cast<uint32_t*>(to + 4 * two + 2 * p.half) = pack_bf16(second.x, second.y);
            }
        }
    }
};

// INPUTS is K where it is known, so that no step asks whether it is there; else 0, and K is p.inputs.
template <class Pairs, int INPUTS>
__global__ void __launch_bounds__(kThreads) norm_products_fwd_kernel(const typename Pairs::Params p) {
#if SMOLVLA_SM_90 && !(defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200)  // 12.x has too little shared memory for a block
    SMOLVLA_SHARED(shared);
    constexpr int kCols = 2 * Pairs::kPairs, kTiles = kCols / 8, kPitch = sums_pitch(Pairs::kPairs);
    constexpr int kMostChunks = ((INPUTS ? INPUTS : kNormProductsMostInputs) + kChunk - 1) / kChunk;
    constexpr int kGroupChunks = (kMostChunks + kGroups - 1) / kGroups;
    const int inputs = INPUTS ? INPUTS : p.inputs, pieces = inputs / 8, steps = (pieces + 1) / 2;
    const int pitch = operand_pitch(inputs);
    const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = threadIdx.x / 64;
    const int first_row = blockIdx.y * kRows, rows = min(p.rows - first_row, kRows);
    auto* const barriers = reinterpret_cast<uint64_t*>(shared);
    unsigned char *const operands = shared + kBarrierBytes, *const weights = operands, *const x = weights + kCols * pitch;
    const auto group_inputs = [&](int group) {
        return max(0, min(inputs - group * kGroupChunks * kChunk, kGroupChunks * kChunk));
    };

    if (thread == 0) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            init_copy_barrier(&barriers[group]);
            expect_copies(&barriers[group], 2 * (rows * group_inputs(group) + (group ? 0 : kCols * inputs)));
        }
        publish_copy_barriers();
    }
    // Behind an odd number of 16-byte pieces the last 16 of K has zeros.
    if (pieces % 2)
        for (int row = thread; row < kCols + rows; row += kThreads)
            *reinterpret_cast<uint4*>(operands + row * pitch + 16 * pieces) = uint4{0, 0, 0, 0};
    __syncthreads();
    cluster_arrive_relaxed();

    // One lane of each warp copies: a row at once of the weights, and a group of a row of x.
    const auto request_weights = [&] {
#pragma unroll
        for (int row = warp; row < kCols; row += kWarps)
            copy_bulk(weights + row * pitch, Pairs::weight_row(p, row % Pairs::kPairs, row >= Pairs::kPairs), 2 * inputs,
                      &barriers[0]);
    };
    const int ranks = cluster_size(), x_row = cluster_rank() + ranks * warp;
    const bf16* x_from = static_cast<const bf16*>(p.x) + static_cast<int64_t>(first_row + x_row) * inputs;
    const auto request_x = [&] {
        for (int row = x_row; row < rows; row += ranks * kWarps) {
#pragma unroll
            for (int group = 0; group < kGroups; ++group) {
                const int first = group * kGroupChunks * kChunk;
                if (first < inputs)
                    copy_to_cluster(x + row * pitch + 2 * first, x_from + (row - x_row) * inputs + first,
                                    2 * group_inputs(group), &barriers[group], ranks);
            }
        }
    };

    // A warp multiplies half of the rows by all columns, one 16 of each chunk.
    const int matrix = threadIdx.x % 32 / 8, within = threadIdx.x % 8;
    const unsigned char *a_at[2], *b_at[kCols / 16];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = kRows / 2 * (warp % 2) + 16 * i + 8 * (matrix % 2) + within;
        a_at[i] = x + min(row, rows - 1) * pitch + 32 * share + 16 * (matrix / 2);  // sums of no row are never stored
    }
#pragma unroll
    for (int i = 0; i < kCols / 16; ++i)
        b_at[i] = weights + (16 * i + 8 * (matrix / 2) + within) * pitch + 32 * share + 16 * (matrix % 2);
    float sums[2][kTiles][4] = {};
    const auto multiply = [&](int group) {
#pragma unroll
        for (int i = 0; i < kGroupChunks; ++i) {
            const int chunk = group * kGroupChunks + i, step = kShares * chunk;
            // Whole warps. Where K is known the first condition of a step says all, and no branch is left.
            if (chunk >= kMostChunks || !(step + kShares <= steps || step + share < steps)) continue;
            uint32_t a[2][4];
            ldmatrix_x4(a[0], a_at[0] + 128 * chunk);
            ldmatrix_x4(a[1], a_at[1] + 128 * chunk);
#pragma unroll
            for (int two = 0; two < kCols / 16; ++two) {
                uint32_t b[4];
                ldmatrix_x4(b, b_at[two] + 128 * chunk);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    mma_bf16(sums[half][2 * two], a[half], b[0], b[1]);
                    mma_bf16(sums[half][2 * two + 1], a[half], b[2], b[3]);
                }
            }
        }
    };

    // What a thread finishes: some pairs of one row, which four neighbouring lanes share. Sums of a warp's rows, kStep
    // apart, lie in different banks.
    constexpr int kStep = Pairs::kPairs == 16 ? 2 : 1;
    const int row = 8 * kStep * (warp / kStep) + warp % kStep + kStep * (lane / 4), pair = lane % 4 * Pairs::kEach;
    Pairs pairs(p, first_row + row, pair);
    const float* squares_at = p.squares + static_cast<int64_t>(lane % 4) * p.rows + min(first_row + row, p.rows - 1);
    float* const parts = reinterpret_cast<float*>(operands);
    float* const parts_to = parts + (kRows * share + kRows / 2 * (warp % 2) + lane / 4) * kPitch + lane % 4 * 2;
    const float* const parts_from = parts + row * kPitch + pair;

    settle(x_from), settle(squares_at), pairs.settle_addresses();
    if (!p.weights_settled) await_earlier_launches();  // one of them may write the weights
    if (lane == 0) request_weights();
    cluster_wait();  // the barriers of all blocks are there
    await_earlier_launches();
    let_next_launch_begin();  // not earlier: blocks that wait would take the places of the launch that runs
    if (lane == 0) request_x();

    constexpr int kAtOnce = 4;  // of each lane's parts of the squares: 16 a row
    float some[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        some[i] = lane % 4 + 4 * i < p.parts ? load_l2(squares_at + static_cast<int64_t>(4 * i) * p.rows) : 0.0f;
    }
    pairs.request();

    float squares = (some[0] + some[1]) + (some[2] + some[3]);
#pragma unroll 1
    for (int i = kAtOnce; lane % 4 + 4 * i < p.parts; ++i) squares += load_l2(squares_at + static_cast<int64_t>(4 * i) * p.rows);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    const float scale = rsqrtf(squares * (1.0f / static_cast<float>(inputs)) + p.eps);

#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
        await_copies(&barriers[group]);  // the first group's with the weights
        multiply(group);
    }
    cluster_arrive_relaxed();  // all copies to this block have come

    __syncthreads();  // of operands nobody reads any more
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            float* to = parts_to + 16 * half * kPitch + 8 * tile;
            *reinterpret_cast<float2*>(to) = float2{sums[half][tile][0], sums[half][tile][1]};
            *reinterpret_cast<float2*>(to + 8 * kPitch) = float2{sums[half][tile][2], sums[half][tile][3]};
        }
    }
    __syncthreads();
    float first[kShares][Pairs::kEach], second[kShares][Pairs::kEach];
#pragma unroll
    for (int from = 0; from < kShares; ++from) {
        load(parts_from + from * kRows * kPitch, first[from]);
        load(parts_from + from * kRows * kPitch + Pairs::kPairs, second[from]);
    }
#pragma unroll
    for (int i = 0; i < Pairs::kEach; ++i) {
#pragma unroll
        for (int from = 1; from < kShares; ++from) {
            first[0][i] += first[from][i];
            second[0][i] += second[from][i];
        }
        first[0][i] *= scale;
        second[0][i] *= scale;
    }
    pairs.finish(p, first[0], second[0]);
    cluster_wait();  // and those that it sent: PTX does not say that a copy outlives the block that began it
#else
    __trap();  // the launcher's caller asks first
#endif
}

// Of as many blocks as there are pieces of the columns, and as it takes to fill the last cluster.
template <class Pairs>
Grid grid_of(const typename Pairs::Params& p, int pieces) {
    Grid grid;
    grid.cluster = kMostRanks;
    while (grid.cluster > 1 && grid.cluster > static_cast<unsigned>(pieces)) grid.cluster /= 2;
    grid.blocks = dim3((pieces + grid.cluster - 1) / grid.cluster * grid.cluster, (p.rows + kRows - 1) / kRows);
    grid.threads = dim3(kThreads);
    grid.shared_bytes = shared_bytes_of(Pairs::kPairs, p.rows, p.inputs);
    grid.dependent = p.dependent;
    return grid;
}

template <class Pairs>
void start(const char* name, const typename Pairs::Params& p, int pieces, void* stream) {
    const auto with = [&](auto kernel) {
        launch(name, kernel, grid_of<Pairs>(p, pieces), static_cast<cudaStream_t>(stream), p);
    };
    switch (p.inputs) {  // widths of SmolVLA's expert and of its text model
        case 480: return with(norm_products_fwd_kernel<Pairs, 480>);
        case 720: return with(norm_products_fwd_kernel<Pairs, 720>);
        case 960: return with(norm_products_fwd_kernel<Pairs, 960>);
        default: return with(norm_products_fwd_kernel<Pairs, 0>);
    }
}

template <int PAIRS>
void start_swiglu(const NormSwiglu& p, void* stream) {
    start<Swiglu<PAIRS>>("norm_swiglu", p, (p.outputs + PAIRS - 1) / PAIRS, stream);
}

template <int PAIRS>
void start_qkv(const NormQkvRope& p, void* stream) {
    const int tiles = (p.half + PAIRS - 1) / PAIRS;
    start<QkvRope<PAIRS>>("norm_qkv_rope", p, tiles * (p.q_heads + 2 * p.kv_heads), stream);
}

using Largest = Swiglu<24>;

}  // namespace

size_t norm_products_shared_bytes() { return shared_bytes_of(Largest::kPairs, kRows, kNormProductsMostInputs); }

int norm_products_clusters() {
    NormSwiglu most{};
    most.rows = kRows;
    most.inputs = kNormProductsMostInputs;
    return clusters_at_once(norm_products_fwd_kernel<Largest, 0>, grid_of<Largest>(most, kMostRanks));
}

// Several tiles of rows fill the GPU with wider blocks too, and fewer blocks then bring x. Heads of 64 have two whole blocks
// of 16 pairs, and one and a third of 24.
void norm_swiglu(const NormSwiglu& p, void* stream) {
    p.rows > kRows ? start_swiglu<24>(p, stream) : start_swiglu<16>(p, stream);
}

void norm_qkv_rope(const NormQkvRope& p, void* stream) {
    p.rows > kRows ? start_qkv<16>(p, stream) : start_qkv<8>(p, stream);
}

}  // namespace smolvla::cuda
