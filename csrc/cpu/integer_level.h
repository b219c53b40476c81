#pragma once

namespace smolvla::cpu {

// What multiplies integers.
enum class IntegerLevel : int { baseline = 0, avx2 = 1, avx2_vnni = 2, avx512_vnni = 3, amx = 4 };
constexpr const char* kIntegerLevelNames[] = {"baseline", "avx2", "avx2_vnni", "avx512_vnni", "amx"};

// What runs at the level in use, as far as the processor and ONEDNN_MAX_CPU_ISA have VNNI.
IntegerLevel integer_level();

}  // namespace smolvla::cpu
