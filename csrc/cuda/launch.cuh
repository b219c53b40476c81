// How a kernel is started, here and in the host emulator of tests/simt/emulator, which takes the place of CUDA's headers where
// SMOLVLA_SIMT is defined. Kernels use dynamic shared memory alone, so that the emulator can give each block its own.
#pragma once

#include <stdexcept>
#include <string>

#if defined(SMOLVLA_SIMT)
#include "emulator/cuda.h"
#else
#include <cuda_runtime.h>
#define SMOLVLA_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace smolvla::cuda {

// Throws std::runtime_error with CUDA's own words. The error is cleared: the next, unrelated check must not find it.
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Grid {
    dim3 blocks, threads;
    size_t shared_bytes = 0;
    bool cooperative = false;  // all blocks run at once or the launch is refused
    unsigned cluster = 1;      // neighbours in x that read each other's shared memory, from sm_90 on
    bool dependent = false;    // begins while the launch ahead still runs, and waits for it itself, from sm_90 on
};

// Above 48 KB a kernel has to ask for dynamic shared memory. The limit is one number a kernel and device for all threads
// of the process, so it is raised to all that the current device gives: what another thread wants less of must not come
// between this thread's asking and its launch.
inline void allow_shared(const void* kernel, size_t bytes) {
    if (bytes <= 48 * 1024) return;
    int index = 0, limit = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "cudaFuncSetAttribute");
    // All of a multiprocessor's memory as shared memory, in percent: a launch that begins early finds room beside the one
    // ahead, and no multiprocessor has to run empty to change how its memory is divided.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "cudaFuncSetAttribute");
}

#if defined(SMOLVLA_SIMT)

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, cudaStream_t, const Args&... args) {
    const std::tuple<Params...> copies(args...);
    simt::run(name, {grid.blocks, grid.threads, grid.shared_bytes, grid.cooperative, grid.cluster, grid.dependent},
              [=] { std::apply(kernel, copies); });
}

template <class... Params>
int clusters_at_once(void (*)(Params...), const Grid& grid) {
    return simt::max_active_clusters(grid.cluster, grid.shared_bytes);
}

#else

struct LaunchConfig {
    cudaLaunchAttribute attributes[3]{};
    cudaLaunchConfig_t of{};

    LaunchConfig(const Grid& grid, cudaStream_t stream) {
        of.gridDim = grid.blocks;
        of.blockDim = grid.threads;
        of.dynamicSmemBytes = grid.shared_bytes;
        of.stream = stream;
        of.attrs = attributes;
        if (grid.cooperative) add(cudaLaunchAttributeCooperative).cooperative = 1;
        if (grid.cluster > 1) {
            auto& size = add(cudaLaunchAttributeClusterDimension).clusterDim;
            size.x = grid.cluster, size.y = size.z = 1;
        }
        if (grid.dependent)
            add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
    }
    LaunchConfig(const LaunchConfig&) = delete;  // it points into itself

private:
    cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
        attributes[of.numAttrs].id = id;
        return attributes[of.numAttrs++].val;
    }
};

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream, const Args&... args) {
    allow_shared(reinterpret_cast<const void*>(kernel), grid.shared_bytes);
    const LaunchConfig config(grid, stream);
    check(cudaLaunchKernelEx(&config.of, kernel, static_cast<Params>(args)...), name);
}

// How many clusters of a kernel the current device runs at once: none where no part of it has so many multiprocessors, or
// where the library has only code for GPUs that know no clusters.
template <class... Params>
int clusters_at_once(void (*kernel)(Params...), const Grid& grid) {
    const auto address = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, address), "cudaFuncGetAttributes");
    if (code.ptxVersion < 90) return 0;
    allow_shared(address, grid.shared_bytes);
    const LaunchConfig config(grid, nullptr);
    int clusters = 0;
    check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config.of), "cudaOccupancyMaxActiveClusters");
    return clusters;
}

#endif

// How many blocks of a kernel one multiprocessor of the current device holds.
template <class... Params>
int blocks_at_once(void (*kernel)(Params...), int threads, size_t shared_bytes) {
    const auto address = reinterpret_cast<const void*>(kernel);
    allow_shared(address, shared_bytes);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, address, threads, shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks;
}

}  // namespace smolvla::cuda
