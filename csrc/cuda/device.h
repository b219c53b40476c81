#pragma once

#include <string>

namespace smolvla::cuda {

// Versions are 1000 * major + 10 * minor, as CUDA counts them. driver_version is 0 where there is no driver.
int runtime_version();
int driver_version();
// Number of GPUs; 0 where there is no driver.
int device_count();

struct Device {
    std::string name;
    int compute_capability;  // 90 for 9.0
    int multiprocessors;
    size_t memory_bytes, l2_bytes, shared_bytes_per_block;
    int code_version;  // architecture of the machine code that this library runs with there
    int ptx_version;   // equal to code_version unless the driver made the code from PTX
};

// Throws std::runtime_error with CUDA's own words, also when no code in this library fits the GPU.
Device device(int index);

}  // namespace smolvla::cuda
