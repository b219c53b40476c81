// The instructions that CUDA C++ has no words for, each as a function of its own name. The host emulator has the same
// functions in tests/simt/emulator/ptx.h. Baseline is sm_80.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace smolvla::cuda {

// 16-bit floats as storage; all arithmetic is fp32 or inside mma.
struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

}  // namespace smolvla::cuda

// Whether this pass of the compiler has clusters and dependent launches.
#if defined(SMOLVLA_SIMT) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define SMOLVLA_SM_90 1
#else
#define SMOLVLA_SM_90 0
#endif

#if defined(SMOLVLA_SIMT)
#include "emulator/ptx.h"
#else

namespace smolvla::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Two floats rounded to nearest even; the first lands in the low half, as it would lie first in memory.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
__device__ __forceinline__ bf16 to_bf16(float x) { return {static_cast<uint16_t>(pack_bf16(x, 0.0f) & 0xffff)}; }
__device__ __forceinline__ fp16 to_fp16(float x) { return {static_cast<uint16_t>(pack_fp16(x, 0.0f) & 0xffff)}; }

// Two bf16 products, each rounded once.
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    // -0 as addend keeps the product's own sign where it is zero.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}

// One instruction each, within two units in the last place; what is below the smallest normal number is 0.
__device__ __forceinline__ float approximate_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float approximate_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Keeps the compiler from working an address out anew at each use behind a wait; what ptxas makes of it is its own affair.
template <class T>
__device__ __forceinline__ void settle(T*& address) {
    asm volatile("" : "+l"(address));
}

// 16 bytes from global to shared memory, in the background; zeros where not wanted, and then nothing is read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool wanted = true) {
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(wanted ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's newest groups are under way.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane i names the 16 bytes of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// d[16, 8] += a[16, 16] · b[16, 8], fp32 sums. Fragments as the PTX manual draws them: with g = lane / 4, t = lane % 4
// a holds rows g and g + 8 at columns 2t and 2t + 8, b holds column g at rows 2t and 2t + 8, d rows g and g + 8 at 2t.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Reads past the L1 cache, which does not see what other multiprocessors write.
__device__ __forceinline__ uint4 load_l2(const uint4* from) { return __ldcg(from); }
__device__ __forceinline__ float2 load_l2(const float2* from) { return __ldcg(from); }
__device__ __forceinline__ float load_l2(const float* from) { return __ldcg(from); }
__device__ __forceinline__ uint32_t load_l2(const uint32_t* from) { return __ldcg(from); }

// A counter in global memory: what a block wrote before it added is seen by whoever then reads the sum, where the
// block's threads met at a barrier before the one thread adds, and the reader's meet after the one thread read.
__device__ __forceinline__ void add_release(uint32_t* counter, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}
// In a loop that waits for a counter.
__device__ __forceinline__ void relax() {}

// bar.sync on one of 16 barriers; the threads that take part are a multiple of 32.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

#if SMOLVLA_SM_90
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ int cluster_size() {
    int ranks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
    return ranks;
}
// Says that a thread has come, and nothing of what it wrote but barriers of copies that it published.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Bulk copies, of multiples of 16 bytes between multiples of 16 bytes. One thread begins a copy; an mbarrier in shared
// memory, used for one phase, counts the bytes that have come.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ void init_copy_barrier(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
// All bytes that will come, said by one thread.
__device__ __forceinline__ void expect_copies(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// By the thread that made the mbarriers, for other blocks; bulk copies take another path to them, which has a fence of its
// own. Behind a barrier of the block its threads may use them, behind one of the cluster those of its other blocks.
__device__ __forceinline__ void publish_store_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void publish_copy_barriers() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    publish_store_barriers();
}
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
// To the same place in all blocks of the cluster; each one's own mbarrier counts what comes to it. It may be much slower in
// code for sm_90 than for sm_90a.
__device__ __forceinline__ void copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int ranks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>((1u << ranks) - 1))
        : "memory");
}
// 16 bytes to the same place in a block of the cluster, in the background; that block's mbarrier counts them.
__device__ __forceinline__ void store_to_rank(float* own, int rank, float4 value, uint64_t* own_barrier) {
    uint32_t to, barrier;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(own)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(barrier) : "r"(shared_address(own_barrier)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
                 "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(barrier)
                 : "memory");
}
// Until all have come, by each thread that reads them: copies, and what threads of other blocks stored.
#define SMOLVLA_AWAIT(order)                                                      \
    asm volatile(                                                                 \
        "{\n"                                                                     \
        ".reg .pred there;\n"                                                     \
        "again:\n"                                                                \
        "mbarrier.try_wait.parity" order ".shared::cta.b64 there, [%0], 0;\n"     \
        "@!there bra again;\n"                                                    \
        "}" ::"r"(shared_address(barrier))                                        \
        : "memory")
__device__ __forceinline__ void await_copies(uint64_t* barrier) { SMOLVLA_AWAIT(""); }
__device__ __forceinline__ void await_stores(uint64_t* barrier) { SMOLVLA_AWAIT(".acquire.cluster"); }
#undef SMOLVLA_AWAIT

// Programmatic dependent launch: the launch behind this one may begin; all launches ahead of it have ended.
__device__ __forceinline__ void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void await_earlier_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#endif

}  // namespace smolvla::cuda

#endif
