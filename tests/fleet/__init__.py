"""A package, so that its Ray ends with the last of its tests and not with the run."""
