"""`make emulators`: what the tests would compile when they first ask, beforehand. Needs pybind11 and ninja, not torch."""

from __future__ import annotations

import sys
from collections.abc import Callable

from simt.emulator import build

from support import emulated_build


def main() -> int:
    makers: tuple[Callable[[], object], ...] = (build.library, build.ptx)
    for make in (*makers, emulated_build.built) if emulated_build.HERE else makers:
        try:
            print(make())
        except build.Unavailable as reason:
            print(reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
