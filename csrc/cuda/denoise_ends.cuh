// From one step to the next, a block a row: final norm, velocity, guidance and Euler; then the hidden layer of the next
// step's suffix embedding, folded as in ops/torch/suffix.py. All in fp32 on plain cores; the weights are small and in L2.
#pragma once

#include "cuda/denoise_gemm.cuh"

namespace smolvla::cuda::denoise {

constexpr size_t ends_bytes(int width, int actions) { return sizeof(float) * (width + actions + kWarps); }

// x <- x + dt * v for one row; leaves the row in `actions` (shared). h * norm weight passes through `scaled` (shared).
__device__ __forceinline__ void euler_row(const DenoisePersistent& p, int step, int row, float* scaled, float* actions,
                                          float* squares) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = p.sizes.width;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < width; i += kThreads) {
        const float h = load_l2(p.last_h + static_cast<int64_t>(row) * width + i);
        sum = fmaf(h, h, sum);
        scaled[i] = h * read(p.end_norm, i, p.end_norm_fp32);
    }
    sum = warp_sum(sum);
    if (lane == 0) squares[warp] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += squares[w];
    const float inverse_rms = rsqrtf(sum / static_cast<float>(width) + p.end_eps);
    for (int action = warp; action < p.sizes.actions; action += kWarps) {
        float v = 0.0f;
        for (int i = lane; i < width; i += 32)
            v = fmaf(scaled[i], read(p.action_out, static_cast<int64_t>(action) * width + i, p.action_out_fp32), v);
        v = warp_sum(v) * inverse_rms + read(p.action_out_bias, action, p.action_out_bias_fp32);
        if (lane != 0) continue;
        // Python's double arithmetic for the two numbers that follow from the step alone.
        const double dt = -1.0 / p.sizes.steps;
        const int64_t place = static_cast<int64_t>(row) * p.sizes.actions + action;
        // The noise, then what this very thread wrote one step before.
        const float x = step == 0 ? p.noise[place] : p.x[place];
        if (p.previous) {
            const float time = static_cast<float>(1.0 + step * dt);
            const float error = (p.previous[place] - (x - time * v)) * p.weights[row % p.sizes.suffix];
            v -= p.strengths[step] * error;
        }
        actions[action] = p.x[place] = x + static_cast<float>(dt) * v;
    }
    __syncthreads();
}

// silu(Wf * x + bias) of one row, as two bf16 that add up to it.
__device__ __forceinline__ void hidden_row(const DenoisePersistent& p, int step, int row, const float* actions) {
    const int width = p.sizes.width, count = p.sizes.actions;
    const float* bias = p.fold_bias + (static_cast<int64_t>(step) * p.sizes.batch + row / p.sizes.suffix) * width;
    for (int i = 2 * threadIdx.x; i < width; i += 2 * kThreads) {
        float y[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float sum = bias[i + j];
            for (int action = 0; action < count; ++action)
                sum = fmaf(p.fold_weight[static_cast<int64_t>(i + j) * count + action], actions[action], sum);
            y[j] = sum / (1.0f + expf(-sum));
        }
        uint32_t high, low;
        split(y[0], y[1], high, low);
        const int64_t place = (static_cast<int64_t>(row) * width + i) / 2;
        static_cast<uint32_t*>(p.hidden_high)[place] = high;
        static_cast<uint32_t*>(p.hidden_low)[place] = low;
    }
}

// After `done` steps. The caller's threads meet before, where other blocks' h must be seen, and after.
__device__ __forceinline__ void ends(const DenoisePersistent& p, int done, int rows, unsigned char* shared) {
    float* scaled = reinterpret_cast<float*>(shared);
    float* actions = scaled + p.sizes.width;
    float* squares = actions + p.sizes.actions;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        if (done == 0) {
            hidden_row(p, 0, row, p.noise + static_cast<int64_t>(row) * p.sizes.actions);
            continue;
        }
        // Two barriers a row keep one row's use of shared memory from the next one's: see what lies between them.
        euler_row(p, done - 1, row, scaled, actions, squares);
        if (done < p.sizes.steps) hidden_row(p, done, row, actions);
    }
}

}  // namespace smolvla::cuda::denoise
