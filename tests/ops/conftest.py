"""The backends of an op, for the tests of every op."""

from support.backends import backend, compiled, emulator, over_seeds

__all__ = ["backend", "compiled", "emulator", "over_seeds"]
