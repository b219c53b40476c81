// What one block does in the whole loop: the phases of a layer and the order in which they follow each other. The idea
// stands in denoise_persistent.cu.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/denoise_ends.cuh"
#include "cuda/denoise_gemm.cuh"
#include "cuda/denoise_stream.cuh"
#include "cuda/grid_barrier.cuh"

namespace smolvla::cuda::denoise {

constexpr int kHeadDim = 64;  // at most; smaller heads are filled up with zeros
using NarrowTile = AttentionTile<bf16, bf16, kHeadDim>;
using WideTile = AttentionTile<bf16, float, kHeadDim, false>;  // with keys and values at once registers would spill
static_assert(kThreads == kAttentionThreads);

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

struct Block {
    const DenoisePersistent& p;
    const Plan& plan;
    unsigned char* shared;
    WeightStream stream;
    GridBarrier barrier;

    __device__ __forceinline__ Block(const DenoisePersistent& p, const Plan& plan, unsigned char* shared)
        : p(p), plan(plan), shared(shared), stream{p, plan, shared}, barrier{p.counter} {}

    // The residual stream of this block's unit number `index`: [rows, kUnit] fp32.
    __device__ __forceinline__ float2& residual(int index, int row, int column) const {
        float* of = reinterpret_cast<float*>(shared + plan.residual);
        return *reinterpret_cast<float2*>(of + (static_cast<int64_t>(index) * plan.rows + row) * kUnit + column);
    }

    // All units of a phase that are this block's. multiply(sums, first row, slabs, whether they are the block's first)
    // adds up a row block; finish(unit, row, column, parts, row in the block) ends two neighbouring columns of a row.
    // PAIRS: two units at a time where the slabs of both are on their way, so that activations are read once for them.
    template <int PLANES, bool PAIRS = false, class Multiply, class Finish>
    __device__ __forceinline__ void product(int phase, int units, Multiply multiply, Finish finish) {
        const int blocks = gridDim.x;
        for (int unit = blockIdx.x; unit < units; unit += blocks) {
            if constexpr (PAIRS) {
                if (unit + blocks < units && stream.pending >= 2) {
                    pass<PLANES, 2>(phase, unit, multiply, finish);
                    unit += blocks;
                    continue;
                }
            }
            pass<PLANES, 1>(phase, unit, multiply, finish);
        }
    }
    template <int PLANES, int UNITS, class Multiply, class Finish>
    __device__ __forceinline__ void pass(int phase, int unit, Multiply multiply, Finish finish) {
        const Parts parts{reinterpret_cast<float*>(shared + plan.work)};
        const unsigned char* slabs[UNITS];
        stream.ready(phase, slabs);
        for (int first = 0; first < plan.rows; first += kRowBlock) {
            if (first) __syncthreads();  // the parts of the row block before have been read
            Sums<PLANES * UNITS> sums{};
            multiply(sums, first, slabs, unit < static_cast<int>(gridDim.x));
#pragma unroll
            for (int i = 0; i < UNITS; ++i) {
                if (i) __syncthreads();  // the parts of the unit before have been read
                parts.store<PLANES>(sums.of, i * PLANES);
                __syncthreads();
                if (i == 0 && first + kRowBlock >= plan.rows)
                    for (int slab = 0; slab < UNITS; ++slab) stream.release(phase);
                const int own_row = threadIdx.x / 4, column = threadIdx.x % 4 * 2;
                if (first + own_row < plan.rows)
                    finish(unit + i * static_cast<int>(gridDim.x), first + own_row, column, parts, own_row);
            }
        }
    }

    __device__ __forceinline__ float& inverse_rms(int row) const {
        return reinterpret_cast<float*>(shared + plan.inverse_rms)[row];
    }
    // Of the rows of a row block; the first unit of a phase finds them for the others.
    __device__ __forceinline__ void find_inverse_rms(int first, float eps) const {
        const int row = first + threadIdx.x / 4, count = p.sizes.width / kUnit;
        if (row >= plan.rows) return;
        const float* squares = p.squares + static_cast<int64_t>(row) * count;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = threadIdx.x % 4; i < count; i += 4) sum += load_l2(squares + i);
        sum = quad_sum(sum);
        if (threadIdx.x % 4 == 0) inverse_rms(row) = rsqrtf(sum / static_cast<float>(p.sizes.width) + eps);
    }

