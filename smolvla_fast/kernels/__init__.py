"""Triton kernels. In a checkout they are the files of top-level kernels/; a wheel holds them right here."""

import os

__path__ = [os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "kernels")]
