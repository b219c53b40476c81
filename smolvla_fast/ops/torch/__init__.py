"""Backend ``torch``: the ops through fused calls that torch ships (oneDNN linears, SDPA), on live weights.

Same names and signatures as the references. What differs is the numerics: the residual stream is fp32 whatever the
weights are, matrix products run in the dtype of their weight with fp32 accumulation, softmax and statistics are fp32.
"""
