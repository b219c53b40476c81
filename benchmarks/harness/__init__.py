"""How it is timed: flags, gate, recorder, alternating rounds."""
