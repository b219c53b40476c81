// The weights of a block's units on their way through shared memory.
//
// A slab is what one unit multiplies with: all k of its weight rows. The order in which a block needs its slabs is known
// from the start and no slab depends on an activation, so a cursor runs ahead of the computation, over the ends of
// phases, layers and steps, and asks for the next slab as soon as there is room: HBM stays busy while blocks wait for
// each other. Slabs lie in a ring in the order of their use, each in one piece; a slab that does not fit behind the last
// one starts again at 0.
#pragma once

#include "cuda/denoise_plan.cuh"
#include "cuda/ptx.cuh"

namespace smolvla::cuda::denoise {

// One weight row by one warp. The one place to change for copies that need no threads (cp.async.bulk on sm_90).
__device__ __forceinline__ void copy_row(unsigned char* to, const unsigned char* from, int bytes) {
    for (int at = 16 * (threadIdx.x % 32); at < bytes; at += 16 * 32) cp_async_16(to + at, from + at);
}

// Until at most this many of the thread's newest groups are under way. The instruction wants a constant.
__device__ __forceinline__ void cp_async_wait_but(int newest) {
    static_assert(kInFlight == 8);
    switch (newest) {
        case 0: return cp_async_wait<0>();
        case 1: return cp_async_wait<1>();
        case 2: return cp_async_wait<2>();
        case 3: return cp_async_wait<3>();
        case 4: return cp_async_wait<4>();
        case 5: return cp_async_wait<5>();
        case 6: return cp_async_wait<6>();
        default: return cp_async_wait<7>();
    }
}

struct WeightStream {
    const DenoisePersistent& p;
    const Plan& plan;
    unsigned char* ring;
    // The slab that comes next: the unit of a product of a layer of a step.
    int step = 0, layer = 0, phase = kMlpOut, unit = static_cast<int>(blockIdx.x);
    // End of the newest slab, end of the last one given back, and how many lie between.
    int write = 0, read = 0, pending = 0;

    __device__ __forceinline__ int place(int after, int bytes) const {
        return after + bytes > plan.ring_bytes ? 0 : after;
    }

    // Asks for slabs as long as there is room. Every thread copies a part and counts the same groups.
    __device__ __forceinline__ void fill() {
        while (pending < kInFlight) {
            settle();
            if (step == p.sizes.steps) return;
            const int bytes = plan.products[phase].slab_bytes, at = place(write, bytes);
            // Free is all but the bytes from read to write, around the end where write is not the greater of the two.
            const bool fits =
                pending == 0 || (write > read ? at == write || bytes <= read : at == write && at + bytes <= read);
            if (!fits) return;
            if (pending == 0) read = at;  // nothing lies before it, so what it skipped at the end is free
            issue(ring + at);
            cp_async_commit();
            write = at + bytes;
            ++pending;
            unit += gridDim.x;
        }
    }

    // The oldest slabs, once they are there for all threads. So many must be pending.
    template <int SLABS>
    __device__ __forceinline__ void ready(int of, const unsigned char* (&slabs)[SLABS]) const {
        cp_async_wait_but(pending - SLABS);
        __syncthreads();
        const int bytes = plan.products[of].slab_bytes;
        int end = read;
#pragma unroll
        for (int i = 0; i < SLABS; ++i) {
            const int at = place(end, bytes);
            slabs[i] = ring + at;
            end = at + bytes;
        }
    }

    // Gives the oldest slab back: every thread has read it, and a __syncthreads() lies between.
    __device__ __forceinline__ void release(int of) {
        const int bytes = plan.products[of].slab_bytes;
        read = place(read, bytes) + bytes;
        --pending;
        fill();
    }

private:
    // Goes on to the next product in which this block has a unit.
    __device__ __forceinline__ void settle() {
        while (step < p.sizes.steps && unit >= plan.units(phase, p.layers[layer].k == nullptr)) {
            unit = blockIdx.x;
            if (++phase == kPhases) {
                phase = kQkv;
                if (++layer == p.sizes.layers) {
                    layer = 0;
                    phase = kMlpOut;
                    ++step;
                }
            }
        }
    }

    __device__ __forceinline__ void issue(unsigned char* slab) const {
        const Product& product = plan.products[phase];
        const int warp = threadIdx.x / 32;
        for (int plane = 0; plane < product.planes; ++plane)
            copy_row(slab + (plane * kUnit + warp) * product.pitch, row(plane, warp), product.row_bytes);
    }

    // Where a row of the next slab comes from.
    __device__ __forceinline__ const unsigned char* row(int plane, int of_plane) const {
        const DenoiseLayer& weights = p.layers[layer];
        const void* matrix;
        int index = unit * kUnit + of_plane;
        switch (phase) {
            case kQkv: {
                // The two columns that rotation mixes lie half a head apart and belong to one unit.
                const int half = p.sizes.head_dim / 2, units = half / kUnit;
                int head = unit / units;
                matrix = weights.q;
                if (head >= p.sizes.query_heads) {
                    head -= p.sizes.query_heads;
                    matrix = head < p.sizes.kv_heads ? weights.k : weights.v;
                    if (head >= p.sizes.kv_heads) head -= p.sizes.kv_heads;
                }
                index = head * p.sizes.head_dim + plane * half + unit % units * kUnit + of_plane;
                break;
            }
            case kGateUp: matrix = plane ? weights.up : weights.gate; break;
            case kO: matrix = weights.o; break;
            case kDown: matrix = weights.down; break;
            default: matrix = p.mlp_out; break;
        }
        return static_cast<const unsigned char*>(matrix) + static_cast<int64_t>(index) * plan.products[phase].row_bytes;
    }

};

}  // namespace smolvla::cuda::denoise
