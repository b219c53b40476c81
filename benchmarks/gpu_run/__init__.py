"""A visit to a GPU: ``make gpu-bring``, ``gpu-contact``, ``gpu-report`` and ``gpu-peers`` (docs/gpu.md)."""
