#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace smolvla::cpu {
namespace {

constexpr int kTileRows = 6;
// Rows that share a panel of K or V while it is in L1.
constexpr int kBlockRows = 4 * kTileRows;
// Words of a head and of keys that are summed up in one go. Shorter chunks are more exact, longer ones hardly faster.
constexpr int64_t kScoreWords = 64, kValueWords = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define SMOLVLA_LEVEL Baseline
#define SMOLVLA_LEVEL_NAMESPACE baseline
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET

#if defined(__x86_64__)
#define SMOLVLA_LEVEL Avx2
#define SMOLVLA_LEVEL_NAMESPACE avx2
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET SMOLVLA_AVX2
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512
#define SMOLVLA_LEVEL_NAMESPACE avx512
#define SMOLVLA_LEVEL_IS_512 1
#define SMOLVLA_TARGET SMOLVLA_AVX512
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512Bf16
#define SMOLVLA_LEVEL_NAMESPACE avx512_bf16
#define SMOLVLA_TARGET SMOLVLA_AVX512_BF16
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET
#endif

#if defined(__aarch64__)
#define SMOLVLA_LEVEL Neon
#define SMOLVLA_LEVEL_NAMESPACE neon
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET

#if SMOLVLA_NEON_EXTENSIONS
#define SMOLVLA_LEVEL NeonBf16
#define SMOLVLA_LEVEL_NAMESPACE neon_bf16
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET SMOLVLA_NEON_BF16
#include "cpu/attention_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET
#endif
#endif

template <class T>
auto kernel() {
#if defined(__aarch64__)
#if SMOLVLA_NEON_EXTENSIONS
    if (level() == Level::neon_bf16) return neon_bf16::run<sizeof(T) == 2, T>;
#endif
    return level() == Level::baseline ? baseline::run<false, T> : neon::run<false, T>;
#elif defined(__x86_64__)
    constexpr bool pairs = sizeof(T) == 2;
    return pick(baseline::run<false, T>, avx2::run<false, T>, avx512::run<false, T>, avx512_bf16::run<pairs, T>);
#else
    return baseline::run<false, T>;
#endif
}

}  // namespace

template <class T>
void attend(const Attention& a, int64_t heads, int num_threads) {
    const auto run = kernel<T>();
    const int64_t head_tiles = ceil_div(a.queries * (a.heads / a.kv_heads), kTileRows);
    // By heads, which are packed once for a thread that meets them, and by blocks of rows at the end.
    parallel_ranges(heads * head_tiles, kTileRows * a.keys * 4, kBlockRows / kTileRows, head_tiles, num_threads,
                    [&](Ranges& ranges) { run(a, ranges); });
}

template <class T>
void attention(const Attention& a, int num_threads) {
    attend<T>(a, a.batch * a.kv_heads, num_threads);
}

void attention_of_heads(Attention a, const std::vector<int64_t>& heads, int num_threads) {
    a.only = heads.data();
    attend<float>(a, static_cast<int64_t>(heads.size()), num_threads);
}

template void attention<float>(const Attention&, int);
template void attention<bfloat16>(const Attention&, int);

}  // namespace smolvla::cpu
