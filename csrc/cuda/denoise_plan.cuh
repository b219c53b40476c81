// Who computes what in denoise_persistent, and where it lies in shared memory. Everything here follows from the sizes
// and the number of blocks alone, so that a block knows the weights it will need long before it needs them.
#pragma once

#include "cuda/attention_args.cuh"
#include "cuda/denoise_persistent.h"
#include "cuda/launch.cuh"

namespace smolvla::cuda::denoise {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnit = 8;                    // columns of a unit: n of mma, and small enough that 720 columns make 90
constexpr int kRowTiles = 4;                // m16 tiles of a row block: the 50 tokens of a chunk in one pass
constexpr int kRowBlock = 16 * kRowTiles;
constexpr int kChunk = 32;                  // k that a warp takes at a time: 16 bytes a thread, two mma deep
constexpr int kPlanes = 2;                  // at most: groups of kUnit columns that one unit computes side by side
constexpr int kInFlight = 8;                // slabs at most; 8 of 23 KB outlast the latency of HBM many times over

// The matrix products of a step, in the order of their weights in the stream.
enum Phase : int { kMlpOut, kQkv, kO, kGateUp, kDown, kPhases };

struct Product {
    int inputs;      // k
    int planes;      // a unit has planes * kUnit weight rows
    int row_bytes;   // of a weight row
    int pitch;       // bytes from one row to the next in shared memory
    int slab_bytes;  // planes * kUnit * pitch
    int units;       // of the whole matrix; of kQkv in a self-attention layer
};

struct Plan {
    Product products[kPhases];
    int cross_units;  // of kQkv in a cross layer: the queries alone
    int rows;         // batch * suffix
    int attention_tiles;
    // Of a self-attention layer, but for its keys and values. Read from the launch's parameters, 64-bit strides take no
    // registers.
    AttentionArgs<bf16, bf16> attention;
    // Byte offsets in shared memory; the ring of weights lies at 0.
    int ring_bytes, residual, inverse_rms, work;

    __host__ __device__ int units(int phase, bool cross) const {
        return phase == kQkv && cross ? cross_units : products[phase].units;
    }
};

// Eight lanes read 16 bytes each in one go, of two rows four neighbours: bf16 rows must lie 64 bytes apart (mod 128).
// Of fp32 rows a lane reads 32 bytes in two goes: rows must lie 16 bytes apart (mod 32).
__host__ __device__ inline int pitch_of(int row_bytes, bool fp32) {
    return fp32 ? (row_bytes + 15) / 32 * 32 + 16 : (row_bytes + 63) / 128 * 128 + 64;
}

}  // namespace smolvla::cuda::denoise
