"""A training step's forward by fused ops: where it meets the policy (``seam``), whether it may (``guard``), the score of the
loss (``engine``), its layers with gradients (``layers``), and what lives beside a model meanwhile (``learning``)."""
