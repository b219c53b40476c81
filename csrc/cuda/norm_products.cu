// Two products of normed rows and what follows them, of prepared rows (ops/next_norm.py), from sm_90 on: norm_swiglu, whose
// pairs of columns are gate and up, and norm_qkv_rope, whose pairs are what a rotation mixes.
//
// A block has 16 or 8 pairs of weight rows and up to 64 rows of x. All its weights are on their way to shared memory before
// the launches ahead have ended (programmatic dependent launch), and so is every address. Then x comes in four groups along
// K; products begin with the first. The bound is a warp's chain of instructions and reads of x from L2, not tensor cores:
// so two halves of the rows times four shares of K have a warp each, and each step of K is 12 instructions with constant
// offsets. Sums of the shares are added up in the order of their number. 1/rms is a factor of a whole row, applied to sums.
#include "cuda/norm_products.h"

#include <algorithm>

#include "cuda/ptx.cuh"

namespace smolvla::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 64, kShares = 4, kGroups = 4;
constexpr int kChunk = 16 * kShares;  // of K: one instruction's 16 for each share

// Rows of a matrix in shared memory: whole 16s of K and 16 bytes, so that ldmatrix meets no bank twice.
__host__ __device__ constexpr int pitch_of(int inputs) { return 32 * ((inputs + 15) / 16) + 16; }
// Floats between rows of partial sums: those of a fragment begin in banks of their own.
__host__ __device__ constexpr int sums_pitch(int pairs) { return 2 * pairs + 8; }

size_t shared_bytes_of(int pairs, int rows, int inputs) {
    const size_t operands = static_cast<size_t>(2 * pairs + std::min(rows, kRows)) * pitch_of(inputs);
    return std::max(operands, sizeof(float) * kShares * kRows * sums_pitch(pairs));  // sums take the place of operands
}

#if SMOLVLA_SM_90

template <int COUNT>
__device__ __forceinline__ void load(const float* from, float (&x)[COUNT]) {
    if constexpr (COUNT == 4) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
        const float2 two = *reinterpret_cast<const float2*>(from);
        x[0] = two.x, x[1] = two.y;
    }
}

#endif

// What a block's pairs of columns are, and what a thread does with those it finishes: kEach pairs from `pair` on, of `row`,
// with rows kRowStep apart in a warp, so that their sums lie in different banks.
struct Swiglu {
    using Params = NormSwiglu;
    static constexpr int kPairs = 16, kEach = 4, kRowStep = 2;
#if SMOLVLA_SM_90
    bool wanted;
    uint2* to;

    __device__ __forceinline__ Swiglu(const Params& p, int row, int pair) {
        const int col = blockIdx.x * kPairs + pair;
        wanted = row < p.rows && col < p.outputs;
        to = reinterpret_cast<uint2*>(static_cast<bf16*>(p.y) + static_cast<int64_t>(row) * p.outputs + col);
    }
    // Columns beyond the last one have its weights, and are never stored.
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
        if (wanted) *to = uint2{pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])};
    }
#endif
};

struct QkvRope {
    using Params = NormQkvRope;
    static constexpr int kPairs = 8, kEach = 2, kRowStep = 1;
#if SMOLVLA_SM_90
    bool wanted, rotated, fp32;
    const float *sin_at, *cos_at;
    unsigned char* to;  // the first of a pair; the second is head_dim / 2 behind it
    float2 sin, cos;

