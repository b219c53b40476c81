// The denoise loop of SmolVLA in one launch: all Euler steps of all expert layers.
//
// A step reads every weight of the expert once and has 50 rows to multiply with each: bound by the weights' way from
// memory. So there is one block a multiprocessor that lives through the whole loop, its weights flow through shared
// memory without a stop (denoise_stream.cuh), and what lies between two products is a counter (grid_barrier.cuh) instead
// of the end of a launch. A layer has five phases:
//
//   qkv        norm, queries (in a self-attention layer keys and values too), rotation; keys and values to their cache slot
//   attention  over the cached prefix, and the suffix in a self-attention layer (attention_tile.cuh)
//   o          output projection + residual
//   gate_up    norm, silu(gate) * up
//   down       down projection + residual
//
// and between steps there are two: ends (denoise_ends.cuh) and mlp_out, the last product of the suffix embedding.
//
// Units of 8 columns are dealt to the blocks in turn. mlp_out, o and down are dealt alike, so a block has the same
// columns of the residual stream all the time and keeps them in its shared memory, in fp32; other blocks read them, for
// their norms, as bf16 from L2. All else that goes from block to block is bf16 in L2 as well, and read past L1.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "cuda/denoise_block.cuh"

namespace smolvla::cuda {
namespace denoise {

__global__ void __launch_bounds__(kThreads, 1)
    denoise_persistent_kernel(const __grid_constant__ DenoisePersistent p, const __grid_constant__ Plan plan) {
    SMOLVLA_SHARED(shared);
    Block(p, plan, shared).run();
}

namespace {

// Tensor cores and cp.async want 16 bytes, which is what shared memory is dealt in.
constexpr int kAlignment = 128;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int ceil_div(int a, int b) { return (a + b - 1) / b; }

Product make_product(int inputs, int planes, int units, bool fp32) {
    Product product{};
    product.inputs = inputs;
    product.planes = planes;
    product.row_bytes = inputs * (fp32 ? 4 : 2);
    product.pitch = pitch_of(product.row_bytes, fp32);
    product.slab_bytes = planes * kUnit * product.pitch;
    product.units = units;
    return product;
}

struct Launch {
    Plan plan{};
    DenoiseResources resources{};
};

Launch make_launch(const DenoiseSizes& sizes) {
    int index = 0, multiprocessors = 0, shared_limit = 0, cooperative = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, index), "cudaDeviceGetAttribute");

    Launch launch;
    Plan& plan = launch.plan;
    const int heads = sizes.query_heads * sizes.head_dim, units_a_head = sizes.head_dim / 2 / kUnit;
    const int columns = sizes.width / kUnit;
    plan.products[kMlpOut] = make_product(sizes.width, 1, columns, sizes.mlp_out_fp32);
    plan.products[kQkv] =
        make_product(sizes.width, 2, (sizes.query_heads + 2 * sizes.kv_heads) * units_a_head, false);
    plan.products[kO] = make_product(heads, 1, columns, false);
    plan.products[kGateUp] = make_product(sizes.width, 2, sizes.inner / kUnit, false);
    plan.products[kDown] = make_product(sizes.inner, 1, columns, false);
    plan.cross_units = sizes.query_heads * units_a_head;
    plan.rows = sizes.batch * sizes.suffix;
    plan.attention_tiles = sizes.batch * sizes.kv_heads *
                           ceil_div(sizes.suffix * (sizes.query_heads / sizes.kv_heads), kAttentionRows);

    AttentionArgs<bf16, bf16>& attention = plan.attention;
    attention.tokens = sizes.suffix;
    attention.masked_keys = sizes.prefix;
    attention.keys = sizes.prefix + sizes.suffix;
    attention.group = sizes.query_heads / sizes.kv_heads;
    attention.head_dim = sizes.head_dim;
    attention.scale_log2 = 1.44269504f / sqrtf(static_cast<float>(sizes.head_dim));
    attention.q_strides = {static_cast<int64_t>(sizes.suffix) * heads, heads, sizes.head_dim};
    attention.k_strides = {0, sizes.kv_heads * sizes.head_dim, sizes.head_dim};
    attention.out_batch_stride = attention.q_strides.batch;
    attention.out_token_stride = heads;
    attention.mask_batch_stride = sizes.prefix;

    // A block a multiprocessor, for all of its shared memory goes to weights on their way; none that would only wait.
    int useful = std::max(plan.attention_tiles, plan.rows);
    DenoiseResources& resources = launch.resources;
    for (const Product& product : plan.products) {
        useful = std::max(useful, product.units);
        resources.largest_slab = std::max(resources.largest_slab, static_cast<size_t>(product.slab_bytes));
    }
    resources.blocks = std::min(multiprocessors, useful);
    resources.counter_barriers = sizes.steps * (2 + 5 * sizes.layers);
    resources.cooperative = cooperative != 0;

    const size_t residual = aligned(sizeof(float) * kUnit * plan.rows * ceil_div(columns, resources.blocks));
    const size_t inverse_rms = aligned(sizeof(float) * plan.rows);
    const size_t work = aligned(std::max({Parts::kBytes, NarrowTile::shared_bytes, WideTile::shared_bytes,
                                          ends_bytes(sizes.width, sizes.actions)}));
    const size_t taken = residual + inverse_rms + work, limit = static_cast<size_t>(shared_limit);
    const size_t room = limit > taken ? (limit - taken) / kAlignment * kAlignment : 0;
    resources.ring_bytes = std::min(room, aligned(kInFlight * resources.largest_slab));
    resources.shared_bytes = resources.ring_bytes + taken;
    plan.ring_bytes = static_cast<int>(resources.ring_bytes);
    plan.residual = plan.ring_bytes;
    plan.inverse_rms = static_cast<int>(plan.residual + residual);
    plan.work = static_cast<int>(plan.inverse_rms + inverse_rms);
    if (resources.ring_bytes >= resources.largest_slab)
        resources.at_once =
            multiprocessors * blocks_at_once(denoise_persistent_kernel, kThreads, resources.shared_bytes);
    return launch;
}

}  // namespace
}  // namespace denoise

DenoiseResources denoise_resources(const DenoiseSizes& sizes) { return denoise::make_launch(sizes).resources; }

void denoise_persistent(const DenoisePersistent& p, void* stream) {
    denoise::Launch planned = denoise::make_launch(p.sizes);
    const DenoiseResources& resources = planned.resources;
    if (resources.at_once < resources.blocks)
        throw std::runtime_error("denoise_persistent: " + std::to_string(resources.blocks) + " blocks of " +
                                 std::to_string(resources.shared_bytes) + " bytes of shared memory, the device runs " +
                                 std::to_string(resources.at_once) + " at once");
    planned.plan.attention.q = static_cast<const bf16*>(p.q);
    planned.plan.attention.out = static_cast<bf16*>(p.attended);
    planned.plan.attention.mask = reinterpret_cast<const uint8_t*>(p.seen);
    const auto on = static_cast<cudaStream_t>(stream);
    check(cudaMemsetAsync(p.counter, 0, sizeof(*p.counter), on), "cudaMemsetAsync");
    Grid grid;
    grid.blocks = dim3(resources.blocks);
    grid.threads = dim3(denoise::kThreads);
    grid.shared_bytes = resources.shared_bytes;
    grid.cooperative = true;
    launch("denoise_persistent", denoise::denoise_persistent_kernel, grid, on, p, planned.plan);
}

}  // namespace smolvla::cuda
