"""``python -m benchmarks``: the same as ``smolvla-fast bench``."""

import sys

from smolvla_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
