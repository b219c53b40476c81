// Stands for csrc/cpu/integer_level.cpp, which asks the processor. Built by emulated.py with the other sources; in no wheel.
#include "cpu/integer_level.h"

namespace {
auto chosen = smolvla::cpu::IntegerLevel::baseline;
}

namespace smolvla::cpu {
IntegerLevel integer_level() { return chosen; }
}  // namespace smolvla::cpu

extern "C" __attribute__((visibility("default"))) void set_integer_level(int level) {
    chosen = static_cast<smolvla::cpu::IntegerLevel>(level);
}
