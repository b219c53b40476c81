"""pytest-benchmark suites: a whole chunk, its stages, single ops. ``smolvla-fast bench`` runs them."""
