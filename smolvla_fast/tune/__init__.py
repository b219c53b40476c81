"""Who computes an op fastest on this machine: recorded from a chunk, checked, timed, and written into a plan."""
