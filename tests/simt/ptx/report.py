"""`make compiled-kernels`: the error of every op as it is compiled and run, beside eager's."""

from __future__ import annotations

import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "compiled-kernels.md"
ABOUT = """# Triton's kernels, compiled and run on a CPU

Made by `make compiled-kernels` with Triton {version}, without a GPU: what Triton emits for each architecture (PTX), run
by the machine of tests/simt/ptx. Tiles are those of SmolVLA's own sizes, which a row names; what is run is smaller. Of
each output: worst error against fp64 / that of eager torch in the same dtypes / what is allowed: twice eager's and what
rounding alone may add. "torch": the defaults leave it to torch, and no kernel runs. Bits were equal in two orders of
blocks and warps.
"""


def read() -> dict[str, str]:
    """What the committed table says of each call."""
    rows = re.findall(r"^\| (sm_\d+) \| (.*?) \| (.*?) \|$", TABLE.read_text(), re.MULTILINE)
    return {f"{architecture} {call}": said for architecture, call, said in rows}


@cache
def _known() -> dict[str, Any]:
    from simt.ptx import calls

    return {str(each): each for capability in calls.CAPABILITIES for each in calls.calls(capability)}


def row(name: str) -> str:
    from simt.ptx import calls

    try:
        found = calls.judged(_known()[name])
    except (AssertionError, RuntimeError) as error:
        return f"beyond: {error}"
    return "; ".join(f"{x.output} {x.error:.1e} / {x.eager:.1e} / {x.allowed:.1e}" for x in found) or "torch"


def prepare() -> None:
    os.environ.setdefault("SMOLVLA_FAST_TRITON", "sm_90")
    from support import triton_by

    triton_by.prepare()
    import torch

    torch.set_num_threads(1)


def main() -> int:
    prepare()
    import triton
    from simt.emulator import build

    build.ptx()
    names = list(_known())
    with ProcessPoolExecutor(2, get_context("spawn"), prepare) as pool:
        said = list(pool.map(row, names))
    lines = [
        ABOUT.format(version=triton.__version__),
        "| | call | error / eager / allowed |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name.replace(' ', ' | ', 1)} | {each} |" for name, each in zip(names, said, strict=True)]
    TABLE.write_text("\n".join(lines) + "\n")
    bad = [f"{name}: {each}" for name, each in zip(names, said, strict=True) if each.startswith("beyond")]
    print(f"wrote {TABLE}", *bad, sep="\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
