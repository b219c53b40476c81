// What the CUDA runtime, the driver and each GPU say of themselves, and which of this library's codes a GPU takes.
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda/device.h"

namespace smolvla::cuda {
namespace {

void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // a failed query must not be found again by the next, unrelated check
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Never launched: its attributes tell which of the compiled architectures the driver chose.
__global__ void probe_kernel() {}

int attribute(cudaDeviceAttr which, int index) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
    return value;
}

class DeviceGuard {
public:
    explicit DeviceGuard(int index) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        check(cudaSetDevice(index), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(before_); }

private:
    int before_ = 0;
};

}  // namespace

int runtime_version() {
    int version = 0;
    check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
    return version;
}

int driver_version() {
    int version = 0;
    check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
    return version;
}

int device_count() {
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
}

Device device(int index) {
    const DeviceGuard guard(index);
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, probe_kernel), "no code in this build fits the GPU");
    Device found;
    found.name = properties.name;
    found.compute_capability = 10 * properties.major + properties.minor;
    found.multiprocessors = properties.multiProcessorCount;
    found.memory_bytes = properties.totalGlobalMem;
    found.l2_bytes = static_cast<size_t>(properties.l2CacheSize);
    found.shared_bytes_per_block = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    found.code_version = code.binaryVersion;
    found.ptx_version = code.ptxVersion;
    return found;
}

}  // namespace smolvla::cuda
