"""``python -m benchmarks.gpu_account``: docs/gpu-account.md anew, from what the code launches. Needs Triton and no GPU."""

from __future__ import annotations

import argparse
import json
import os

from benchmarks import ROOT

PAGE = ROOT / "docs" / "gpu-account.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_account", description=__doc__)
    parser.add_argument(
        "--as-before", action="store_true", help="keep this version as the one that later ones stand beside"
    )
    args = parser.parse_args()
    # Kernels read it when they are imported; interpreted ones have no launch to note.
    os.environ.pop("TRITON_INTERPRET", None)
    from benchmarks.gpu_account.page import BEFORE, CAMERAS, Account, by_stage, counts, markdown
    from benchmarks.gpu_account.price import H100
    from benchmarks.gpu_account.recording import record

    account = Account(H100, record(cameras=CAMERAS))
    if args.as_before:
        BEFORE.write_text(json.dumps(account.summary(), indent=1) + "\n")
    PAGE.write_text(markdown(account))
    print(by_stage(account), counts(account), f"wrote {PAGE}", sep="\n\n")
    print(f"predicted: {account.together * 1e3:.2f} ms a chunk, {len(account.priced)} nodes")


if __name__ == "__main__":
    main()
