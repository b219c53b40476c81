"""Policies, frames and datasets made offline, for tests, benchmarks and the demo."""

from .backbone import make_vlm_folder
from .observations import make_noise, make_observation, tokenize
from .policies import make_policy

__all__ = ["make_noise", "make_observation", "make_policy", "make_vlm_folder", "tokenize"]
