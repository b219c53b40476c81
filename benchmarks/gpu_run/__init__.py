"""One visit to a GPU: ``make gpu-report`` and ``make gpu-peers``.

``--rehearse`` runs all of it that a CPU can, with a tiny policy, so that the day a GPU is at hand is not the first day of
this code.
"""
