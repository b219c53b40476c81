#pragma once

#include <cstddef>
#include <cstdint>

namespace smolvla::cuda {

// A launch's parameters hold the addresses of all layers; 4 KB of them are sure to be accepted.
constexpr int kDenoiseLayers = 32;

struct DenoiseLayer {
    const void *q, *k, *v, *o, *gate, *up, *down;  // bf16 [out, in]; k and v are null in a cross layer
    const void *norm1, *norm2;                     // [width]
    void *k_cache, *v_cache;                       // [batch, prefix + suffix, kv_heads, head_dim]; cross: [batch, prefix, ..]
    float eps1, eps2;
};

struct DenoiseSizes {
    int batch, suffix, prefix, layers, steps;
    int width, inner, query_heads, kv_heads, head_dim, actions;
    bool mlp_out_fp32;  // dtype of the one head whose weights are streamed
};

struct DenoisePersistent {
    DenoiseLayer layers[kDenoiseLayers];
    // One bit a layer: fp32 where set, else bf16.
    uint32_t norm1_fp32, norm2_fp32, cache_fp32;
    DenoiseSizes sizes;
    // Heads, each fp32 or bf16: [width, width], [width], [width], [actions, width], [actions].
    const void *mlp_out, *mlp_out_bias, *end_norm, *action_out, *action_out_bias;
    bool mlp_out_bias_fp32, end_norm_fp32, action_out_fp32, action_out_bias_fp32;
    float end_eps;
    const float *fold_weight, *fold_bias;  // [width, actions], [steps, batch, width]
    const float* noise;                    // [batch, suffix, actions]
    const bool* seen;                      // [batch, prefix]
    // Sines and cosines of every row's position, [batch, suffix, head_dim / 2].
    const float *self_sin, *self_cos, *cross_sin, *cross_cos;
    // Guidance, with null for previous where there is none: [batch, suffix, actions], [suffix], [steps].
    const float *previous, *weights, *strengths;
    // Scratch, [rows, ..] with rows = batch * suffix: query_heads * head_dim twice, inner, width; all bf16. h is the
    // residual stream times the weight of the norm that comes next.
    void *q, *attended, *inner, *h;
    void *hidden_high, *hidden_low;  // [rows, width] bf16, their sum is the value
    float* squares;                  // [rows, width / 8], sums of squares of the residual stream
    float* last_h;                   // [rows, width]
    uint32_t* counter;               // one number
    float* x;                        // [rows, actions], the result
};

struct DenoiseResources {
    int blocks;            // of the launch
    int at_once;           // how many the device can run at once; fewer than blocks: it cannot be launched
    size_t shared_bytes;   // of a block
    size_t ring_bytes;     // of these for weights on their way
    size_t largest_slab;   // more than ring_bytes: it cannot be launched
    int counter_barriers;  // that a launch goes through
    bool cooperative;      // whether the device can launch so that all blocks run at once
};

// What a launch of these sizes would take on the current device.
DenoiseResources denoise_resources(const DenoiseSizes& sizes);

// All Euler steps of all expert layers in one cooperative launch. Throws where denoise_resources says it cannot run.
void denoise_persistent(const DenoisePersistent& p, void* stream);

}  // namespace smolvla::cuda
