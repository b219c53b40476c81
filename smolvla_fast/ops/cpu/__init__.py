"""Backend ``cpu``: the C++ kernels of csrc/cpu/, and what the processor at hand can do."""
