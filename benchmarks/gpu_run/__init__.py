"""One visit to a GPU: ``make gpu-report`` and ``make gpu-peers``."""
