#include "cpu/int16_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/dispatch.h"
#include "cpu/integer_level.h"
#include "cpu/integer_simd.h"
#include "cpu/parallel.h"
#include "cpu/rounding.h"
#include "cpu/scratch.h"

namespace smolvla::cpu {
namespace {

constexpr int kTileRows = 6;
// Rows of x whose words of a block of inputs stay in L1 while panels pass by.
constexpr int64_t kBlockRows = 4 * kTileRows;
// Panels that stay in L2 while blocks of rows pass by; one where there are few rows, so that there is work for all threads.
constexpr int64_t kGroupBytes = 256 * 1024, kRowsOfGroup = 512;

struct Sizes {
    explicit Sizes(const Int16Linear& a)
        : block(ceil_div(ceil_div(a.rows, ceil_div(a.rows, kBlockRows)), kTileRows) * kTileRows),
          blocks(ceil_div(a.rows, block)), panels(ceil_div(a.outputs, kInt16Panel)),
          group(a.rows < kRowsOfGroup
                    ? 1
                    : std::clamp<int64_t>(kGroupBytes / (a.words * kInt16Panel * 4 * (a.up_weight ? 2 : 1)), 1, panels)) {}
    int64_t block, blocks, panels, group;
};

#define SMOLVLA_KERNEL "cpu/int16_linear_kernel.h"
#include "cpu/each_integer_level.h"

template <Activation kActivation>
auto kernel(IntegerLevel level) {
    switch (level) {
#if defined(__x86_64__)
        case IntegerLevel::amx:  // its tiles have no integers of 16 bits
        case IntegerLevel::avx512_vnni: return avx512_vnni::run<kActivation>;
#if defined(SMOLVLA_HAS_AVX2_VNNI)
        case IntegerLevel::avx2_vnni: return avx2_vnni::run<kActivation>;
#endif
        case IntegerLevel::avx2: return avx2::run<kActivation>;
#endif
        default: return baseline::run<kActivation>;
    }
}

template <Activation kActivation>
void all(const Int16Linear& a, int num_threads) {
    const Sizes sizes(a);
    const auto run = kernel<kActivation>(integer_level());
    parallel_ranges(ceil_div(sizes.panels, sizes.group) * sizes.blocks,
                    sizes.group * kInt16Panel * sizes.block * a.words / 16, ceil_div(sizes.blocks, 16), sizes.blocks,
                    num_threads, [&](Ranges& ranges) { run(a, sizes, ranges); });
}

}  // namespace

void int16_linear(const Int16Linear& a, int num_threads) {
    switch (a.activation) {
        case Activation::none: return all<Activation::none>(a, num_threads);
        case Activation::silu: return all<Activation::silu>(a, num_threads);
        case Activation::gelu_tanh: return all<Activation::gelu_tanh>(a, num_threads);
    }
}

}  // namespace smolvla::cpu
