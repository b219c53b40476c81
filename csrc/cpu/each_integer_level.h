// Includes SMOLVLA_KERNEL once for each level that multiplies integers, with SMOLVLA_LEVEL (a struct of integer_simd.h),
// SMOLVLA_LEVEL_NAMESPACE and SMOLVLA_TARGET (the attribute of its functions). No include guard, as in each_level.h.

#define SMOLVLA_LEVEL IntegerBaseline
#define SMOLVLA_LEVEL_NAMESPACE baseline
#define SMOLVLA_TARGET
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if defined(__x86_64__)
#define SMOLVLA_LEVEL IntegerAvx2
#define SMOLVLA_LEVEL_NAMESPACE avx2
#define SMOLVLA_TARGET SMOLVLA_AVX2
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET

#if defined(SMOLVLA_HAS_AVX2_VNNI)
#define SMOLVLA_LEVEL IntegerAvx2Vnni
#define SMOLVLA_LEVEL_NAMESPACE avx2_vnni
#define SMOLVLA_TARGET SMOLVLA_AVX2_VNNI
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif

#define SMOLVLA_LEVEL IntegerAvx512Vnni
#define SMOLVLA_LEVEL_NAMESPACE avx512_vnni
#define SMOLVLA_TARGET SMOLVLA_AVX512_VNNI
#include SMOLVLA_KERNEL
#undef SMOLVLA_LEVEL
#undef SMOLVLA_LEVEL_NAMESPACE
#undef SMOLVLA_TARGET
#endif
#undef SMOLVLA_KERNEL
