"""The report of one run on a GPU: parts in processes of their own, one result file. ``make gpu-report`` and ``gpu-peers``.

A part that is red, crashes or runs out of time costs its own numbers and no other's. ``rehearse`` runs all of it that a
CPU can, with a tiny policy, so that the day a GPU is at hand is not the first day of this code.
"""
