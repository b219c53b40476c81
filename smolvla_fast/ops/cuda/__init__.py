"""The CUDA C++ kernels as functions on tensors, one file an op: all checks are made here, the extension gets addresses.

Same names and signatures as the references. Forward passes only.
"""
