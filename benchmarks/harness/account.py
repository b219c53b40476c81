"""The least work of each stage, from shapes alone: operations of the matrix products, and bytes to be read.

Bytes are weights, once a stage (once a step in the denoise loop), and the prefix KV that every step reads.
Activations are left out: they fit into caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smolvla_fast.model.dims import Dims, read_dims
from smolvla_fast.model.weights import is_cross
from smolvla_fast.ops.reference import Cost

ADAMW_NUMBERS = 7
"""Of a parameter: it, its gradient and both moments are read, all but the gradient written."""


def stage_costs(model: Any, cameras: int, language: int, itemsize: int, batch: int = 1) -> dict[str, Cost]:
    """Cost of "vision", "prefix" and "denoise" (all steps) for a batch: weights are read once for all of it.

    model  a ``VLAFlowMatching``      language  padded tokens      itemsize  bytes of a weight in its product
    """
    work = _work(model, cameras, language)
    d, steps = work.dims, model.config.num_steps
    step_bytes = itemsize * (work.step_weights + batch * 2 * work.keys * d.kv_heads * d.head_dim)
    return {
        **work.before_suffix(itemsize, batch),
        "denoise": Cost(steps * batch * work.step_flops, float(steps * step_bytes)),
    }


def training_costs(model: Any, cameras: int, language: int, itemsize: int, batch: int = 1) -> dict[str, Cost]:
    """Cost of "vision", "prefix" and "expert" of one training step of a batch, with LeRobot's defaults: expert, heads and
    state projection learn. The expert's bytes are its weights, forward and backward, and AdamW's traffic.

    A product of what learns costs three times its forward, one of the prefix once: of its rows the state's alone has a
    gradient. Keys and values that nothing learns from have none.
    language  tokens that any sample needs      other arguments as in ``stage_costs``
    """
    work = _work(model, cameras, language)
    d, q = work.dims, work.dims.query_heads * work.dims.head_dim
    # Inference folds the actions' half of the MLP of action and time into their projection; weights that learn cannot be.
    halves = 2 * d.expert_width**2
    weights = work.step_weights + halves
    linear = 6.0 * d.chunk * (work.step_weights + halves / 2) + 4.0 * halves / 2
    linear -= 2.0 * d.chunk * d.action_width * d.expert_width  # no gradient of actions
    learning_keys = work.selfs * (d.chunk + 1) + work.crosses * work.prefix
    attention = 8.0 * d.chunk * work.keys * q + 4.0 * d.chunk * learning_keys * q
    state = 2.0 * work.prefix_weights
    cross = 2.0 * work.prefix * work.cross_weights
    learns = weights + work.cross_weights + d.state_width * d.text_width
    stored = model.vlm_with_expert.lm_expert.layers[0].mlp.gate_proj.weight.element_size()
    expert_bytes = 2 * itemsize * weights + ADAMW_NUMBERS * stored * learns
    return {
        **work.before_suffix(itemsize, batch),
        "expert": Cost(batch * (linear + attention + state + cross), float(expert_bytes)),
    }


@dataclass(frozen=True)
class _Work:
    """Operations of one sample's forward, and weights that they read; ``step`` is one pass of the expert."""

    dims: Dims
    vision_flops: float
    vision_weights: int
    prefix: int
    """tokens"""
    prefix_flops: float
    prefix_weights: int
    cross_weights: int
    """of ``prefix_weights``: the expert's projections of the prefix KV in its cross-attention layers"""
    selfs: int
    crosses: int
    keys: int
    """that a suffix row sees, over all layers"""
    step_flops: float
    step_weights: int

    def before_suffix(self, itemsize: int, batch: int) -> dict[str, Cost]:
        return {
            "vision": Cost(batch * self.vision_flops, float(itemsize * self.vision_weights)),
            "prefix": Cost(batch * self.prefix_flops, float(itemsize * self.prefix_weights)),
        }


def _work(model: Any, cameras: int, language: int) -> _Work:
    d = read_dims(model)
    pair = model.vlm_with_expert
    vision = pair.get_vlm_model().vision_model
    w, vision_layers = vision.post_layernorm.weight.shape[0], len(vision.encoder.layers)
    hidden = vision.encoder.layers[0].mlp.fc1.weight.shape[0]
    text_mlp = pair.get_vlm_model().text_model.layers[0].mlp.gate_proj.weight.shape[0]
    expert_mlp = pair.lm_expert.layers[0].mlp.gate_proj.weight.shape[0]
    crosses = sum(is_cross(pair, i) for i in range(d.layers))
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
    return _Work(
        d, vision_flops, vision_weights, prefix, prefix_flops, prefix_weights, cross, selfs, crosses, keys, step_flops,
        step_weights,
    )  # fmt: skip
