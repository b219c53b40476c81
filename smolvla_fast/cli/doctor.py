"""Shows what is installed, what this machine can do, and which backend serves which op. Works without LeRobot, GPU and
compiler, and names what is missing with the reason.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from ..engine import plan_files
from ..measure import system
from ..measure.console import Console, check_writable, counted, write_json
from ..ops import availability, extension
from ..ops import select as backends
from ..ops.cpu import int16
from ..patching.settings import DISABLE, disabled

LIBRARIES = {
    "GELU by cuBLASLt": "cublaslt",
    "residual product by cuBLAS": "cublas",
    "attention by torch's FlashAttention": "flash-sdpa",
    "attention by cuDNN": "cudnn",
    "attention by flash-attn": "flash",
}
"""What may serve beside the backends on a GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="PATH", help="write the findings to this file")


def run(args: argparse.Namespace, console: Console) -> int:
    if args.json is not None:
        check_writable(args.json, "--json")
    found = examine()
    show(found, console)
    if args.json is not None:
        write_json(args.json, found)
        console.line(f"wrote {args.json}")
    return 0


def examine() -> dict[str, Any]:
    """All findings, as JSON values."""
    facts = system.facts()
    device = torch.device("cuda" if facts["gpus"] else "cpu")
    plans, trouble = plan_files.listing()
    try:
        folder = str(plan_files.cache_folder())
    except plan_files.CannotSave as error:
        folder = str(error)
    quantized = {tier: reason or "" for tier, reason in backends.why_not_quantized(device).items()}
    slow = None if quantized["int16"] else int16.why_slow()
    return {
        **facts,
        "cache_folder": folder,
        "plans": plans,
        "plans_trouble": trouble,
        "disabled": disabled(),
        "versions": system.versions(),
        "compiler": system.compiler(),
        "nvcc": system.nvcc(),
        "extensions": {
            kind: {"available": extension.available(kind), "reason": extension.why_missing(kind)}
            for kind in extension.KINDS
        },
        "serves": serves(device),
        "fallback_reasons": availability.fallback_reasons(device),
        "quantized": quantized,
        "by_fp32": {} if slow is None else {"int16": f"{slow}; products run in fp32"},
        "libraries": {
            what: availability.why_not_library(name, device) or "" for what, name in LIBRARIES.items()
        },
        "backends": list(map(asdict, backends.table(device))),
    }


def serves(device: torch.device) -> str:
    """The backend that ``backend="auto"`` takes on this device."""
    return backends.select("auto", device, False).backend


def show(found: dict[str, Any], console: Console) -> None:
    rows = [[name, version or "not installed"] for name, version in found["versions"].items()]
    console.table("Versions", ["package", "version"], rows, left=2)

    processor = found["cpu"] + (f" ({found['cpu_model']})" if found["cpu_model"] else "")
    cards = [
        f"{card['name']}, compute capability {card['compute_capability']}, {card['bytes'] / 2**30:.0f} GiB"
        for card in found["gpus"]
    ]
    cores, threads = counted(found["cores"], "core"), counted(found["threads"], "thread")
    rows = [
        ["processor", f"{processor}, {cores}, torch uses {threads}"],
        ["features", ", ".join(found["cpu_features"]) or "unknown"],
        *([["limited by", f"ONEDNN_MAX_CPU_ISA={found['cpu_limit']}"]] if found["cpu_limit"] else []),
        ["GPU", "; ".join(cards) or "none that torch can use"],
        ["driver", found["driver"] or "none"],
        ["C++ compiler", found["compiler"] or "none found"],
        ["nvcc", found["nvcc"] or "none found"],
        *(
            [f"{kind} extension", "loaded" if state["available"] else state["reason"]]
            for kind, state in found["extensions"].items()
        ),
        *(
            [f"precision {tier}", reason or found["by_fp32"].get(tier) or "served"]
            for tier, reason in found["quantized"].items()
        ),
        *([what, reason or "a candidate"] for what, reason in found["libraries"].items() if cards),
        ["commit", found["commit"] or "not a checkout"],
        ["cache folder", found["cache_folder"]],
    ]
    console.table("Machine", ["what", "found"], rows, left=2)

    cells = found["backends"]
    names = list(dict.fromkeys(cell["backend"] for cell in cells))
    by_op: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in cells:
        by_op.setdefault(cell["op"], {})[cell["backend"]] = cell
    reasons: list[str] = []
    rows = []
    for op, row in by_op.items():
        marks = []
        for name in names:
            cell = row.get(name)
            if cell is not None and cell["available"]:
                marks.append("yes")
                continue
            reason = (cell or {}).get("reason") or "no such kernel"
            if reason not in reasons:
                reasons.append(reason)
            marks.append(f"({reasons.index(reason) + 1})")
        rows.append([op, *marks])
    title = f"Ops by backend; backend='auto' takes {found['serves']} here"
    console.table(title, ["op", *names], rows, left=1 + len(names))
    for number, reason in enumerate(reasons, 1):
        console.line(f"({number}) {reason}")
    show_plans(found, console)
    for name, reason in found["fallback_reasons"].items():
        console.line(f"backend='auto' does not take {name}: {reason}")
    if found["disabled"]:
        console.line(f"{DISABLE} is set: every policy runs stock")
    if found["versions"]["lerobot"] is None:
        console.line(
            "lerobot is missing: demo and verify run smolvla_fast's own SmolVLA; train, serve and bench need it; "
            '`pip install "smolvla_fast[lerobot]"`'
        )


def show_plans(found: dict[str, Any], console: Console) -> None:
    """The plans that are there, and why some are not for this machine."""
    fits = [plan for plan in found["plans"] if plan["reason"] is None]
    if fits:
        rows = [
            [
                plan["tier"],
                plan["backend"],
                f"{plan['measured']} ({plan['age']})",
                plan["choices"],
                plan["file"],
            ]
            for plan in fits
        ]
        title = "Plans for this machine, software and number of threads"
        console.table(title, ["tier", "backend", "measured", "choices", "file"], rows, left=5)
    else:
        console.line(
            "no plan for this machine, software and number of threads: `smolvla-fast tune --policy.path "
            "FOLDER_OR_HUB_ID` makes one for a policy"
        )
    for plan in found["plans"]:
        if plan["reason"] is not None:
            console.line(f"plan not used here: {plan['file']}: {plan['reason']}")
    if found["plans_trouble"]:
        console.line(f"plans: {found['plans_trouble']}")
