"""What a chunk runs on: captured CUDA graphs, quantised copies of weights, clocks."""
