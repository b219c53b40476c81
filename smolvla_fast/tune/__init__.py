"""Measures on this machine who computes which op fastest."""