    // Two columns of the residual stream, for the product behind the norm that comes next: bf16(h * its weight), and the
    // sum of squares of the unit's columns. 1 / rms is applied to that product's sums. So h is rounded once, with its norm,
    // as if the norm were a launch of its own. `norm` null: for the end of the step, in fp32.
    __device__ __forceinline__ void publish(int unit, int row, int column, float2 h, const void* norm, bool fp32) const {
        const int at = unit * kUnit + column;
        const int64_t place = static_cast<int64_t>(row) * p.sizes.width + at;
        if (norm == nullptr) {
            *reinterpret_cast<float2*>(p.last_h + place) = h;
            return;
        }
        static_cast<uint32_t*>(p.h)[place / 2] = pack_bf16(h.x * read(norm, at, fp32), h.y * read(norm, at + 1, fp32));
        const float squares = quad_sum(fmaf(h.x, h.x, h.y * h.y));
        if (column == 0) p.squares[static_cast<int64_t>(row) * (p.sizes.width / kUnit) + unit] = squares;
    }

    // A product onto the residual stream; then comes the norm of this weight.
    __device__ __forceinline__ void residual_product(int phase, const void* activations, const void* norm, bool fp32) {
        const Product& product = plan.products[phase];
        this->product<1>(
            phase, product.units,
            [&](auto& sums, int first, const auto& slabs, bool) {
                multiply(sums, activations, first, plan.rows, product, slabs, [] {});
            },
            [&](int unit, int row, int column, const Parts& parts, int own_row) {
                float2& h = residual((unit - blockIdx.x) / gridDim.x, row, column);
                const float2 y = parts.sum(0, own_row, column);
                h = {h.x + y.x, h.y + y.y};
                publish(unit, row, column, h, norm, fp32);
            });
    }

    __device__ __forceinline__ void mlp_out() {
        const Product& product = plan.products[kMlpOut];
        this->product<1>(
            kMlpOut, product.units,
            [&](auto& sums, int first, const auto& slabs, bool) {
                if (p.sizes.mlp_out_fp32)
                    multiply_split<true>(sums, p.hidden_high, p.hidden_low, first, plan.rows, product, slabs[0]);
                else
                    multiply_split<false>(sums, p.hidden_high, p.hidden_low, first, plan.rows, product, slabs[0]);
            },
            [&](int unit, int row, int column, const Parts& parts, int own_row) {
                const float2 y = parts.sum(0, own_row, column);
                const int at = unit * kUnit + column;
                const float2 h = {y.x + read(p.mlp_out_bias, at, p.mlp_out_bias_fp32),
                                  y.y + read(p.mlp_out_bias, at + 1, p.mlp_out_bias_fp32)};
                residual((unit - blockIdx.x) / gridDim.x, row, column) = h;
                publish(unit, row, column, h, p.layers[0].norm1, p.norm1_fp32 & 1);
            });
    }

    __device__ __forceinline__ void qkv(int index) {
        const DenoiseLayer& layer = p.layers[index];
        const bool cross = layer.k == nullptr, wide = p.cache_fp32 >> index & 1;
        this->product<2>(
            kQkv, plan.units(kQkv, cross),
            [&](auto& sums, int first, const auto& slabs, bool first_units) {
                multiply(sums, p.h, first, plan.rows, plan.products[kQkv], slabs, [&] {
                    if (first_units) find_inverse_rms(first, layer.eps1);
                });
            },
            [&](int unit, int row, int column, const Parts& parts, int own_row) {
                const float scale = inverse_rms(row);
                const float2 x = parts.sum(0, own_row, column), y = parts.sum(1, own_row, column);
                finish_qkv(layer, cross, wide, unit, row, column, {x.x * scale, x.y * scale},
                           {y.x * scale, y.y * scale});
            });
    }
    // x: columns i and i + 1 of a head, y: half a head further.
    __device__ __forceinline__ void finish_qkv(const DenoiseLayer& layer, bool cross, bool wide, int unit, int row,
                                               int column, float2 x, float2 y) const {
        const DenoiseSizes& sizes = p.sizes;
        const int half = sizes.head_dim / 2, units = half / kUnit, i = unit % units * kUnit + column;
        int head = unit / units;
        const bool values = head >= sizes.query_heads + sizes.kv_heads;
        if (!values) {
            const int64_t at = static_cast<int64_t>(row) * half + i;
            const float2 sin = *reinterpret_cast<const float2*>((cross ? p.cross_sin : p.self_sin) + at);
            const float2 cos = *reinterpret_cast<const float2*>((cross ? p.cross_cos : p.self_cos) + at);
            const float2 turned = {x.x * cos.x - y.x * sin.x, x.y * cos.y - y.y * sin.y};
            y = {y.x * cos.x + x.x * sin.x, y.y * cos.y + x.y * sin.y};
            x = turned;
        }
        if (head < sizes.query_heads) {
            const int64_t at = (static_cast<int64_t>(row) * sizes.query_heads + head) * sizes.head_dim + i;
            store(p.q, at, x, false);
            store(p.q, at + half, y, false);
            return;
        }
        head -= values ? sizes.query_heads + sizes.kv_heads : sizes.query_heads;
        const int64_t slot = row / sizes.suffix * static_cast<int64_t>(sizes.prefix + sizes.suffix) + sizes.prefix +
                             row % sizes.suffix;
        const int64_t at = (slot * sizes.kv_heads + head) * sizes.head_dim + i;
        store(values ? layer.v_cache : layer.k_cache, at, x, wide);
        store(values ? layer.v_cache : layer.k_cache, at + half, y, wide);
    }
    __device__ __forceinline__ static void store(void* to, int64_t at, float2 x, bool wide) {
        if (wide)
            *reinterpret_cast<float2*>(static_cast<float*>(to) + at) = x;
        else
            static_cast<uint32_t*>(to)[at / 2] = pack_bf16(x.x, x.y);
    }

