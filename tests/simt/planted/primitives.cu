// Right kernels, each of one kind of instruction; their results are compared with what the manual says.
#include "planted.h"

namespace planted {
namespace {

constexpr unsigned ALL = 0xffffffffu;

// a: 16 x 16, then b: 16 x 8, of 16-bit floats; d: 16 x 8 floats, added to. As the PTX manual draws the fragments.
template <bool BF16>
__global__ void matrix_product(Args p) {
    const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto* a = reinterpret_cast<const uint16_t*>(p.b);
    const uint16_t* b = a + 256;
    auto* d = reinterpret_cast<float*>(p.a);
    const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
    const auto of_a = [&](unsigned row, unsigned column) { return pair(a[16 * row + column], a[16 * row + column + 1]); };
    const auto of_b = [&](unsigned row) { return pair(b[8 * row + g], b[8 * row + 8 + g]); };
    const uint32_t left[4] = {of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8)};
    float sum[4] = {d[8 * g + 2 * t], d[8 * g + 2 * t + 1], d[8 * g + 64 + 2 * t], d[8 * g + 65 + 2 * t]};
    if (BF16)
        mma_bf16(sum, left, of_b(2 * t), of_b(2 * t + 8));
    else
        mma_fp16(sum, left, of_b(2 * t), of_b(2 * t + 8));
    d[8 * g + 2 * t] = sum[0];
    d[8 * g + 2 * t + 1] = sum[1];
    d[8 * g + 64 + 2 * t] = sum[2];
    d[8 * g + 65 + 2 * t] = sum[3];
}

// 32 rows of 8 numbers 0, 1, 2, ... of 16 bits; r of each lane.
template <bool TRANSPOSED>
__global__ void matrix_load(Args p) {
    SMOLVLA_SHARED(memory);
    auto* halves = reinterpret_cast<uint16_t*>(memory);
    for (unsigned i = threadIdx.x; i < 256; i += 32) halves[i] = static_cast<uint16_t>(i);
    __syncwarp();
    uint32_t r[4];
    if (TRANSPOSED)
        ldmatrix_x4_trans(r, halves + 8 * threadIdx.x);
    else
        ldmatrix_x4(r, halves + 8 * threadIdx.x);
    *reinterpret_cast<uint4*>(p.a + 4 * threadIdx.x) = {r[0], r[1], r[2], r[3]};
}

__global__ void shuffles(Args p) {
    const unsigned lane = threadIdx.x;
    uint32_t* out = p.a + lane;
    out[0] = __shfl_sync(ALL, lane, 7);
    out[32] = __shfl_sync(ALL, lane, static_cast<int>(lane + 3), 8);
    out[64] = __shfl_up_sync(ALL, lane, 5);
    out[96] = __shfl_down_sync(ALL, lane, 3, 16);
    out[128] = __shfl_xor_sync(ALL, lane, 12);
    out[160] = static_cast<uint32_t>(__shfl_xor_sync(ALL, static_cast<float>(lane), 1));
    const auto wide = static_cast<unsigned long long>(lane) << 33 | lane;
    out[192] = static_cast<uint32_t>(__shfl_sync(ALL, wide, 31) >> 33);
    out[256] = __shfl_xor_sync(ALL, lane, 8, 8);  // reaches the segment before, not the one after
    // Two halves of a warp go their own ways.
    out[224] = lane < 16 ? __shfl_xor_sync(0x0000ffffu, lane, 1) : __shfl_xor_sync(0xffff0000u, lane, 2);
}

__global__ void votes(Args p) {
    const unsigned lane = threadIdx.x;
    p.a[lane] = __ballot_sync(ALL, lane % 3 == 0);
    p.a[32 + lane] = static_cast<uint32_t>(__any_sync(ALL, lane == 9));
    p.a[64 + lane] = static_cast<uint32_t>(__all_sync(ALL, lane != 9));
    p.a[96 + lane] = static_cast<uint32_t>(__all_sync(ALL, true));
    if (lane >= 20) return;
    p.a[128 + lane] = __ballot_sync(ALL, true);  // of the lanes that are left
}

// A ring of three stages of 64 words; each sum is of one stage, the last chunk is zeros.
__global__ void ring_of_copies(Args p) {
    SMOLVLA_SHARED(memory);
    constexpr unsigned STAGES = 3, CHUNKS = 9, WORDS = 64;
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const auto issue = [&](unsigned chunk) {
        if (chunk < CHUNKS && threadIdx.x < WORDS / 4)
            cp_async_16(words + WORDS * (chunk % STAGES) + 4 * threadIdx.x, p.b + WORDS * chunk + 4 * threadIdx.x,
                        chunk + 1 < CHUNKS);
        cp_async_commit();
    };
    for (unsigned chunk = 0; chunk + 1 < STAGES; ++chunk) issue(chunk);
    for (unsigned chunk = 0; chunk < CHUNKS; ++chunk) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        issue(chunk + STAGES - 1);
        uint32_t sum = 0;
        for (unsigned i = 0; i < WORDS; ++i) sum += words[WORDS * (chunk % STAGES) + i];
        p.a[64 * chunk + threadIdx.x] = sum;
    }
}

// Two halves of the block, each with barriers of its own, pass numbers back and forth.
__global__ void producer_and_consumer(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const unsigned half = threadIdx.x / 64, i = threadIdx.x % 64;
    for (unsigned round = 0; round < 4; ++round) {
        if (half == 0) {
            words[i] = 100 * round + i;
            barrier_sync(1, 128);  // full
            barrier_sync(2, 128);  // read
        } else {
            barrier_sync(1, 128);
            p.a[64 * round + i] = words[63 - i];
            barrier_sync(4, 64);  // of the consumers alone
            barrier_sync(2, 128);
        }
    }
}

