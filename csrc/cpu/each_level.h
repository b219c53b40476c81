// Includes SMOLVLA_KERNEL once for each instruction level of the vectors in simd.h, with SMOLVLA_LEVEL (a struct of simd.h),
// SMOLVLA_LEVEL_NAMESPACE, SMOLVLA_LEVEL_IS_512 and SMOLVLA_TARGET (the attribute of its functions). No include guard: each
// op's file includes this once, inside its own namespace.
//
// And SMOLVLA_AT_LEVEL, the function of the level in use. Products of integers have levels of their own:
// each_integer_level.h.

#define SMOLVLA_LEVEL Baseline
#define SMOLVLA_LEVEL_NAMESPACE baseline
#define SMOLVLA_LEVEL_IS_512 0
#define SMOLVLA_TARGET
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if defined(__x86_64__)
#define SMOLVLA_LEVEL Avx2
#define SMOLVLA_LEVEL_NAMESPACE avx2
#define SMOLVLA_TARGET SMOLVLA_AVX2
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512
#define SMOLVLA_LEVEL_NAMESPACE avx512
#define SMOLVLA_LEVEL_IS_512 1
#define SMOLVLA_TARGET SMOLVLA_AVX512
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#define SMOLVLA_LEVEL Avx512Bf16
#define SMOLVLA_LEVEL_NAMESPACE avx512_bf16
#define SMOLVLA_TARGET SMOLVLA_AVX512_BF16
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif

#if defined(__aarch64__)
#define SMOLVLA_LEVEL Neon
#define SMOLVLA_LEVEL_NAMESPACE neon
#define SMOLVLA_TARGET
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if SMOLVLA_NEON_EXTENSIONS
#define SMOLVLA_LEVEL NeonBf16
#define SMOLVLA_LEVEL_NAMESPACE neon_bf16
#define SMOLVLA_TARGET SMOLVLA_NEON_BF16
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif
#endif
#undef SMOLVLA_LEVEL_IS_512
#undef SMOLVLA_KERNEL

// function<kPairs, ...> of the level in use. kPairs where T is bf16 and the level multiplies pairs of them; others widen.
#if defined(__aarch64__)
#if SMOLVLA_NEON_EXTENSIONS
#define SMOLVLA_AT_LEVEL(T, function, ...)                                                                            \
    (level() == Level::neon_bf16 ? neon_bf16::function<sizeof(T) == 2, __VA_ARGS__>                                   \
     : level() == Level::baseline ? baseline::function<false, __VA_ARGS__> : neon::function<false, __VA_ARGS__>)
#else
#define SMOLVLA_AT_LEVEL(T, function, ...) \
    (level() == Level::baseline ? baseline::function<false, __VA_ARGS__> : neon::function<false, __VA_ARGS__>)
#endif
#elif defined(__x86_64__)
#define SMOLVLA_AT_LEVEL(T, function, ...)                                                                            \
    pick(baseline::function<false, __VA_ARGS__>, avx2::function<false, __VA_ARGS__>,                                  \
         avx512::function<false, __VA_ARGS__>, avx512_bf16::function<sizeof(T) == 2, __VA_ARGS__>)
#else
#define SMOLVLA_AT_LEVEL(T, function, ...) (&baseline::function<false, __VA_ARGS__>)
#endif