    // Heads of q, then of k, then of v; a head has whole blocks.
    struct Place {
        int first, head, which;
        __device__ __forceinline__ explicit Place(const Params& p) {
            const int tiles = (p.half + kPairs - 1) / kPairs;
            head = static_cast<int>(blockIdx.x) / tiles;
            first = (static_cast<int>(blockIdx.x) - head * tiles) * kPairs;
            which = head < p.q_heads ? 0 : head < p.q_heads + p.kv_heads ? 1 : 2;
            head -= which == 0 ? 0 : which == 1 ? p.q_heads : p.q_heads + p.kv_heads;
        }
    };
    __device__ __forceinline__ QkvRope(const Params& p, int row, int pair) {
        const Place at(p);
        const int i = at.first + pair, batch = row / p.tokens, token = row - batch * p.tokens;
        wanted = row < p.rows && i < p.half;
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
        sin = float2{0.0f, 0.0f}, cos = float2{1.0f, 1.0f};
        if (wanted && rotated) {
            sin = load_l2(reinterpret_cast<const float2*>(sin_at));
            cos = load_l2(reinterpret_cast<const float2*>(cos_at));
        }
    }
    __device__ __forceinline__ void finish(const Params& p, const float (&x)[kEach], const float (&y)[kEach]) {
        if (!wanted) return;
        float2 first{x[0], x[1]}, second{y[0], y[1]};
        if (rotated) {
            first = float2{x[0] * cos.x - y[0] * sin.x, x[1] * cos.y - y[1] * sin.y};
            second = float2{y[0] * cos.x + x[0] * sin.x, y[1] * cos.y + x[1] * sin.y};
        }
        if (fp32) {
            *reinterpret_cast<float2*>(to) = first;
            *reinterpret_cast<float2*>(to + 4 * p.half) = second;
        } else {
            *reinterpret_cast<uint32_t*>(to) = pack_bf16(first.x, first.y);
            *reinterpret_cast<uint32_t*>(to + 2 * p.half) = pack_bf16(second.x, second.y);
        }
    }
#endif
};

// INPUTS is K where it is known, so that no step asks whether it is there; else 0, and K is p.inputs.
template <class Pairs, int INPUTS>
__global__ void __launch_bounds__(kThreads) norm_products_fwd_kernel(const typename Pairs::Params p) {
#if SMOLVLA_SM_90
    SMOLVLA_SHARED(shared);
    constexpr int kCols = 2 * Pairs::kPairs, kTiles = kCols / 8, kPitch = sums_pitch(Pairs::kPairs);
    constexpr int kMostChunks = ((INPUTS ? INPUTS : kNormProductsMostInputs) + kChunk - 1) / kChunk;
    constexpr int kGroupChunks = (kMostChunks + kGroups - 1) / kGroups;
    const int inputs = INPUTS ? INPUTS : p.inputs, pieces = inputs / 8, steps = (pieces + 1) / 2;
    const int pitch = pitch_of(inputs);
    const int thread = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = threadIdx.x / 64;
    const int first_row = blockIdx.y * kRows, rows = min(p.rows - first_row, kRows);
    unsigned char *const weights = shared, *const x = shared + kCols * pitch;

    // Behind an odd number of 16-byte pieces the last 16 of K has zeros.
    if (pieces % 2)
        for (int row = thread; row < kCols + rows; row += kThreads)
            *reinterpret_cast<uint4*>(shared + row * pitch + 16 * pieces) = uint4{0, 0, 0, 0};

    // Neighbouring lanes copy neighbouring pieces: of a weight's row in turns, of a row of x eight of each chunk.
    constexpr int kLanes = kThreads / kCols, kMostTurns = (8 * kMostChunks + kLanes - 1) / kLanes;
    const auto request_weights = [&] {
        const int row = threadIdx.x / kLanes, piece = threadIdx.x % kLanes;
        const bf16* from = Pairs::weight_row(p, row % Pairs::kPairs, row >= Pairs::kPairs) + 8 * piece;
        unsigned char* to = weights + row * pitch + 16 * piece;
#pragma unroll
        for (int turn = 0; turn < kMostTurns; ++turn)
            if (piece + kLanes * turn < pieces) cp_async_16(to + 16 * kLanes * turn, from + 8 * kLanes * turn);
    };
    const int x_row = threadIdx.x / 8, x_piece = threadIdx.x % 8;
    unsigned char* const x_to = x + x_row * pitch + 16 * x_piece;
    const bf16* x_from = static_cast<const bf16*>(p.x) + static_cast<int64_t>(first_row + x_row) * inputs + 8 * x_piece;
    const bf16* upper_from = x_from + kRows / 2 * inputs;
    const bool lower = x_row < rows, upper = x_row + kRows / 2 < rows;
    const auto request_x = [&](int group) {
#pragma unroll
        for (int i = 0; i < kGroupChunks; ++i) {
            const int chunk = group * kGroupChunks + i;
            if (chunk >= kMostChunks || x_piece + 8 * chunk >= pieces) continue;
            if (lower) cp_async_16(x_to + 128 * chunk, x_from + kChunk * chunk);
            if (upper) cp_async_16(x_to + kRows / 2 * pitch + 128 * chunk, upper_from + kChunk * chunk);
        }
        cp_async_commit();
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
            if (chunk >= kMostChunks || !(step + kShares <= steps || step + share < steps)) continue;  // whole warps
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

    // What a thread finishes: some pairs of one row, which four neighbouring lanes share.
    constexpr int kStep = Pairs::kRowStep;
    const int row = 8 * kStep * (warp / kStep) + warp % kStep + kStep * (lane / 4), pair = lane % 4 * Pairs::kEach;
    Pairs pairs(p, first_row + row, pair);
    const float* squares_at = p.squares + static_cast<int64_t>(lane % 4) * p.rows + min(first_row + row, p.rows - 1);
    float* const parts = reinterpret_cast<float*>(shared);
    float* const parts_to = parts + (kRows * share + kRows / 2 * (warp % 2) + lane / 4) * kPitch + lane % 4 * 2;
    const float* const parts_from = parts + row * kPitch + pair;

    settle(x_from), settle(upper_from), settle(squares_at), pairs.settle_addresses();
    if (!p.weights_settled) await_earlier_launches();
    request_weights();
    await_earlier_launches();
    let_next_launch_begin();  // one waits behind a running one: more stand where that one could run

    constexpr int kAtOnce = 4;  // of each lane's parts of the squares: 16 a row
    float some[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
        some[i] = lane % 4 + 4 * i < p.parts ? load_l2(squares_at + static_cast<int64_t>(4 * i) * p.rows) : 0.0f;
    }
    pairs.request();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) request_x(group);  // the first one's with the weights

    float squares = (some[0] + some[1]) + (some[2] + some[3]);
#pragma unroll 1
    for (int i = kAtOnce; lane % 4 + 4 * i < p.parts; ++i) squares += load_l2(squares_at + static_cast<int64_t>(4 * i) * p.rows);
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares += __shfl_xor_sync(0xffffffffu, squares, 2);
    const float scale = rsqrtf(squares * (1.0f / static_cast<float>(inputs)) + p.eps);

    cp_async_wait<3>();
    __syncthreads();
    multiply(0);
    cp_async_wait<2>();
    __syncthreads();
    multiply(1);
    cp_async_wait<1>();
    __syncthreads();
    multiply(2);
    cp_async_wait<0>();
    __syncthreads();
    multiply(3);

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
#else
    __trap();  // the launcher's caller asks for dependent launches first
#endif
}

