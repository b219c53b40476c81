"""The four stages of a chunk, in order: observation, vision, prefix, denoise."""
