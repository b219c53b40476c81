"""A training step's forward by fused ops: its loss (``engine``), layers with gradients (``layers``), ``image_cache``."""
