// Where a kernel reaches, and what it finds there.
#include "planted.h"

namespace planted {
namespace {

constexpr unsigned WORDS = 64;  // of shared memory and of each global array

__global__ void shared_read_outside(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    words[threadIdx.x] = threadIdx.x;
    words[threadIdx.x + 32] = threadIdx.x;
    __syncthreads();
    p.a[threadIdx.x] = words[threadIdx.x + (p.mended ? 32 : 33)];
}

__global__ void shared_write_outside(Args p) {
    SMOLVLA_SHARED(memory);
    reinterpret_cast<uint16_t*>(memory)[2 * WORDS - 32 + threadIdx.x + (p.mended ? 0 : 1)] = 1;
}

__global__ void global_read_outside(Args p) { p.a[threadIdx.x] = p.b[threadIdx.x + (p.mended ? 32 : 33)]; }

__global__ void global_write_outside(Args p) { (p.a - (p.mended ? 0 : 1))[threadIdx.x] = 1; }

__global__ void null_pointer(Args p) {
    const uint32_t* none = p.mended ? p.b : nullptr;
    p.a[threadIdx.x] = none[threadIdx.x];
}

__global__ void copy_source_outside(Args p) {
    SMOLVLA_SHARED(memory);
    // The last thread's 16 bytes begin where the array ends; zeros instead of them are no read.
    const bool inside = threadIdx.x < 15;
    if (threadIdx.x < 16) cp_async_16(memory + 16 * threadIdx.x, p.b + 4 * (threadIdx.x + 1), !p.mended || inside);
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void copy_target_outside(Args p) {
    SMOLVLA_SHARED(memory);
    if (threadIdx.x < 16) cp_async_16(memory + 16 * (threadIdx.x + (p.mended ? 0 : 1)), p.b + 4 * threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void ldmatrix_outside(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    for (unsigned i = threadIdx.x; i < WORDS; i += 32) words[i] = i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, memory + 16 * (threadIdx.x % (p.mended ? 16 : 17)));
    p.a[threadIdx.x] = r[0];
}

__global__ void memcpy_outside(Args p) {
    if (threadIdx.x == 0) memcpy(p.a, p.b + (p.mended ? 0 : 1), 4 * WORDS);
}

__global__ void across_the_end(Args p) {
    SMOLVLA_SHARED(memory);
    if (threadIdx.x == 0) memcpy(memory + 4 * WORDS - (p.mended ? 16 : 8), p.b, 16);
}

__global__ void stack_of_another(Args p) {
    SMOLVLA_SHARED(memory);
    auto* where = reinterpret_cast<volatile uint32_t**>(memory);
    volatile uint32_t mine = threadIdx.x;
    where[threadIdx.x] = &mine;
    __syncthreads();
    p.a[threadIdx.x] = *where[p.mended ? threadIdx.x : threadIdx.x ^ 1];
    __syncthreads();
}

__global__ void unwritten(Args p) {
    SMOLVLA_SHARED(memory);
    auto* halves = reinterpret_cast<uint16_t*>(memory);
    halves[2 * threadIdx.x] = 1;
    if (p.mended) halves[2 * threadIdx.x + 1] = 2;
    p.a[threadIdx.x] = reinterpret_cast<uint32_t*>(memory)[threadIdx.x];
}

__global__ void ldmatrix_unwritten(Args p) {
    SMOLVLA_SHARED(memory);
    auto* words = reinterpret_cast<uint32_t*>(memory);
    for (unsigned i = threadIdx.x; i < WORDS - (p.mended ? 0 : 1); i += 32) words[i] = i;
    __syncwarp();
    uint32_t r[4];
    ldmatrix_x4(r, memory + 16 * (threadIdx.x % 16));
    p.a[threadIdx.x] = r[0];
}

__global__ void misaligned_vector(Args p) {
    const auto* from = reinterpret_cast<const uint4*>(p.b + (p.mended ? 0 : 2));
    if (threadIdx.x < 15) *reinterpret_cast<uint4*>(p.a + 4 * threadIdx.x) = from[threadIdx.x];
}

__global__ void misaligned_word(Args p) {
    const auto* halves = reinterpret_cast<const uint16_t*>(p.b);
    p.a[threadIdx.x] = *reinterpret_cast<const uint32_t*>(halves + 2 * threadIdx.x + (p.mended ? 0 : 1));
}

__global__ void misaligned_copy(Args p) {
    SMOLVLA_SHARED(memory);
    if (threadIdx.x < 16) cp_async_16(memory + 16 * threadIdx.x, p.b + (p.mended ? 0 : 1));
    cp_async_commit();
    cp_async_wait<0>();
}

__global__ void trapped(Args p) {
    if (!p.mended && threadIdx.x == 7) __trap();
}

}  // namespace

const std::vector<Entry>& memory_kernels() {
    static const Grid one{1, 32, 4 * WORDS};
    static const std::vector<Entry> all = {
        {"shared_read_outside", shared_read_outside, one},
        {"shared_write_outside", shared_write_outside, one},
        {"global_read_outside", global_read_outside, one},
        {"global_write_outside", global_write_outside, one},
        {"null_pointer", null_pointer, one},
        {"copy_source_outside", copy_source_outside, one},
        {"copy_target_outside", copy_target_outside, one},
        {"ldmatrix_outside", ldmatrix_outside, one},
        {"memcpy_outside", memcpy_outside, one},
        {"across_the_end", across_the_end, one},
        {"stack_of_another", stack_of_another, one},
        {"unwritten", unwritten, one},
        {"ldmatrix_unwritten", ldmatrix_unwritten, one},
        {"misaligned_vector", misaligned_vector, one},
        {"misaligned_word", misaligned_word, one},
        {"misaligned_copy", misaligned_copy, one},
        {"trapped", trapped, one},
    };
    return all;
}

}  // namespace planted
