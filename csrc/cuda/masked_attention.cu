// The attention of text and expert layers: prefix, suffix and cross attention over a cache where it lies.
//
// A block a tile of 16 rows of one KV head, all of whose keys its 8 warps share: 50 tokens of 15 heads over 5 KV heads
// are 50 blocks of 8 warps, each of which waits for L2 once or twice. Bound by latency; see attention_tile.cuh.
#include "cuda/masked_attention.h"

#include <cmath>

#include "cuda/attention_tile.cuh"

namespace smolvla::cuda {
namespace {

template <class Q, class KV, int HEAD_DIM>
__global__ void __launch_bounds__(kAttentionThreads) masked_attention_fwd_kernel(const AttentionArgs<Q, KV> args) {
    SMOLVLA_SHARED(shared);
#if SMOLVLA_SM_90
    await_earlier_launches();
    let_next_launch_begin();
#endif
    AttentionTile<Q, KV, HEAD_DIM>::run(shared, args, blockIdx.z, blockIdx.y, blockIdx.x * kAttentionRows);
}

template <class Q, class KV, int HEAD_DIM>
void start(const MaskedAttention& p, void* stream) {
    const auto strides = [](const std::array<int64_t, 3>& s) { return AttentionStrides{s[0], s[1], s[2]}; };
    AttentionArgs<Q, KV> args;
    args.q = static_cast<const Q*>(p.q);
    args.k = static_cast<const KV*>(p.k);
    args.v = static_cast<const KV*>(p.v);
    args.out = static_cast<Q*>(p.out);
    args.mask = p.mask;
    args.q_strides = strides(p.q_strides);
    args.k_strides = strides(p.k_strides);
    args.v_strides = strides(p.v_strides);
    args.out_token_stride = static_cast<int64_t>(p.heads) * p.head_dim;
    args.out_batch_stride = p.tokens * args.out_token_stride;
    args.mask_batch_stride = p.mask_strides[0];
    args.mask_token_stride = p.mask_strides[1];
    args.mask_key_stride = p.mask_strides[2];
    args.tokens = p.tokens;
    args.keys = args.masked_keys = p.keys;
    args.group = p.heads / p.kv_heads;
    args.head_dim = p.head_dim;
    args.scale_log2 = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(p.head_dim)));

    Grid grid;
    grid.blocks = dim3((p.tokens * args.group + kAttentionRows - 1) / kAttentionRows, p.kv_heads, p.batch);
    grid.threads = dim3(kAttentionThreads);
    grid.shared_bytes = AttentionTile<Q, KV, HEAD_DIM>::shared_bytes;
    grid.dependent = p.dependent;
    launch("masked_attention", masked_attention_fwd_kernel<Q, KV, HEAD_DIM>, grid, static_cast<cudaStream_t>(stream),
           args);
}

template <class Q, class KV>
void start_with_head(const MaskedAttention& p, void* stream) {
    if (p.head_dim <= 64)
        start<Q, KV, 64>(p, stream);
    else
        start<Q, KV, 128>(p, stream);
}

template <class Q>
void start_with_cache(const MaskedAttention& p, void* stream) {
    if (p.kv_dtype == DType::float32)
        start_with_head<Q, float>(p, stream);
    else
        start_with_head<Q, Q>(p, stream);
}

}  // namespace

void masked_attention(const MaskedAttention& p, void* stream) {
    if (p.q_dtype == DType::bfloat16)
        start_with_cache<bf16>(p, stream);
    else
        start_with_cache<fp16>(p, stream);
}

}  // namespace smolvla::cuda
