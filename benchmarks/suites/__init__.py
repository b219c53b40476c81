"""What is timed: chunks, their stages, single ops, training steps, the CPU beside its peers."""
