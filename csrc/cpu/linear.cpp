#include "cpu/linear.h"

#include <algorithm>
#include <cmath>

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
// Outputs are dealt to threads in whole register tiles of the largest level.
constexpr int64_t kSplit = 5;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#define SMOLVLA_LEVEL Baseline
#define SMOLVLA_LEVEL_NAMESPACE baseline
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if defined(__x86_64__)
#define SMOLVLA_LEVEL Avx2
#define SMOLVLA_LEVEL_NAMESPACE avx2
#define SMOLVLA_TARGET SMOLVLA_AVX2
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512
#define SMOLVLA_LEVEL_NAMESPACE avx512
#define SMOLVLA_LEVEL_IS_512 1
#define SMOLVLA_TARGET SMOLVLA_AVX512
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512Bf16
#define SMOLVLA_LEVEL_NAMESPACE avx512_bf16
#define SMOLVLA_TARGET SMOLVLA_AVX512_BF16
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif
#undef SMOLVLA_LEVEL_IS_512

#if defined(__aarch64__)
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_LEVEL Neon
#define SMOLVLA_LEVEL_NAMESPACE neon
#define SMOLVLA_TARGET
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if SMOLVLA_NEON_EXTENSIONS
#define SMOLVLA_LEVEL NeonBf16
#define SMOLVLA_LEVEL_NAMESPACE neon_bf16
#define SMOLVLA_TARGET SMOLVLA_NEON_BF16
#include "cpu/linear_kernel.h"
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif
#undef SMOLVLA_LEVEL_IS_512
#endif

template <class X, class T, class Out>
auto kernel() {
#if defined(__aarch64__)
#if SMOLVLA_NEON_EXTENSIONS
    if (level() == Level::neon_bf16) return neon_bf16::run<sizeof(T) == 2, X, T, Out>;
#endif
    return level() == Level::baseline ? baseline::run<false, X, T, Out> : neon::run<false, X, T, Out>;
#elif defined(__x86_64__)
    constexpr bool pairs = sizeof(T) == 2;
    return pick(baseline::run<false, X, T, Out>, avx2::run<false, X, T, Out>, avx512::run<false, X, T, Out>,
                avx512_bf16::run<pairs, X, T, Out>);
#else
    return baseline::run<false, X, T, Out>;
#endif
}

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
    const auto run = kernel<X, T, Out>();
    parallel_ranges(ceil_div(a.outputs, kSplit), kSplit * a.rows * a.inputs / 16, kUnits, kUnits, num_threads,
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
