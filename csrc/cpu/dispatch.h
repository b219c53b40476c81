// Which instruction set an op runs with: chosen once from CPUID and ONEDNN_MAX_CPU_ISA, or forced by a test.
//
// The whole library is compiled for the baseline. An op writes its body once as SMOLVLA_INLINE and wraps it in one
// function per level; inlining the body into a wrapper compiles it for that wrapper's instructions. An op that needs
// intrinsics writes them in the wrapper instead. Here are the levels of x86-64; dispatch_neon.h has those of aarch64.
#pragma once

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdlib>
#include <string>

#define SMOLVLA_INLINE inline __attribute__((always_inline))

#if defined(__aarch64__)
#include "cpu/dispatch_neon.h"
#endif

#if defined(SMOLVLA_EMULATED)
// A test compiles all levels with functions that compute what the instructions do, for a processor that lacks them.
#define SMOLVLA_AVX2
#define SMOLVLA_AVX512
#define SMOLVLA_AVX512_BF16
#elif defined(__x86_64__)
// 512-bit vectors must be asked for: compilers keep to 256 bits by default, for older cores that clock down.
#if defined(__clang__)
#define SMOLVLA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define SMOLVLA_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#define SMOLVLA_AVX2 __attribute__((target("avx2,fma")))
#if defined(__clang__)
#define SMOLVLA_AVX512_BF16 \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"), min_vector_width(512)))
#else
#define SMOLVLA_AVX512_BF16 \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif
#else
#define SMOLVLA_AVX512
#define SMOLVLA_AVX512_BF16
#define SMOLVLA_AVX2
#endif

namespace smolvla::cpu {

#if !defined(__aarch64__)
enum class Level : int { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
constexpr const char* kLevelNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

// What oneDNN's own variable leaves: a user who takes a processor for an older one means our kernels too. Its values
// stand in smolvla_fast/ops/processor.py.
inline Level most_allowed() {
    const char* set = std::getenv("ONEDNN_MAX_CPU_ISA");
    if (!set || !*set) set = std::getenv("DNNL_MAX_CPU_ISA");
    std::string name(set ? set : "");
    for (char& letter : name) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
    if (name == "SSE41" || name == "AVX") return Level::baseline;
    if (name.rfind("AVX2", 0) == 0) return Level::avx2;
    if (name == "AVX512_CORE" || name == "AVX512_CORE_VNNI") return Level::avx512;
    return Level::avx512_bf16;
}

// The highest level that the processor, the operating system and the user support.
inline Level best_level() {
#if defined(SMOLVLA_EMULATED)
    return most_allowed();
#elif defined(__x86_64__)
    static const Level best = [] {
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        const bool bf16 = __builtin_cpu_supports("avx512bf16");
        const Level has = !avx2     ? Level::baseline
                          : !avx512 ? Level::avx2
                          : bf16    ? Level::avx512_bf16
                                    : Level::avx512;
        return std::min(has, most_allowed());
    }();
    return best;
#else
    return Level::baseline;
#endif
}
#endif

// The level in use: the best one unless a test has lowered it. Atomic, as ops run without Python's lock.
inline std::atomic<Level>& level() {
    static std::atomic<Level> current{best_level()};
    return current;
}

#if !defined(__aarch64__)
// An op with nothing of its own for a level runs the one below.
template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512, Function* avx512_bf16) {
    switch (level().load(std::memory_order_relaxed)) {
        case Level::avx512_bf16: return avx512_bf16;
        case Level::avx512: return avx512;
        case Level::avx2: return avx2;
        default: return baseline;
    }
}

template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512) {
    return pick(baseline, avx2, avx512, avx512);
}
#else
// Bodies in plain C++ become NEON by the compiler, as every aarch64 has it.
template <class Function>
Function* pick(Function* baseline, Function*, Function*) {
    return baseline;
}
#endif

}  // namespace smolvla::cpu
