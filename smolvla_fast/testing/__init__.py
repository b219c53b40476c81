"""Policies, frames and datasets made offline, for tests, benchmarks and the demo."""
