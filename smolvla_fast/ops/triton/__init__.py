"""Backend ``triton``: the kernels of kernels/ under the signatures of the ops."""
