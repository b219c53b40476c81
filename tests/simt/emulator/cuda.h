// The host SIMT emulator, for tests: it runs the kernels of csrc/cuda, compiled as C++ with SMOLVLA_SIMT, on the CPU.
// This header is CUDA's words for them; ptx.h has those of cuda/ptx.cuh.
//
// Every thread is a fiber, and a seed decides who goes on wherever threads meet or look at a counter (runtime.cpp).
// Every load and store is checked (tsan.cpp, memory.cpp): bounds, alignment, shared memory that holds nothing yet, and
// races, found by what is ordered before what (clocks.h), not by what happens to come first. Barriers and __syncwarp
// order; counters order what a release published for who acquired; shuffles, votes and relaxed atomics order nothing.
// Data of another block must be read past L1. Blocks of a cluster run together; of a dependent launch nothing but settled
// memory (host_api.h) may be touched before its thread has waited for the launches ahead (clusters.cpp). Copies of cp.async come early or late (async.cpp). Whatever is wrong ends
// the launch with an exception that names kernel, block, thread and line (errors.cpp).
//
// Not modelled: time, registers, caches other than the rule above, reordering within a thread that no race would show.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __builtin_assume(condition) ((void)0)
// On the device static; here each block has its own.
#define SMOLVLA_SHARED(name) unsigned char* const name = ::simt::shared_memory()

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// The compiler would load and store the members of a vector one by one; as one value the access keeps its size, which
// tells the checker its alignment.
template <size_t BYTES>
struct Whole {
    typedef uint32_t type __attribute__((vector_size(BYTES), may_alias));
};

#define SMOLVLA_SIMT_WHOLE(name, bytes)                                             \
    name() = default;                                                               \
    __forceinline__ name(const name& other) { *this = other; }                      \
    __forceinline__ name& operator=(const name& other) {                            \
        using Whole = ::simt::Whole<bytes>::type;                                   \
        *reinterpret_cast<Whole*>(this) = *reinterpret_cast<const Whole*>(&other);  \
        return *this;                                                               \
    }

}  // namespace simt

#define SMOLVLA_SIMT_VECTORS(scalar, name)                                          \
    struct alignas(8) name##2 {                                                     \
        scalar x, y;                                                                \
        constexpr name##2(scalar x, scalar y) : x(x), y(y) {}                       \
        SMOLVLA_SIMT_WHOLE(name##2, 8)                                              \
    };                                                                              \
    struct alignas(16) name##4 {                                                    \
        scalar x, y, z, w;                                                          \
        constexpr name##4(scalar x, scalar y, scalar z, scalar w) : x(x), y(y), z(z), w(w) {} \
        SMOLVLA_SIMT_WHOLE(name##4, 16)                                             \
    };                                                                              \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }            \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }

SMOLVLA_SIMT_VECTORS(float, float)
SMOLVLA_SIMT_VECTORS(unsigned, uint)
SMOLVLA_SIMT_VECTORS(int, int)
#undef SMOLVLA_SIMT_VECTORS

namespace simt {

struct Shape {
    dim3 blocks, threads;
    size_t shared_bytes = 0;
    bool cooperative = false;
    unsigned cluster = 1;
    bool dependent = false;
};

// Runs call(body) once a thread. Throws std::runtime_error with kernel, block and thread; the next launch starts clean.
void run(const char* name, const Shape& shape, void (*call)(const void*), const void* body, size_t body_bytes);

// The kernel reads its arguments out of the body, which is therefore what it may read beside tensors.
template <class Body>
void run(const char* name, const Shape& shape, const Body& body) {
    run(name, shape, [](const void* at) { (*static_cast<const Body*>(at))(); }, &body, sizeof(Body));
}

// Of the running fiber, for as long as it lives: hence const.
__attribute__((const)) uint3 thread_index();
__attribute__((const)) uint3 block_index();
__attribute__((const)) dim3 block_size();
__attribute__((const)) dim3 grid_size();
__attribute__((const)) unsigned char* shared_memory();

enum class Shuffle { index, up, down, exclusive_or };
uint32_t shuffle(unsigned mask, uint32_t value, unsigned operand, int width, Shuffle how);
unsigned ballot(unsigned mask, bool vote);
void warp_barrier(unsigned mask);
void block_barrier();
void fence();
void yield();
[[noreturn]] void trap();

// Sum, exchange and so on of one word in one step; what was there before.
enum class Atomic { add, add_float, exchange, maximum, minimum, compare };
uint32_t atomic(void* address, uint32_t value, Atomic how, uint32_t compare = 0);
uint64_t atomic_wide(uint64_t* address, uint64_t value);

// The read-only path: an error where anything was written during this launch.
void check_read_only(const void* from, size_t bytes);

template <class To, class From>
inline __attribute__((always_inline)) To bits(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &value, sizeof(To));
    return to;
}

