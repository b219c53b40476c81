// The instruction levels of aarch64, asked of the system. Included by dispatch.h alone.
//
// NEON is in every such processor. What goes beyond it is written as inline assembly, in functions with a target
// attribute: Clang before 17 has the intrinsics in files compiled for the extension alone, and the library is one file
// for all.
#pragma once

#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// GCC before 10 does not know i8mm and bf16.
#if defined(__clang__) || __GNUC__ >= 10
#define SMOLVLA_NEON_EXTENSIONS 1
#else
#define SMOLVLA_NEON_EXTENSIONS 0
#endif

#if defined(__clang__)
#define SMOLVLA_NEON_DOTPROD __attribute__((target("dotprod")))
#define SMOLVLA_NEON_I8MM __attribute__((target("dotprod,i8mm")))
#define SMOLVLA_NEON_BF16 __attribute__((target("dotprod,i8mm,bf16")))
#else
#define SMOLVLA_NEON_DOTPROD __attribute__((target("arch=armv8.2-a+dotprod")))
#define SMOLVLA_NEON_I8MM __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#define SMOLVLA_NEON_BF16 __attribute__((target("arch=armv8.2-a+dotprod+i8mm+bf16")))
#endif

namespace smolvla::cpu {

// Each with what the one before it has: a processor with bf16 and without i8mm counts as neon_dotprod.
enum class Level : int { baseline = 0, neon = 1, neon_dotprod = 2, neon_i8mm = 3, neon_bf16 = 4 };
constexpr const char* kLevelNames[] = {"baseline", "neon", "neon_dotprod", "neon_i8mm", "neon_bf16"};

struct NeonFeatures {
    bool dotprod, i8mm, bf16;
};

inline NeonFeatures neon_features() {
#if defined(__linux__)
    // The kernel's bits, as numbers: the headers of older systems lack their names.
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13, kBf16 = 1ul << 14;
    const unsigned long first = getauxval(16 /* AT_HWCAP */), second = getauxval(26 /* AT_HWCAP2 */);
    return {(first & kDotprod) != 0, (second & kI8mm) != 0, (second & kBf16) != 0};
#elif defined(__APPLE__)
    const auto has = [](const char* name) {
        int value = 0;
        size_t size = sizeof value;
        return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
    };
    return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"), has("hw.optional.arm.FEAT_BF16")};
#else
    return {false, false, false};
#endif
}

// The highest level that the compiler and the processor support.
inline Level best_level() {
    static const Level best = [] {
        const NeonFeatures has = neon_features();
        if (!SMOLVLA_NEON_EXTENSIONS || !has.dotprod) return Level::neon;
        if (!has.i8mm) return Level::neon_dotprod;
        return has.bf16 ? Level::neon_bf16 : Level::neon_i8mm;
    }();
    return best;
}

}  // namespace smolvla::cpu
