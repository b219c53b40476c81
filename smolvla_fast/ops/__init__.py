"""Every op of a chunk: its table, and who serves it. One room a backend; ``reference`` is the truth."""
