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

// Rows that share a panel of K or V while it is in L1.
constexpr int kBlockRows = 4 * kTileRows;
// Words of a head and of keys that are summed up in one go. Shorter chunks are more exact, longer ones hardly faster.
constexpr int64_t kScoreWords = 64, kValueWords = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define SMOLVLA_KERNEL "cpu/attention_kernel.h"
#include "cpu/each_level.h"

}  // namespace

template <class T>
void attend(const Attention& a, int64_t heads, int num_threads) {
    const auto run = SMOLVLA_AT_LEVEL(T, run, T);
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
