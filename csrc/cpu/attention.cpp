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
constexpr int64_t kScoreWords = 32, kValueWords = 256;

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

template <class T>
auto kernel() {
#if defined(__x86_64__)
    constexpr bool pairs = sizeof(T) == 2;
    return pick(baseline::run<false, T>, avx2::run<false, T>, avx512::run<false, T>, avx512_bf16::run<pairs, T>);
#else
    return baseline::run<false, T>;
#endif
}

}  // namespace

template <class T>
void attention(const Attention& a, int num_threads) {
    const auto run = kernel<T>();
    const int64_t tiles = a.batch * a.kv_heads * ceil_div(a.queries * (a.heads / a.kv_heads), kTileRows);
    parallel_rows(tiles, kTileRows * a.keys * 4, num_threads,
                  [&](int64_t begin, int64_t end) { run(a, begin, end); });
}

void attention_of_heads(const Attention& a, const std::vector<int64_t>& heads, int num_threads) {
    const auto run = kernel<float>();
    const int64_t tiles = ceil_div(a.queries * (a.heads / a.kv_heads), kTileRows);
    const auto count = static_cast<int64_t>(heads.size());
    parallel_rows(count * tiles, kTileRows * a.keys * 4, num_threads, [&](int64_t begin, int64_t end) {
        while (begin < end) {
            const int64_t head = heads[begin / tiles], first = begin % tiles, here = std::min(tiles - first, end - begin);
            run(a, head * tiles + first, head * tiles + first + here);
            begin += here;
        }
    });
}

template void attention<float>(const Attention&, int);
template void attention<bfloat16>(const Attention&, int);

}  // namespace smolvla::cpu
