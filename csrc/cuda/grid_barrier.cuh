// A barrier of all blocks of a cooperative launch: one counter in global memory that only grows.
//
// It has two halves, so that work may lie between them (weights are asked for while others are still computing), and
// each half leaves out the __syncthreads() that its caller has anyway.
#pragma once

#include "cuda/ptx.cuh"

namespace smolvla::cuda {

struct GridBarrier {
    uint32_t* counter;  // zero before the launch
    uint32_t target = 0;

    // What the block's threads wrote before is visible to every thread behind the wait of any block.
    __device__ __forceinline__ void arrive() {
        __syncthreads();  // the one thread's release covers what the others wrote only if they have written it
        target += gridDim.x;
        if (threadIdx.x == 0) add_release(counter, 1);
    }

    // Only thread 0 waits: the others must meet it at a __syncthreads() before they read what other blocks wrote.
    __device__ __forceinline__ void wait() const {
        if (threadIdx.x == 0)
            while (static_cast<int32_t>(load_acquire(counter) - target) < 0) relax();
    }
};

}  // namespace smolvla::cuda