template <class Pairs>
void start(const char* name, const typename Pairs::Params& p, int pieces, void* stream) {
    Grid grid;
    grid.blocks = dim3(pieces, (p.rows + kRows - 1) / kRows);
    grid.threads = dim3(kThreads);
    grid.shared_bytes = shared_bytes_of(Pairs::kPairs, p.rows, p.inputs);
    grid.dependent = p.dependent;
    const auto with = [&](auto kernel) { launch(name, kernel, grid, static_cast<cudaStream_t>(stream), p); };
    switch (p.inputs) {  // widths of SmolVLA's expert and of its text model
        case 480: return with(norm_products_fwd_kernel<Pairs, 480>);
        case 720: return with(norm_products_fwd_kernel<Pairs, 720>);
        case 960: return with(norm_products_fwd_kernel<Pairs, 960>);
        default: return with(norm_products_fwd_kernel<Pairs, 0>);
    }
}

}  // namespace

size_t norm_products_shared_bytes(int rows, int inputs) {
    return std::max(shared_bytes_of(Swiglu::kPairs, rows, inputs), shared_bytes_of(QkvRope::kPairs, rows, inputs));
}

void norm_swiglu(const NormSwiglu& p, void* stream) {
    start<Swiglu>("norm_swiglu", p, (p.outputs + Swiglu::kPairs - 1) / Swiglu::kPairs, stream);
}

void norm_qkv_rope(const NormQkvRope& p, void* stream) {
    const int tiles = (p.half + QkvRope::kPairs - 1) / QkvRope::kPairs;
    start<QkvRope>("norm_qkv_rope", p, tiles * (p.q_heads + 2 * p.kv_heads), stream);
}

}  // namespace smolvla::cuda