template <class T>
inline __attribute__((always_inline)) T shuffle_any(unsigned mask, T value, unsigned operand, int width, Shuffle how) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32-bit or 64-bit values");
    if constexpr (sizeof(T) == 4) {
        return bits<T>(shuffle(mask, bits<uint32_t>(value), operand, width, how));
    } else {
        const auto both = bits<uint64_t>(value);
        const uint32_t low = shuffle(mask, static_cast<uint32_t>(both), operand, width, how);
        const uint32_t high = shuffle(mask, static_cast<uint32_t>(both >> 32), operand, width, how);
        return bits<T>(static_cast<uint64_t>(high) << 32 | low);
    }
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())
constexpr int warpSize = 32;

#define __syncthreads() ::simt::block_barrier()
#define __threadfence() ::simt::fence()
#define __threadfence_block() ((void)0)  // orders nothing here: a barrier has to
#define __nanosleep(nanoseconds) ::simt::yield()
#define __trap() ::simt::trap()

inline __attribute__((always_inline)) void __syncwarp(unsigned mask = 0xffffffffu) { ::simt::warp_barrier(mask); }
inline __attribute__((always_inline)) unsigned __ballot_sync(unsigned mask, int vote) {
    return ::simt::ballot(mask, vote != 0);
}
inline __attribute__((always_inline)) int __any_sync(unsigned mask, int vote) {
    return ::simt::ballot(mask, vote != 0) != 0;
}
inline __attribute__((always_inline)) int __all_sync(unsigned mask, int vote) {
    return ::simt::ballot(mask, vote == 0) == 0;
}
template <class T>
inline __attribute__((always_inline)) T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    return simt::shuffle_any(mask, value, static_cast<unsigned>(lane), width, simt::Shuffle::index);
}
template <class T>
inline __attribute__((always_inline)) T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return simt::shuffle_any(mask, value, delta, width, simt::Shuffle::up);
}
template <class T>
inline __attribute__((always_inline)) T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    return simt::shuffle_any(mask, value, delta, width, simt::Shuffle::down);
}
template <class T>
inline __attribute__((always_inline)) T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return simt::shuffle_any(mask, value, static_cast<unsigned>(lanes), width, simt::Shuffle::exclusive_or);
}

inline unsigned atomicAdd(unsigned* at, unsigned value) { return simt::atomic(at, value, simt::Atomic::add); }
inline int atomicAdd(int* at, int value) {
    return static_cast<int>(simt::atomic(at, static_cast<uint32_t>(value), simt::Atomic::add));
}
inline float atomicAdd(float* at, float value) {
    return simt::bits<float>(simt::atomic(at, simt::bits<uint32_t>(value), simt::Atomic::add_float));
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
    return simt::atomic_wide(reinterpret_cast<uint64_t*>(at), value);
}
inline unsigned atomicExch(unsigned* at, unsigned value) { return simt::atomic(at, value, simt::Atomic::exchange); }
inline unsigned atomicMax(unsigned* at, unsigned value) { return simt::atomic(at, value, simt::Atomic::maximum); }
inline unsigned atomicMin(unsigned* at, unsigned value) { return simt::atomic(at, value, simt::Atomic::minimum); }
inline unsigned atomicCAS(unsigned* at, unsigned compare, unsigned value) {
    return simt::atomic(at, value, simt::Atomic::compare, compare);
}

template <class T>
inline __attribute__((always_inline)) T __ldg(const T* from) {
    simt::check_read_only(from, sizeof(T));
    return *from;
}

inline float __uint_as_float(unsigned x) { return simt::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return simt::bits<unsigned>(x); }
inline float __int_as_float(int x) { return simt::bits<float>(x); }
inline int __float_as_int(float x) { return simt::bits<int>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Rounded once from fp64; the device's are approximate to one or two units in the last place.
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
// Never contracted, on the device by their definition and here by -ffp-contract=off.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

#define SMOLVLA_SIMT_ORDER(type)                                  \
    inline type min(type a, type b) { return b < a ? b : a; }     \
    inline type max(type a, type b) { return a < b ? b : a; }
SMOLVLA_SIMT_ORDER(int)
SMOLVLA_SIMT_ORDER(unsigned)
SMOLVLA_SIMT_ORDER(long)
SMOLVLA_SIMT_ORDER(unsigned long)
SMOLVLA_SIMT_ORDER(long long)
SMOLVLA_SIMT_ORDER(unsigned long long)
#undef SMOLVLA_SIMT_ORDER
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

#include "emulator/host_api.h"
