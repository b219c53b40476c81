"""SmolVLA's decoder layers by fused ops, for models and samplers of your own: no policy is needed.

from smolvla_fast.layers import CrossAttentionLayer
layer = CrossAttentionLayer(policy.model.vlm_with_expert.lm_expert.layers[1])
k, v = layer.keys_and_values(prefix_k, prefix_v)     # once for a prefix
x = layer(x, k, v, positions, mask)                  # once for a step
"""

from .modules import CrossAttentionLayer, SelfAttentionLayer

__all__ = ["CrossAttentionLayer", "SelfAttentionLayer"]
