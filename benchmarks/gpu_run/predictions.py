"""What was predicted, beside what was measured: a column of a contact's page."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from benchmarks import ROOT

PREDICTIONS = ROOT / "build" / "gpu" / "predictions.json"


def predicted(path: Path = PREDICTIONS) -> dict[str, float]:
    """By the names of a contact's figures, as `make gpu-bring` left them; {} where it left none."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}


def predict() -> dict[str, float]:
    """The account of the chunk that a contact measures, under the names of its figures.

    raises  ImportError where this tree has no account
    """
    from benchmarks.gpu_account.page import CAMERAS, Account
    from benchmarks.gpu_account.price import H100
    from benchmarks.gpu_account.recording import record

    account = Account(H100, record(cameras=CAMERAS))
    found = {"policy/headline/ms": 1e3 * account.together, "policy/nodes": float(len(account.priced))}
    found |= {f"stages/{stage}_ms": 1e3 * seconds for stage, seconds in account.seconds.items()}
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for each in account.priced:
        by_name[each.node.name].append(1e6 * each.seconds)
    for name, us in by_name.items():
        found |= {f"trace/most/{name}/us": sum(us), f"trace/most/{name}/count": float(len(us))}
    return found
