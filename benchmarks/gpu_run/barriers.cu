// Microseconds a barrier: of the whole grid, as the denoise loop has it (a release-add and a poll in L2), and of clusters.
// One block on each multiprocessor. Prints JSON; a cluster that the GPU has not is null.
#include <cooperative_groups.h>
#include <cstdio>

namespace cg = cooperative_groups;

constexpr int THREADS = 256, ROUNDS = 2000;

#define TRY(call)                                                                      \
    do {                                                                               \
        cudaError_t status = (call);                                                   \
        if (status != cudaSuccess) {                                                   \
            std::printf("%s: %s\n", #call, cudaGetErrorString(status));                \
            return 1;                                                                  \
        }                                                                              \
    } while (0)

__global__ void grid_barriers(unsigned* arrived, int rounds) {
    for (int round = 1; round <= rounds; ++round) {
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned seen, wanted = gridDim.x * round;
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
            } while (seen < wanted);
        }
        __syncthreads();
    }
}

__global__ void cluster_barriers(unsigned*, int rounds) {
#if __CUDA_ARCH__ >= 900
    for (int round = 0; round < rounds; ++round) cg::this_cluster().sync();
#endif
}

static int timed(void (*kernel)(unsigned*, int), int blocks, int cluster, bool together, float* us) {
    unsigned* arrived;
    TRY(cudaMalloc(&arrived, sizeof *arrived));
    cudaEvent_t start, stop;
    TRY(cudaEventCreate(&start));
    TRY(cudaEventCreate(&stop));
    cudaLaunchAttribute attributes[1];
    if (together) {
        attributes[0].id = cudaLaunchAttributeCooperative;
        attributes[0].val.cooperative = 1;
    } else {
        attributes[0].id = cudaLaunchAttributeClusterDimension;
        attributes[0].val.clusterDim.x = cluster;
        attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks / cluster * cluster);
    config.blockDim = dim3(THREADS);
    config.attrs = attributes;
    config.numAttrs = 1;
    *us = 1e30f;
    for (int round = 0; round < 5; ++round) {
        TRY(cudaMemset(arrived, 0, sizeof *arrived));
        TRY(cudaEventRecord(start));
        TRY(cudaLaunchKernelEx(&config, kernel, arrived, ROUNDS));
        TRY(cudaEventRecord(stop));
        TRY(cudaEventSynchronize(stop));
        float ms;
        TRY(cudaEventElapsedTime(&ms, start, stop));
        if (1e3f * ms / ROUNDS < *us) *us = 1e3f * ms / ROUNDS;
    }
    return 0;
}

int main() {
    cudaDeviceProp device;
    TRY(cudaGetDeviceProperties(&device, 0));
    float us;
    int blocks = device.multiProcessorCount;
    if (timed(grid_barriers, blocks, 1, true, &us)) return 1;
    std::printf("{\"multiprocessors\": %d, \"grid_barrier_us\": %.3f", blocks, us);
    for (int cluster = 4; cluster <= 8; cluster *= 2) {
        if (device.major < 9) {
            std::printf(", \"cluster_of_%d_barrier_us\": null", cluster);
            continue;
        }
        // Not all multiprocessors stand in groups of so many: fewer blocks, so that all are there at once.
        if (timed(cluster_barriers, blocks / 2, cluster, false, &us)) return 1;
        std::printf(", \"cluster_of_%d_barrier_us\": %.3f", cluster, us);
    }
    std::printf("}\n");
    return 0;
}
