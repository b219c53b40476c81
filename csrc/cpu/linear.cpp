#include "cpu/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace smolvla::cpu {
namespace {

// Register tiles of outputs between two epilogues.
constexpr int kUnits = 16;
// Rows of x that stay in L2 while the weights pass by: as many as fit, and the 50 of an action chunk in any case.
constexpr int64_t kBlockBytes = 256 * 1024, kLeastRows = 65;
// Outputs are dealt to threads in register tiles that are whole at every level, many at a time while there are many.
constexpr int64_t kSplit = 15, kCoarseSplits = 16;

// From so many rows on weights are packed, which takes about a tenth of a product of as many rows.
constexpr int64_t kManyRows = 65;
// Rows and words of x that stay in L2 while panels of weights pass by, and words that are summed up in one go: more of them
// are a little faster and less exact.
constexpr int64_t kPanelRows = 4 * kTileRows, kBlockWords = 768, kSumWords = 256;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs that are packed together, whole panels at every level: enough that reading x again for each group does not count,
// few enough that a thread's scratch stays small.
constexpr int64_t kGroups[] = {192, 128, 64}, kPackedBytes = 5 * 1024 * 1024 / 2;
int64_t group_outputs(const Linear& a) {
    const int64_t bytes = a.inputs * static_cast<int64_t>(sizeof(float)) * (a.up_weight ? 2 : 1);
    for (const int64_t outputs : kGroups)
        if (outputs * bytes <= kPackedBytes) return outputs;
    return kGroups[2];
}

// Rows of a block of at most kPanelRows: whole tiles, and blocks alike.
int64_t block_rows(const Linear& a) {
    return ceil_div(ceil_div(a.rows, ceil_div(a.rows, kPanelRows)), kTileRows) * kTileRows;
}

#define SMOLVLA_KERNEL "cpu/linear_kernel.h"
#include "cpu/each_level.h"

template <Activation kActivation>
auto activation_kernel() {
#if defined(__aarch64__)
    return level() == Level::baseline ? baseline::activate_range<kActivation> : neon::activate_range<kActivation>;
#elif defined(__x86_64__)
    return pick(baseline::activate_range<kActivation>, avx2::activate_range<kActivation>,
                avx512::activate_range<kActivation>);
#else
    return baseline::activate_range<kActivation>;
#endif
}

}  // namespace

template <class X, class T, class Out>
void linear(const Linear& a, int num_threads) {
    if (a.rows >= kManyRows) {
        const auto run = SMOLVLA_AT_LEVEL(T, run_panels, X, T, Out);
        const int64_t blocks = ceil_div(a.rows, block_rows(a)), group = group_outputs(a);
        // A thread packs a group once where it meets all its rows.
        parallel_ranges(ceil_div(a.outputs, group) * blocks, group * block_rows(a) * a.inputs / 16, 1, blocks, num_threads,
                        [&](Ranges& ranges) { run(a, ranges); });
        return;
    }
    const auto run = SMOLVLA_AT_LEVEL(T, run_lanes, X, T, Out);
    parallel_ranges(ceil_div(a.outputs, kSplit), kSplit * a.rows * a.inputs / 16, 1, kCoarseSplits, num_threads,
                    [&](Ranges& ranges) { run(a, ranges); });
}

void activate(float* y, int64_t count, Activation activation, int num_threads) {
    if (activation == Activation::none) return;
    const auto run = activation == Activation::silu ? activation_kernel<Activation::silu>()
                                                    : activation_kernel<Activation::gelu_tanh>();
    // An element costs about ten of a row-wise op's.
    parallel_rows(count, 10, num_threads, [&](int64_t begin, int64_t end) { run(y, begin, end); });
}

template void linear<float, float, float>(const Linear&, int);
template void linear<float, bfloat16, float>(const Linear&, int);
template void linear<float, bfloat16, bfloat16>(const Linear&, int);
template void linear<bfloat16, bfloat16, float>(const Linear&, int);
template void linear<bfloat16, bfloat16, bfloat16>(const Linear&, int);

}  // namespace smolvla::cpu
