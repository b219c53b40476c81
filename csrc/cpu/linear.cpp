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
// Inputs of the rows of a tile that stay in L1 from one tile to the next.
constexpr int64_t kPartInputs = 768;
// Outputs are dealt to threads in register tiles that are whole at every level, many at a time while there are many.
constexpr int64_t kSplit = 15, kCoarseSplits = 16;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// From so many rows on packing the weights is a small part of a product.
constexpr int64_t kManyRows = 65;
// Rows and inputs of x that stay in L2 while panels of weights pass by, and inputs that are summed up in one go: more of
// them are a little faster and less exact.
constexpr int64_t kBlockRows = 4 * kTileRows, kBlockInputs = 768, kSumInputs = 256;
// Outputs that are packed together, in whole panels. Many: x is read again for each group. Few: threads that share a group
// at the end each pack it, which counts where there are few rows, and a thread's scratch stays small.
constexpr int64_t kGroups[] = {192, 96, 48}, kPackedBytes = 5 * 1024 * 1024 / 2, kRowsOfLargeGroups = 512;

int64_t group_outputs(const Linear& a) {
    const int64_t bytes = a.inputs * static_cast<int64_t>(sizeof(float)) * (a.up_weight ? 2 : 1);
    for (const int64_t outputs : kGroups)
        if (a.rows >= kRowsOfLargeGroups && outputs * bytes <= kPackedBytes) return outputs;
    return kGroups[2];
}

// Blocks of rows are whole tiles and alike.
int64_t block_rows(const Linear& a) {
    return ceil_div(ceil_div(a.rows, ceil_div(a.rows, kBlockRows)), kTileRows) * kTileRows;
}

#define SMOLVLA_KERNEL "cpu/linear_kernel.h"
#include "cpu/each_level.h"

// The kernel of many rows. None where there are 32 registers: a tile of the other kernel uses an operand five times there,
// and packing was not measured ahead of it.
template <class X, class T, class Out>
struct ManyRows {
    void (*widen)(const Linear&, int64_t, int64_t, float*);
    void (*run)(const Linear&, const float*, Ranges&);

    static ManyRows kernel() {
#if defined(__x86_64__)
        if (level() == Level::avx2) return {avx2::widen_rows<X, T>, avx2::run_panels<T, Out>};
#endif
        if (level() == Level::baseline) return {baseline::widen_rows<X, T>, baseline::run_panels<T, Out>};
        return {};
    }
};

template <class X, class T, class Out>
void linear_many(const Linear& a, const ManyRows<X, T, Out>& kernel, int num_threads) {
    const float* x = static_cast<const float*>(a.x);
    if (a.norm_weight || sizeof(X) != sizeof(float) || sizeof(T) != sizeof(float)) {
        float* const h = Scratch::reserve<1>(a.rows * a.inputs);
        parallel_rows(a.rows, a.inputs, num_threads,
                      [&](int64_t begin, int64_t end) { kernel.widen(a, begin, end, h); });
        x = h;
    }
    const int64_t block = block_rows(a), blocks = ceil_div(a.rows, block), group = group_outputs(a);
    // A thread packs a group once where it meets all its rows.
    parallel_ranges(ceil_div(a.outputs, group) * blocks, group * block * a.inputs / 16, 1, blocks, num_threads,
                    [&](Ranges& ranges) { kernel.run(a, x, ranges); });
}

}  // namespace

template <class X, class T, class Out>
void linear(const Linear& a, int num_threads) {
    const auto many = ManyRows<X, T, Out>::kernel();
    if (a.rows >= kManyRows && many.run) return linear_many(a, many, num_threads);
    const auto run = SMOLVLA_AT_LEVEL(T, run_lanes, X, T, Out);
    parallel_ranges(ceil_div(a.outputs, kSplit), kSplit * a.rows * a.inputs / 16, 1, kCoarseSplits, num_threads,
                    [&](Ranges& ranges) { run(a, ranges); });
}

template void linear<float, float, float>(const Linear&, int);
template void linear<float, bfloat16, float>(const Linear&, int);
template void linear<float, bfloat16, bfloat16>(const Linear&, int);
template void linear<bfloat16, bfloat16, float>(const Linear&, int);
template void linear<bfloat16, bfloat16, bfloat16>(const Linear&, int);

}  // namespace smolvla::cpu
