#include "cpu/integer_level.h"

#include <cctype>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/integer_simd.h"

namespace smolvla::cpu {
namespace {

#if defined(__x86_64__)
struct Vnni {
    bool avx2, avx512, amx;
};

// Linux hands out the tiles' registers to a process that asks, once; elsewhere nobody is asked, and none are used.
bool tiles_are_granted() {
#if defined(__linux__) && defined(SMOLVLA_HAS_AMX)
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

Vnni vnni() {
    static const Vnni found = [] {
        __builtin_cpu_init();
        unsigned a = 0, b = 0, c = 0, d = 0;
        // Leaf 7: not every compiler has names for these.
        const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1);
        const bool avx = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
        const char* set = std::getenv("ONEDNN_MAX_CPU_ISA");
        if (!set || !*set) set = std::getenv("DNNL_MAX_CPU_ISA");
        std::string name(set ? set : "");
        for (char& letter : name) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        // smolvla_fast/ops/processor.py has the limits; those that it does not name leave all.
        const bool below = name == "AVX512_CORE_VNNI" || name == "AVX512_CORE_BF16" || name == "AVX512_CORE_FP16" ||
                           name == "AVX10_1_512";
        const bool avx512 = __builtin_cpu_supports("avx512vnni") && name != "AVX512_CORE";
        return Vnni{avx && name != "AVX2", avx512, avx512 && tiles && !below && tiles_are_granted()};
    }();
    return found;
}
#endif

}  // namespace

IntegerLevel integer_level() {
#if defined(__x86_64__)
    switch (level().load(std::memory_order_relaxed)) {
        case Level::baseline: return IntegerLevel::baseline;
        case Level::avx2:
#if defined(SMOLVLA_HAS_AVX2_VNNI)
            if (vnni().avx2) return IntegerLevel::avx2_vnni;
#endif
            return IntegerLevel::avx2;
        default:
            return vnni().amx      ? IntegerLevel::amx
                   : vnni().avx512 ? IntegerLevel::avx512_vnni
                                   : IntegerLevel::avx2;
    }
#else
    return IntegerLevel::baseline;
#endif
}

}  // namespace smolvla::cpu
