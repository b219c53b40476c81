#include "cpu/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/bfloat16.h"
#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

namespace smolvla::cpu {
namespace {

// Of the kernels that pack no weights.

// Register tiles of lanes, by their outputs, between two epilogues.
constexpr int kUnits = 16;
// Rows of x that stay in L2 while the weights pass by: as many as fit, and those of an action chunk in any case.
constexpr int64_t kBlockBytes = 256 * 1024, kLeastRows = 65;
// Inputs of the rows of a tile that stay in L1 from one tile to the next.
constexpr int64_t kPartInputs = 768;
// Outputs are dealt to threads in whole register tiles of lanes and of columns, many at a time while there are many. Tiles
// of blocks do not divide them: the last one of a range computes an output or more for nothing.
template <bool kFewRegisters>
constexpr int64_t kSplit = kFewRegisters ? 12 : 15;
constexpr int64_t kCoarseSplits = 16;

// Fewer outputs are summed in lanes: they are less than a panel, and eager sums them in more chains than a panel does.
constexpr int64_t kLeastOutputs = 16;
// Of the kernel that packs rows; with fewer it is not ahead of lanes throughout.
constexpr int64_t kLeastColumns = 48;

// Of the kernel that packs weights.

// From so many rows on it serves: one more than CPU_KERNEL_ROWS of smolvla_fast/ops/defaults.py.
constexpr int64_t kManyRows = 65;
// Rows and inputs of x that stay in L2 while panels of weights pass by.
constexpr int64_t kBlockRows = 4 * kTileRows, kBlockInputs = 768;
// Inputs that are summed up in one go, at most. Sums of sums are more exact than one long sum, and eager's are as short.
constexpr int64_t kSumInputs = 192;
constexpr int64_t sum_inputs(int64_t inputs) { return ceil_div(inputs, ceil_div(inputs, kSumInputs)); }
// Outputs that are packed together, in whole panels: few where there are few rows, since threads that share a group at the
// end each pack it, and where there are many inputs, since a thread keeps its memory.
constexpr int64_t kLargeGroup = 192, kGroup = 48, kRowsOfLargeGroup = 512, kInputsOfLargeGroup = 3072;

int64_t group_outputs(const Linear& a) {
    const bool large = a.rows >= kRowsOfLargeGroup && a.inputs <= kInputsOfLargeGroup && !a.up_weight;
    return large ? kLargeGroup : kGroup;
}

// Blocks of rows are whole tiles and alike.
int64_t block_rows(const Linear& a) {
    return ceil_div(ceil_div(a.rows, ceil_div(a.rows, kBlockRows)), kTileRows) * kTileRows;
}

#define SMOLVLA_KERNEL "cpu/linear_kernel.h"
#include "cpu/each_level.h"

// Whether there are 16 vector registers: fp32 is packed then, the weights where there are many rows, an action chunk's rows
// themselves. With 32 a tile of lanes uses an operand five times, and packing was not measured.
bool few_registers() {
#if defined(__x86_64__)
    if (level() == Level::avx2) return true;
#endif
    return level() == Level::baseline;
}

void linear_packed(const Linear& a, int num_threads) {
#if defined(__x86_64__)
    const bool avx2_level = level() == Level::avx2;
    const auto prepare = avx2_level ? avx2::prepare_rows<float, float> : baseline::prepare_rows<float, float>;
    const auto run = avx2_level ? avx2::run_panels<float> : baseline::run_panels<float>;
#else
    const auto prepare = baseline::prepare_rows<float, float>;
    const auto run = baseline::run_panels<float>;
#endif
    const float* x = static_cast<const float*>(a.x);
    std::unique_ptr<float[]> normed;
    if (a.norm_weight) {
        normed.reset(new float[a.rows * a.inputs]);
        parallel_rows(a.rows, a.inputs, num_threads, [&](int64_t begin, int64_t end) {
            const int64_t at = begin * a.inputs;
            prepare(x + at, static_cast<const float*>(a.norm_weight), a.eps, end - begin, a.inputs, a.inputs,
                    normed.get() + at);
        });
    }
    const float* const h = normed ? normed.get() : x;
    const int64_t block = block_rows(a), blocks = ceil_div(a.rows, block), group = group_outputs(a);
    // Most of a group's blocks go to one thread, which then packs it once.
    parallel_ranges(ceil_div(a.outputs, group) * blocks, group * block * a.inputs / 16, ceil_div(blocks, 16), blocks,
                    num_threads, [&](Ranges& ranges) { run(a, h, ranges); });
}

}  // namespace

template <class X, class T, class Out>
void linear(const Linear& a, int num_threads) {
    if constexpr (sizeof(X) + sizeof(T) + sizeof(Out) == 3 * sizeof(float))
        if (a.rows >= kManyRows && a.outputs >= kLeastOutputs && few_registers()) return linear_packed(a, num_threads);
    const auto run = SMOLVLA_AT_LEVEL(T, run_unpacked, X, T, Out);
    const int64_t split = few_registers() ? kSplit<true> : kSplit<false>;
    parallel_ranges(ceil_div(a.outputs, split), split * a.rows * a.inputs / 16, 1, kCoarseSplits, num_threads,
                    [&](Ranges& ranges) { run(a, ranges); });
}

template void linear<float, float, float>(const Linear&, int);
template void linear<float, bfloat16, float>(const Linear&, int);
template void linear<float, bfloat16, bfloat16>(const Linear&, int);
template void linear<bfloat16, bfloat16, float>(const Linear&, int);
template void linear<bfloat16, bfloat16, bfloat16>(const Linear&, int);

}  // namespace smolvla::cpu