    template <class Tile, class KV>
    __device__ __forceinline__ void attention(const DenoiseLayer& layer) const {
        const AttentionArgs<bf16, bf16>& self = plan.attention;
        const int keys = layer.k == nullptr ? self.masked_keys : self.keys;
        const AttentionStrides strides = {keys * self.k_strides.row, self.k_strides.row, self.k_strides.head};
        const AttentionArgs<bf16, KV> args = {
            self.q, static_cast<const KV*>(layer.k_cache), static_cast<const KV*>(layer.v_cache), self.out, self.mask,
            self.q_strides, strides, strides, self.out_batch_stride, self.out_token_stride,
            self.mask_batch_stride, 0, 1, self.tokens, keys,
            self.masked_keys, self.group, self.head_dim, self.scale_log2};
        for (int tile = blockIdx.x; tile < plan.attention_tiles; tile += gridDim.x) {
            __syncthreads();  // other blocks' queries are seen, and shared memory is read by nobody
            const int tiles = plan.attention_tiles / (p.sizes.batch * p.sizes.kv_heads), of = tile / tiles;
            Tile::run(shared + plan.work, args, of / p.sizes.kv_heads, of % p.sizes.kv_heads,
                      tile % tiles * kAttentionRows);
        }
    }

    __device__ __forceinline__ void gate_up(int index) {
        const Product& product = plan.products[kGateUp];
        this->product<2, true>(
            kGateUp, product.units,
            [&](auto& sums, int first, const auto& slabs, bool first_units) {
                multiply(sums, p.h, first, plan.rows, product, slabs, [&] {
                    if (first_units) find_inverse_rms(first, p.layers[index].eps2);
                });
            },
            [&](int unit, int row, int column, const Parts& parts, int own_row) {
                const float scale = inverse_rms(row);
                const float2 gate = parts.sum(0, own_row, column), up = parts.sum(1, own_row, column);
                const int64_t at = static_cast<int64_t>(row) * p.sizes.inner + unit * kUnit + column;
                static_cast<uint32_t*>(p.inner)[at / 2] = pack_bf16(silu(gate.x * scale) * (up.x * scale),
                                                                    silu(gate.y * scale) * (up.y * scale));
            });
    }

    __device__ __forceinline__ void run() {
        stream.fill();
        ends(p, 0, plan.rows, shared + plan.work);
        for (int step = 0; step < p.sizes.steps; ++step) {
            barrier.arrive();
            barrier.wait();
            mlp_out();
            for (int index = 0; index < p.sizes.layers; ++index) {
                const DenoiseLayer& layer = p.layers[index];
                const bool last = index == p.sizes.layers - 1;
                const void* next = last ? nullptr : p.layers[index + 1].norm1;
                barrier.arrive();
                barrier.wait();
                qkv(index);
                barrier.arrive();
                barrier.wait();
                if (p.cache_fp32 >> index & 1)
                    attention<WideTile, float>(layer);
                else
                    attention<NarrowTile, bf16>(layer);
                barrier.arrive();
                barrier.wait();
                residual_product(kO, p.attended, layer.norm2, p.norm2_fp32 >> index & 1);
                barrier.arrive();
                barrier.wait();
                gate_up(index);
                barrier.arrive();
                barrier.wait();
                residual_product(kDown, p.inner, next, !last && (p.norm1_fp32 >> (index + 1) & 1));
            }
            barrier.arrive();
            barrier.wait();
            __syncthreads();  // other blocks' columns of h are seen
            ends(p, step + 1, plan.rows, shared + plan.work);
        }
    }
};

}  // namespace smolvla::cuda::denoise
