// The memory outside a block that a launch may touch, and its shadow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator/memory.h"

namespace simt {

struct Range {
    uintptr_t low, high;  // exactly
    unsigned shadow;
};

const std::vector<Range>& all_ranges();  // sorted and merged
const Range* range_of(uintptr_t at);     // null: nothing is allowed there
Cell* global_cell(const Range& range, uintptr_t at);
void drop_shadows();

// Where this module lies: a kernel may read constants there, and no more.
struct Image {
    uintptr_t low = 0, high = 0, base = 0;
};
const Image& image();

}  // namespace simt
