#include "cpu/integer_level.h"

#include <cctype>
#include <cstdlib>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/dispatch.h"
#include "cpu/integer_simd.h"

namespace smolvla::cpu {
namespace {

#if defined(__x86_64__)
struct Vnni {
    bool avx2, avx512;
};

Vnni vnni() {
    static const Vnni found = [] {
        __builtin_cpu_init();
        unsigned a = 0, b = 0, c = 0, d = 0;
        // Leaf 7.1: not every compiler has a name for it.
        const bool avx = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
        const char* set = std::getenv("ONEDNN_MAX_CPU_ISA");
        if (!set || !*set) set = std::getenv("DNNL_MAX_CPU_ISA");
        std::string name(set ? set : "");
        for (char& letter : name) letter = static_cast<char>(std::toupper(static_cast<unsigned char>(letter)));
        return Vnni{avx && name != "AVX2", __builtin_cpu_supports("avx512vnni") && name != "AVX512_CORE"};
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
        default: return vnni().avx512 ? IntegerLevel::avx512_vnni : IntegerLevel::avx2;
    }
#else
    return IntegerLevel::baseline;
#endif
}

}  // namespace smolvla::cpu