// What the first warp wrote comes to the third by way of the second.
__global__ void relay(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) words[lane] = lane;
    if (warp < 2) barrier_sync(1, 64);
    if (warp > 0) barrier_sync(2, 64);
    if (warp == 2) p.a[lane] = words[31 - lane];
}

// Each block adds to the sums of its neighbour, round by round, all blocks in step; p.b is the counter.
__global__ void grid_barriers(Args p) {
    const unsigned blocks = gridDim.x;
    uint32_t* out = p.a;
    for (unsigned round = 0; round < 5; ++round) {
        const uint32_t* from = out + blockDim.x * ((round * blocks) + (blockIdx.x + 1) % blocks);
        uint32_t* to = out + blockDim.x * ((round + 1) * blocks + blockIdx.x);
        to[threadIdx.x] = load_l2(from + (threadIdx.x + 1) % blockDim.x) + 1;
        __syncthreads();
        if (threadIdx.x == 0) {
            add_release(p.b, 1);
            while (load_acquire(p.b) < blocks * (round + 1)) relax();
        }
        __syncthreads();
    }
}

// The last block to come adds up what all wrote: fences on both sides of an atomic.
__global__ void last_block_sums(Args p) {
    SMOLVLA_SHARED(memory);
    auto* ticket = reinterpret_cast<uint32_t*>(memory);
    p.a[1 + blockIdx.x * blockDim.x + threadIdx.x] = 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        *ticket = atomicAdd(p.b, 1u);
        __threadfence();
    }
    __syncthreads();
    if (*ticket + 1 != gridDim.x || threadIdx.x) return;
    uint32_t sum = 0;
    for (unsigned i = 0; i < gridDim.x * blockDim.x; ++i) sum += load_l2(p.a + 1 + i);
    p.a[0] = sum;
}

__global__ void atomics(Args p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(p.a, 1u);
    atomicAdd(reinterpret_cast<int*>(p.a + 1), -2);
    atomicAdd(reinterpret_cast<float*>(p.a + 2), 0.5f);
    atomicMax(p.a + 3, i);
    atomicMin(p.a + 4, i);
    atomicCAS(p.a + 5, 0u, 77u);
    if (i == 3) atomicExch(p.a + 6, 9u);
    atomicAdd(reinterpret_cast<unsigned long long*>(p.a + 8), 1ull << 32);
}

// Neighbouring halves, bytes even, of one word belong to different threads.
__global__ void neighbours(Args p) {
    SMOLVLA_SHARED(memory);
    const unsigned i = threadIdx.x;
    memory[i] = static_cast<unsigned char>(i);
    reinterpret_cast<uint16_t*>(p.a)[i] = static_cast<uint16_t>(i);
    __syncwarp();
    p.a[64 + i] = memory[i ^ 1];
}

__global__ void indices(Args p) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    p.a[block * blockDim.x * blockDim.y * blockDim.z + thread] = block << 16 | thread;
}

// Halves of p.b as floats; floats of p.b rounded to halves and widened again.
template <class T>
__global__ void widen(Args p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    reinterpret_cast<float*>(p.a)[i] = to_float(reinterpret_cast<const T*>(p.b)[i]);
}
template <bool BF16>
__global__ void narrow(Args p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    const float x = reinterpret_cast<const float*>(p.b)[i];
    const uint32_t both = BF16 ? pack_bf16(x, -x) : pack_fp16(x, -x);
    const uint16_t one = BF16 ? to_bf16(x).bits : to_fp16(x).bits;
    p.a[i] = one == (both & 0xffff) ? both : 0xdeadbeef;
}
__global__ void bf16_products(Args p) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    p.a[i] = mul_bf16x2(p.b[2 * i], p.b[2 * i + 1]);
}

__global__ void vectors(Args p) {
    const float4 x = reinterpret_cast<const float4*>(p.b)[threadIdx.x];
    float4 y = x;
    y.x += 1.0f;
    reinterpret_cast<float4*>(p.a)[threadIdx.x] = y;
    reinterpret_cast<float2*>(p.a)[64 + 2 * threadIdx.x] = make_float2(x.x, x.y);
    reinterpret_cast<float2*>(p.a)[65 + 2 * threadIdx.x] = load_l2(reinterpret_cast<const float2*>(p.b) + 2 * threadIdx.x + 1);
}

}  // namespace

const std::vector<Entry>& primitives() {
    static const Grid warp{1, 32, 512};
    static const std::vector<Entry> all = {
        {"mma_bf16", matrix_product<true>, warp},
        {"mma_fp16", matrix_product<false>, warp},
        {"ldmatrix", matrix_load<false>, warp},
        {"ldmatrix_trans", matrix_load<true>, warp},
        {"shuffles", shuffles, warp},
        {"votes", votes, warp},
        {"ring_of_copies", ring_of_copies, {1, 64, 3 * 256}},
        {"producer_and_consumer", producer_and_consumer, {1, 128, 256}},
        {"relay", relay, {1, 96, 128}},
        {"grid_barriers", grid_barriers, {6, 64, 0, true}},
        {"last_block_sums", last_block_sums, {7, 33, 16}},
        {"atomics", atomics, {3, 40}},
        {"neighbours", neighbours, warp},
        {"indices", indices, {dim3(2, 3, 2), dim3(5, 3, 2)}},
        {"widen_bf16", widen<bf16>, {64, 1024}},
        {"widen_fp16", widen<fp16>, {64, 1024}},
        {"narrow_bf16", narrow<true>, {4, 1024}},
        {"narrow_fp16", narrow<false>, {4, 1024}},
        {"bf16_products", bf16_products, {4, 256}},
        {"vectors", vectors, warp},
    };
    return all;
}

}  // namespace planted
