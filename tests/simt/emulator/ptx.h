// The functions of cuda/ptx.cuh for the emulator: same names, same meaning, checked. See warp.cpp, async.cpp.
#pragma once

#include "cuda/ptx.cuh"

namespace simt {

using smolvla::cuda::bf16;
using smolvla::cuda::fp16;

uint16_t round_to_bf16(float x);
uint16_t round_to_fp16(float x);
float widen_fp16(uint16_t bits);

void copy_async(void* shared, const void* global, bool wanted);
void copy_async_commit();
void copy_async_wait(int pending);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16);
// Copies bytes that are aligned to their own number, past L1.
void load_past_l1(void* to, const void* from, size_t bytes);
void add_release(uint32_t* counter, uint32_t value);
uint32_t load_acquire(const uint32_t* counter);
void named_barrier(int barrier, int threads);
int cluster_rank();
void cluster_arrive_relaxed();
void cluster_wait();
int cluster_size();
void init_copy_barrier(uint64_t* barrier);
void publish_copy_barriers();
void expect_copies(uint64_t* barrier, int bytes);
void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier);
void copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int ranks);
// 16 bytes.
void store_to_rank(void* own, int rank, const void* value, uint64_t* own_barrier);
void await_copies(uint64_t* barrier);
void await_earlier_launches();

}  // namespace simt

namespace smolvla::cuda {

__forceinline__ float to_float(float x) { return x; }
__forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__forceinline__ float to_float(fp16 x) { return simt::widen_fp16(x.bits); }

__forceinline__ uint32_t pack_bf16(float low, float high) {
    return simt::round_to_bf16(low) | static_cast<uint32_t>(simt::round_to_bf16(high)) << 16;
}
__forceinline__ uint32_t pack_fp16(float low, float high) {
    return simt::round_to_fp16(low) | static_cast<uint32_t>(simt::round_to_fp16(high)) << 16;
}
__forceinline__ bf16 to_bf16(float x) { return {simt::round_to_bf16(x)}; }
__forceinline__ fp16 to_fp16(float x) { return {simt::round_to_fp16(x)}; }

// A product of two bf16 is exact in fp32 (barring underflow, where fp32 is far below bf16's own last place).
__forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
    const float high = __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
    return pack_bf16(low, high);
}

// Rounded once; the device's are within two units in the last place, and flush.
__forceinline__ float approximate_exp2(float x) { return std::exp2(x); }
__forceinline__ float approximate_reciprocal(float x) { return 1.0f / x; }

template <class T>
__forceinline__ void settle(T*&) {}

__forceinline__ void cp_async_16(void* shared, const void* global, bool wanted = true) {
    simt::copy_async(shared, global, wanted);
}
__forceinline__ void cp_async_commit() { simt::copy_async_commit(); }
template <int PENDING>
__forceinline__ void cp_async_wait() {
    static_assert(PENDING >= 0);
    simt::copy_async_wait(PENDING);
}

__forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, false); }
__forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, true); }

__forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma(d, a, b0, b1, true);
}
__forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    simt::mma(d, a, b0, b1, false);
}

template <class T>
__forceinline__ T load_l2(const T* from) {
    T value;
    simt::load_past_l1(&value, from, sizeof(T));
    return value;
}

__forceinline__ void add_release(uint32_t* counter, uint32_t value) { simt::add_release(counter, value); }
__forceinline__ uint32_t load_acquire(const uint32_t* counter) { return simt::load_acquire(counter); }
__forceinline__ void relax() { simt::yield(); }
__forceinline__ void barrier_sync(int barrier, int threads) { simt::named_barrier(barrier, threads); }

__forceinline__ int cluster_rank() { return simt::cluster_rank(); }
__forceinline__ void cluster_arrive_relaxed() { simt::cluster_arrive_relaxed(); }
__forceinline__ void cluster_wait() { simt::cluster_wait(); }
__forceinline__ int cluster_size() { return simt::cluster_size(); }
__forceinline__ void init_copy_barrier(uint64_t* barrier) { simt::init_copy_barrier(barrier); }
__forceinline__ void publish_copy_barriers() { simt::publish_copy_barriers(); }
__forceinline__ void publish_store_barriers() { simt::publish_copy_barriers(); }
__forceinline__ void expect_copies(uint64_t* barrier, int bytes) { simt::expect_copies(barrier, bytes); }
__forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    simt::copy_bulk(shared, global, bytes, barrier);
}
__forceinline__ void copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int ranks) {
    simt::copy_to_cluster(shared, global, bytes, barrier, ranks);
}
__forceinline__ void store_to_rank(float* own, int rank, float4 value, uint64_t* own_barrier) {
    simt::store_to_rank(own, rank, &value, own_barrier);
}
__forceinline__ void await_copies(uint64_t* barrier) { simt::await_copies(barrier); }
__forceinline__ void await_stores(uint64_t* barrier) { simt::await_copies(barrier); }
__forceinline__ void let_next_launch_begin() {}
__forceinline__ void await_earlier_launches() { simt::await_earlier_launches(); }

}  // namespace smolvla::cuda
