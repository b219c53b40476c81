// CUDA's host interface for an imaginary GPU (host_api.h).
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "emulator/runtime.h"

using simt::settings;

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidDevice ? "invalid device ordinal" : "invalid argument";
}
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* index) {
    *index = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
    if (index != 0) return cudaErrorInvalidDevice;
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "SIMT emulator");
    properties->major = settings.compute_capability / 10;
    properties->minor = settings.compute_capability % 10;
    properties->multiProcessorCount = settings.multiprocessors;
    properties->sharedMemPerBlockOptin = settings.shared_bytes_per_block;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
    if (index != 0) return cudaErrorInvalidDevice;
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount: *value = settings.multiprocessors; break;
        case cudaDevAttrComputeCapabilityMajor: *value = settings.compute_capability / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = settings.compute_capability % 10; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
            *value = static_cast<int>(settings.shared_bytes_per_block);
            break;
        case cudaDevAttrCooperativeLaunch: *value = settings.cooperative; break;
        case cudaDevAttrL2CacheSize: *value = 0; break;
    }
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    if (bytes && !simt::allowed(reinterpret_cast<uintptr_t>(to), bytes))
        throw std::runtime_error("cudaMemsetAsync: out-of-bounds write of " + std::to_string(bytes) + " bytes");
    std::memset(to, value, bytes);
    return cudaSuccess;
}

namespace simt {

cudaError_t max_active_blocks(int* blocks, int threads, size_t shared_bytes) {
    const bool fits = threads > 0 && threads <= static_cast<int>(MAX_THREADS) && shared_bytes <= settings.shared_bytes_per_block;
    *blocks = fits ? settings.blocks_per_multiprocessor : 0;
    return cudaSuccess;
}

int max_active_clusters(unsigned cluster, size_t shared_bytes) {
    const bool fits = settings.compute_capability >= 90 && shared_bytes <= settings.shared_bytes_per_block;
    return fits ? settings.multiprocessors * settings.blocks_per_multiprocessor / static_cast<int>(cluster) : 0;
}

int compute_capability() { return settings.compute_capability; }

}  // namespace simt
