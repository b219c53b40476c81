// Kernels for the tests of the emulator itself. Each has one mistake; `mended` is the same kernel without it.
#pragma once

#include <string>
#include <vector>

#include "cuda/ptx.cuh"

namespace planted {

using namespace smolvla::cuda;

struct Args {
    bool mended;
    uint32_t* a;  // as many words as the test allows
    uint32_t* b;
};

using Kernel = void (*)(Args);

struct Entry {
    const char* name;
    Kernel kernel;
    Grid grid;
};

const std::vector<Entry>& memory_kernels();
const std::vector<Entry>& order_kernels();
const std::vector<Entry>& warp_kernels();
const std::vector<Entry>& cluster_kernels();
const std::vector<Entry>& primitives();

}  // namespace planted
