"""Every op of a chunk: its table, and who serves it. One folder a backend; ``reference`` is what all are tested against."""
