"""What is timed, how, and what is said about it. ``smolvla-fast bench`` runs it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A suite checks before it times, by what the tests check with; compiled tables know the flags that the build has.
sys.path += [str(ROOT / "tests"), str(ROOT / "csrc")]
