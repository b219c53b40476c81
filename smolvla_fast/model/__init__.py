"""Typed views of a live SmolVLA: sizes, weights, tiers, the KV cache."""
