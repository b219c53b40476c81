"""How it is timed: flags, gate, alternating rounds, parts of a run."""
