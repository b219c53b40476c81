"""``make acceptance``: writes docs/acceptance.md, check -> test -> where it holds, from the marks of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import checks


def main() -> None:
    checks.DOCUMENT.write_text(checks.markdown(), encoding="utf-8")
    print(f"wrote {checks.DOCUMENT}")


if __name__ == "__main__":
    main()
