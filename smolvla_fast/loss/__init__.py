"""A training step's forward by fused ops: its loss (``engine``), layers with gradients (``layers``), and image tokens that
are kept, by the bytes of a frame (``image_cache``) or by its number in a dataset (``token_store``)."""
