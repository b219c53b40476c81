"""What `verify` says of its findings: the verdict in a sentence, tables for the terminal and for Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..measure import system
from ..measure.console import Console, counted
from ..measure.differences import nan_is_worst
from ..measure.page import escape_markdown, picture, table
from . import subject

Found = dict[str, Any]

READING = (
    "Stock, in fp32, and the patched policy computed the same frames from the same noise; a joint's difference is in its "
    "own unit. Beside it: what stock itself loses in the tier's dtype (fp32: with its sums in another order), and what "
    "stock changes when it starts from another noise, which it does at every chunk on a robot. p99: 99 of 100 values "
    "differ by less. Each frame's bound is the tier's (relative L2 of the chunk to stock in fp32)."
)
PICTURES = {
    "trajectories": "Trajectories of the worst episode",
    "joints": "Error by joint",
    "steps": "Error by step of the chunk",
    "histogram": "Frames by error",
}
WORST = 5
"""Frames of a tier that the report lists."""


def share(value: float) -> str:
    return f"{100 * value:.2g} %"


def number(value: float) -> str:
    return f"{value:.3g}"


def clause(found: Found, tier: Found) -> str:
    """What was found of one tier, without its name at the front."""
    count = len(tier["frames"])
    if not count:
        return f"was not verified, stock served every frame ({tier['stock_served']['reason']})"
    within, of = tier["within"], counted(count, "frame")
    frames = f"{within} of {of}" if within != count else of if count == 1 else f"all {of}"
    if not any(each["max"] for each in tier["joints"]):
        moved = "every bit is stock's"
    else:
        shares = [
            (each["max"] / noise["p99"] if noise["p99"] else float("inf"), index)
            for index, (each, noise) in enumerate(zip(tier["joints"], tier["noise"], strict=True))
            if each["max"]
        ]
        most, joint = max(shares, key=lambda each: nan_is_worst(each[0]))
        name, unit = found["joints"][joint]["name"], found["joints"][joint]["unit"]
        moved = (
            f"{name} differs most, by up to {number(tier['joints'][joint]['max'])} {unit}, {share(most)} of what another "
            "noise changes"
        )
    kept = f"keeps its bound on {frames}" if tier["passed"] else f"BREAKS its bound: {frames} are within it"
    kept += " and over all of them together" if tier["passed"] and within < count else ""
    left = tier["stock_served"]["frames"]
    stock = f" (stock served {counted(left, 'frame')} more: {tier['stock_served']['reason']})" if left else ""
    return f"{kept}{stock}, {moved}"


def verdict(found: Found) -> str:
    """The finding in one sentence."""
    said = "; ".join(f"{tier['name']} {clause(found, tier)}" for tier in found["tiers"])
    bad = [tier["name"] for tier in found["tiers"] if tier["frames"] and not tier["passed"]]
    if not bad and not found["passed"]:
        return f"Not verified: {said}."
    if bad:
        return f"FAILED, do not run {' or '.join(bad)} on this robot: {said}."
    judged, drawn = min(len(tier["frames"]) for tier in found["tiers"]), found["drawn"]
    return f"Passed{f' on {judged} of {drawn} frames drawn' if judged < drawn else ''}: {said}."


def about(found: Found) -> list[str]:
    """What was run, in lines."""
    policy, tiers = found["policy"], found["tiers"]
    lines = [
        system.headline(found),
        f"policy {policy['source']}, on {found['device']}; {found['source']}: {counted(found['frames'], 'frame')} of "
        f"{counted(found['episodes'], 'episode')}" + (f" ({found['stopped']})" if found["stopped"] else ""),
    ]
    lines += found["notes"]
    for tier in tiers:
        for name, reason in tier["fallback_reasons"].items():
            lines.append(f"{tier['name']} does without {name}: {reason}")
    return lines


def tables(found: Found) -> list[tuple[str, list[str], list[list[str]], int]]:
    """(title, columns, rows, how many columns hold text)"""
    columns = [
        "tier",
        "backend",
        "frames",
        "within",
        "rel L2",
        "bound",
        "stock's",
        "of noise, p99",
        "of noise, largest",
        "",
    ]
    tiers = [tier for tier in found["tiers"] if tier["frames"]]
    rows = []
    for tier in tiers:
        worst = max(tier["frames"], key=lambda each: nan_is_worst(each["rel_l2"]))
        rows.append([
            tier["name"], tier["backend"], str(len(tier["frames"])), str(tier["within"]), f"{worst['rel_l2']:.2e}",
            "equal bits" if tier["precision"] == "exact" else f"{worst['bound']:.2e}",
            "-" if worst["own_rel_l2"] is None else f"{worst['own_rel_l2']:.2e}", share(tier["share_of_noise"]),
            share(tier["largest_share_of_noise"]), "passed" if tier["passed"] else "FAILED",
        ])  # fmt: skip
    found_tables = [
        ("Tiers: their worst frame, and the largest joint's share of another noise", columns, rows, 2)
    ]
    columns = [
        "joint", "unit", "p99", "largest", "stock's p99", "stock's largest", "noise p99", "noise largest", "share of p99",
    ]  # fmt: skip
    for tier in tiers:
        own = tier["own"] or [None] * len(found["joints"])
        rows = []
        for joint, each, stock, noise in zip(
            found["joints"], tier["joints"], own, tier["noise"], strict=True
        ):
            pairs = [
                number(part[key]) if part else "-" for part in (each, stock, noise) for key in ("p99", "max")
            ]
            part = share(each["p99"] / noise["p99"]) if noise["p99"] else "-"
            rows.append([joint["name"], joint["unit"], *pairs, part])
        found_tables.append((f"{tier['name']}: difference to stock, by joint", columns, rows, 2))
    return found_tables


def show(found: Found, console: Console) -> None:
    for line in about(found):
        console.line(line)
    subject.say_whose(found["policy"], console)
    for title, columns, rows, left in tables(found):
        console.table(title, columns, rows, left)
    console.line(found["verdict"])


def markdown(found: Found, pictures: list[Path]) -> str:
    """The report. pictures  those that lie beside it"""
    parts = [
        "# smolvla_fast: what changes on the robot",
        f"**{escape_markdown(found['verdict'])}**",
        READING,
        "\n".join(f"- {escape_markdown(line)}" for line in about(found)),
    ]
    for title, columns, rows, left in tables(found):
        parts += [
            f"## {title}",
            table(columns, [[escape_markdown(cell) for cell in row] for row in rows], left),
        ]
    for tier in found["tiers"]:
        worst = sorted(tier["frames"], key=lambda each: nan_is_worst(each["of_bound"]), reverse=True)[:WORST]
        rows = [
            [
                escape_markdown(each["episode"]),
                each["frame"],
                f"{each['rel_l2']:.2e}",
                f"{each['bound']:.2e}",
                number(each["of_bound"]),
            ]
            for each in worst
        ]
        if rows:
            columns = ["episode", "frame", "rel L2", "bound", "of the bound"]
            parts += [f"## {tier['name']}: the worst frames", table(columns, rows, 1)]
    for path in pictures:
        title = PICTURES[path.stem.rpartition("-")[2]]
        parts += [f"## {title}", picture(title, path.name)]
    return "\n\n".join(parts) + "\n"
