"""What compilers make of the kernels, without a GPU: registers, spills, instructions."""
