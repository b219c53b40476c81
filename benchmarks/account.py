"""The least work of each stage, from shapes alone: operations of the matrix products, and bytes to be read.

Bytes are weights, once a stage (once a step in the denoise loop), and the prefix KV that every step reads.
Activations are left out: they fit into caches.
"""

from __future__ import annotations

from typing import Any

from smolvla_fast.dims import read_dims
from smolvla_fast.reference import Cost


def stage_costs(model: Any, cameras: int, language: int, itemsize: int, batch: int = 1) -> dict[str, Cost]:
    """Cost of "vision", "prefix" and "denoise" (all steps) for a batch: weights are read once for all of it.

    model  a ``VLAFlowMatching``      language  padded tokens      itemsize  bytes of a weight in its product
    """
    d = read_dims(model)
    pair = model.vlm_with_expert
    vision = pair.get_vlm_model().vision_model
    w, vision_layers = vision.post_layernorm.weight.shape[0], len(vision.encoder.layers)
    hidden = vision.encoder.layers[0].mlp.fc1.weight.shape[0]
    text_mlp = pair.get_vlm_model().text_model.layers[0].mlp.gate_proj.weight.shape[0]
    expert_mlp = pair.lm_expert.layers[0].mlp.gate_proj.weight.shape[0]
    every = pair.self_attn_every_n_layers
    crosses = sum(
        "cross" in pair.attention_mode and not (every > 0 and i % every == 0) for i in range(d.layers)
    )
    selfs = d.layers - crosses
    q, kv = d.query_heads * d.head_dim, d.kv_heads * d.head_dim
    prefix = cameras * d.image_tokens + language + 1

    patches = (d.image_side // d.patch) ** 2
    patch_weights = 3 * d.patch**2 * w
    layer_weights = 4 * w * w + 2 * w * hidden
    connector_weights = d.shuffle**2 * w * d.text_width
    vision_flops = cameras * (
        2.0 * patches * (patch_weights + vision_layers * layer_weights)
        + 4.0 * vision_layers * patches**2 * w
        + 2.0 * d.image_tokens * connector_weights
    )
    vision_weights = patch_weights + vision_layers * layer_weights + connector_weights

    text_kv = 2 * d.text_width * kv
    text_layer = text_kv + 2 * d.text_width * q + 3 * d.text_width * text_mlp
    cross = 2 * crosses * kv * kv
    # Of the last layer only keys and values are used.
    prefix_weights = (d.layers - 1) * text_layer + text_kv + cross
    prefix_flops = 2.0 * prefix * prefix_weights + 4.0 * (d.layers - 1) * prefix**2 * q

    expert_layer = 2 * d.expert_width * q + 3 * d.expert_width * expert_mlp
    ends = d.expert_width * (2 * d.action_width + d.expert_width)
    step_weights = d.layers * expert_layer + selfs * 2 * d.expert_width * kv + ends
    keys = selfs * (prefix + d.chunk) + crosses * prefix
    step_flops = 2.0 * d.chunk * step_weights + 4.0 * d.chunk * keys * q
    step_bytes = itemsize * (step_weights + batch * 2 * keys * kv)
    steps = model.config.num_steps
    return {
        "vision": Cost(batch * vision_flops, float(itemsize * vision_weights)),
        "prefix": Cost(batch * prefix_flops, float(itemsize * prefix_weights)),
        "denoise": Cost(steps * batch * step_flops, float(steps * step_bytes)),
    }
