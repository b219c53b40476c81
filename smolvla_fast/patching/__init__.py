"""What stands beside a live policy that was patched: may the engine serve it, what was noted, what was counted."""
