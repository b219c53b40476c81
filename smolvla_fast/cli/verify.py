"""Checks a patched policy against stock on recorded frames and says what the difference does to the robot's joints.

    smolvla-fast verify --policy.path FOLDER --dataset.root FOLDER --precision fp32,bf16

Frames are drawn over the episodes of a LeRobotDataset, or of a folder of saved observations; without either, frames made by
code are checked in normalised units. Stock in fp32 and every tier start from the same noise. Exit status 0 if every tier
keeps its bound, 1 if one breaks it, 3 if none does but stock served every frame of one. The bound of a frame is 1.5 times
the error of stock itself in bf16; for fp32, three times the change of stock when its sums run in other orders, but at least
1e-5; for fp8, int8 and int16, that of the tier's cosine; `--precision exact` requires equal bits. Writes JSON, Markdown, one
HTML page and pictures.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ..measure import differences, system
from ..measure.console import CommandError, Console, cannot_write, check_report, counted, write_json
from ..measure.page import NO_PAGE, write_page
from ..measure.rounds import as_stock, fresh, threads
from ..testing.policies import make_noise
from ..verify import (
    Comparison,
    StockNotFinite,
    StockServed,
    compare,
    passed_together,
    rel_l2,
    stock_in_fp32,
)
from . import checkpoint, recording, subject, verify_report
from .recording import Drawn, Frame, Recording

FRAMES, DRAWN = 200, 2
REPORT = "verify.json"
NOT_VERIFIED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser)
    subject.add_tune(parser)
    recording.add_arguments(parser)
    group = parser.add_argument_group("report")
    group.add_argument(
        "--frames", type=subject.positive,
        help=f"how many to check (default: {FRAMES} of a recording, {DRAWN} drawn by code)",
    )  # fmt: skip
    group.add_argument(
        "--max_minutes", type=minutes, default=10.0, help="then it reports what it has (default: 10)"
    )
    group.add_argument(
        "--dataset.units", dest="units", type=recording.units, metavar="UNITS",
        help="of the actions, which datasets seldom name: degrees, or shoulder_pan.pos=degrees,gripper.pos=%%",
    )  # fmt: skip
    for action in parser._actions:
        if action.dest == "precision":
            action.help = f"one or several, as fp32,bf16: {action.help}"
        if action.dest == "json":
            action.help = f"the figures; .md, .html and .png lie beside them (of a recording: {REPORT})"


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


class Checked(NamedTuple):
    """A frame by a tier. record  for the report      actions  [S, joints] each, as in ``Tier``"""

    comparison: Comparison
    record: dict[str, Any]
    actions: dict[str, Any]


@dataclass
class Tier:
    """A policy patched in one tier, and what it computed. actions: [S, joints] a frame, by fast, reference, own, noise."""

    name: str
    policy: Any
    frames: list[dict[str, Any]] = field(default_factory=list)
    compared: list[Comparison] = field(default_factory=list)
    actions: dict[str, list[Any]] = field(
        default_factory=lambda: {k: [] for k in ("fast", "reference", "own", "noise")}
    )
    by_stock: list[str] = field(default_factory=list)

    def append(self, found: Checked | StockServed) -> None:
        if isinstance(found, StockServed):
            self.by_stock.append(str(found))
            return
        self.compared.append(found.comparison)
        self.frames.append(found.record)
        for name, value in found.actions.items():
            self.actions[name].append(value)


def run(args: argparse.Namespace, console: Console) -> int:
    names = list(dict.fromkeys(name.strip() for name in args.precision.split(",")))
    device = subject.check(args, names)
    recorded = args.repo_id is not None or args.root is not None or args.observations is not None
    path = Path(args.json) if args.json is not None else Path(REPORT) if recorded else None
    if path is not None:
        check_report(path, (".md", ".html", *(f"-{name}.png" for name in verify_report.PICTURES)))
    source: Recording | Drawn | None = recording.open_recording(args, device, args.frames or FRAMES)
    with threads(args.threads):
        print("making the policy" if args.policy_path is None else "loading the policy", file=sys.stderr)
        policy = subject.make_policy(args, device)
        fault = args.policy_path and checkpoint.unnormalized(args.policy_path, policy.config)
        if fault:
            raise CommandError(fault)
        source = source or Drawn(policy, args, DRAWN)
        tiers = [Tier(name, patched(policy, name, args)) for name in names]
        facts = system.facts()
        try:
            found = check_frames(tiers, source, args)
        except StockNotFinite as reason:
            raise CommandError(f"nothing to verify: {reason}") from reason
    found = {**facts, "device": str(device), "policy": subject.describe(policy, args), **found}
    found["verdict"] = verify_report.verdict(found)
    verify_report.show(found, console)
    if path is not None:
        write(found, path, console)
    if found["stopped"] == INTERRUPTED:
        raise KeyboardInterrupt
    return exit_status(found["tiers"])


def exit_status(tiers: Sequence[dict[str, Any]]) -> int:
    """0 every tier passed, 1 one did not, ``NOT_VERIFIED`` stock served every frame of one and the others passed."""
    if any(tier["frames"] and not tier["passed"] for tier in tiers):
        return 1
    return 0 if all(tier["frames"] for tier in tiers) else NOT_VERIFIED


def patched(policy: Any, name: str, args: argparse.Namespace) -> Any:
    """A copy of the policy that shares its weights, patched. CommandError where it would run stock for good."""
    import smolvla_fast

    shared = {id(each): each for each in chain(policy.parameters(), policy.buffers())}
    own = copy.deepcopy(policy, shared)
    try:
        smolvla_fast.patch(own, precision=name, backend=args.backend, tune=args.tune)
    except (ValueError, RuntimeError) as reason:
        raise CommandError(str(reason)) from reason
    if not hasattr(own.model, "stock_class"):
        raise CommandError(f"nothing to verify: {smolvla_fast.status(own).last_fallback}")
    return own


INTERRUPTED = "interrupted"


def check_frames(
    tiers: Sequence[Tier], source: Recording | Drawn, args: argparse.Namespace
) -> dict[str, Any]:
    """Runs the frames through stock and every tier until they are done or the time is up. Returns the figures."""
    drawn = source.frames
    copies: dict[Any, Any] = {}
    stopped: str | None = None
    left_out: list[str] = []
    done: list[tuple[Frame, list[Checked | StockServed]]] = []
    end = time.monotonic() + 60 * args.max_minutes
    with tqdm(total=len(drawn), unit="frame", desc="verify", disable=None, dynamic_ncols=True) as bar:
        try:
            for place, frame in enumerate(drawn):
                if done and time.monotonic() >= end:
                    stopped = (
                        f"of {len(drawn)} that were drawn: stopped by --max_minutes {args.max_minutes:g}"
                    )
                    break
                if bar.disable and place * 10 // len(drawn) != (place - 1) * 10 // len(drawn):
                    print(f"[{place + 1}/{len(drawn)}] frame", file=sys.stderr, flush=True)
                try:
                    found = check_frame(tiers, source, frame, args.seed + 2 * place, copies)
                except CommandError as reason:
                    left_out.append(str(reason))
                    bar.update()
                    continue
                done.append((frame, found))  # a whole frame, or nothing of it
                bar.update()
        except KeyboardInterrupt:
            if not done:
                raise
            stopped = INTERRUPTED
    if not done:
        raise CommandError(f"none of {counted(len(drawn), 'frame')} can be used; {left_out[0]}")
    for _, found in done:
        for tier, each in zip(tiers, found, strict=True):
            tier.append(each)
    figures = [tier_figures(tier) for tier in tiers]
    return {
        "source": source.source, "fps": source.fps, "seed": args.seed, "drawn": len(drawn), "frames": len(done),
        "episodes": len({frame.episode for frame, _ in done}), "stopped": stopped,
        "notes": [*source.notes, *(f"left out: {reason}" for reason in left_out)],
        "joints": [joint._asdict() for joint in source.joints], "tiers": figures, "worst": worst_episode(tiers, figures),
        "passed": all(each["passed"] for each in figures),
    }  # fmt: skip


def check_frame(
    tiers: Sequence[Tier], source: Recording | Drawn, frame: Frame, seed: int, copies: dict[Any, Any]
) -> list[Checked | StockServed]:
    """One frame, by each tier: stock in fp32 on two noises, and the tier on the first.

    raises  CommandError for a frame that cannot be read, or that stock cannot compute either; StockNotFinite where it can
            compute none
    """
    batch, first = source.batch(frame), tiers[0].policy
    noise, other = (make_noise(first, seed=seed + i) for i in (0, 1))
    try:
        truth, second = (stock_in_fp32(first, batch, each, copies) for each in (noise, other))
        compared: list[Comparison | StockServed] = []
        for tier in tiers:
            try:
                compared.append(compare(tier.policy, batch, noise, truth=truth, copies=copies))
            except StockServed as reason:
                compared.append(reason)
    except StockNotFinite as reason:
        if reason.always:
            raise
        raise CommandError(f"frame {frame.number} of episode {frame.episode}: {reason}") from reason
    except Exception:
        _try_stock(first, batch, noise)
        raise

    def actions(chunk: Tensor | None) -> Any:
        return None if chunk is None else source.actions(first, chunk)

    changed = actions(second)
    found: list[Checked | StockServed] = []
    for each in compared:
        if isinstance(each, StockServed):
            found.append(each)
            continue
        judgement = each.judgement
        own = None if each.own is None else rel_l2(each.own, each.reference)
        ratio = judgement.error / judgement.bound if judgement.bound else math.inf * (not judgement.passed)
        record = {
            "episode": frame.episode, "frame": frame.number, "noise_seed": seed, "rel_l2": judgement.error,
            "bound": judgement.bound, "of_bound": 0.0 if judgement.passed and not judgement.error else ratio,
            "own_rel_l2": own, "passed": judgement.passed,
        }  # fmt: skip
        chunks = {"fast": each.fast, "reference": each.reference, "own": each.own}
        made = {**{name: actions(chunk) for name, chunk in chunks.items()}, "noise": changed}
        found.append(Checked(each, record, made))
    return found


def _try_stock(policy: Any, batch: dict[str, Any], noise: Any) -> None:
    """CommandError where stock fails too, for then the patch is not at fault."""
    try:
        with as_stock(policy):
            policy.predict_action_chunk(fresh(batch), noise=noise.clone())
    except Exception as error:
        raise subject.stock_fails(error) from error


def tier_figures(tier: Tier) -> dict[str, Any]:
    import smolvla_fast

    now, count = smolvla_fast.status(tier.policy), len(tier.frames)
    precision = tier.compared[0].tier if count else tier.name
    judgements = [each.judgement for each in tier.compared]
    found = {
        "name": f"auto ({precision})" if tier.name == "auto" else tier.name, "precision": precision,
        "backend": now.backend, "plan": now.plan, "fallback_reasons": now.fallback_reasons,
        "frames": tier.frames, "within": sum(each.passed for each in judgements),
        "stock_served": {"frames": len(tier.by_stock), "reason": tier.by_stock[-1] if tier.by_stock else None},
        "passed": count > 0 and passed_together(judgements, precision),
    }  # fmt: skip
    if not tier.frames:
        return found
    fast, reference, noise = (np.stack(tier.actions[name]) for name in ("fast", "reference", "noise"))
    own = None if tier.actions["own"][0] is None else np.stack(tier.actions["own"])
    return {**found, **differences.figures(fast, reference, own, noise)}


def worst_episode(tiers: Sequence[Tier], figures: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Chunks, side by side in time, of the episode with the largest difference that any tier makes to a joint."""
    ran = [index for index, tier in enumerate(tiers) if tier.frames]
    if not ran:
        return None
    most = max(ran, key=lambda index: differences.nan_is_worst(figures[index]["largest_share_of_noise"]))
    frames, row = tiers[most].frames, figures[most]["worst"]
    episode = frames[row]["episode"]
    rows = [index for index, each in enumerate(frames) if each["episode"] == episode]
    places, length = [frames[index]["frame"] for index in rows], len(tiers[most].actions["fast"][0])
    chosen = [rows[i] for i in differences.side_by_side(places, rows.index(row), length)]
    keys = [(episode, frames[index]["frame"]) for index in chosen]
    chunks: dict[str, list[Any]] = {}
    for index in ran:
        held = {(each["episode"], each["frame"]): i for i, each in enumerate(tiers[index].frames)}
        if all(key in held for key in keys):
            own = tiers[index].actions["fast"]
            chunks[figures[index]["name"]] = [own[held[key]].tolist() for key in keys]
    return {
        "tier": figures[most]["name"], "episode": episode, "frame": frames[row]["frame"],
        "frames": [key[1] for key in keys],
        "reference": [tiers[most].actions["reference"][index].tolist() for index in chosen], "chunks": chunks,
    }  # fmt: skip


def write(found: dict[str, Any], path: Path, console: Console) -> None:
    """JSON, pictures, Markdown and the page."""
    write_json(path, found)
    written, report = [path], path.with_suffix(".md")
    pictures: list[Path] = []
    try:
        try:
            from ..measure.difference_charts import draw

            pictures = draw(found, path) if found["worst"] else []
        except ImportError:
            console.line('no pictures: matplotlib is not installed; run `pip install "smolvla_fast[cli]"`')
        report.write_text(verify_report.markdown(found, pictures), encoding="utf-8")
        page = write_page(report, pictures)
    except OSError as reason:
        raise cannot_write(path, reason, "--json") from reason
    if page is None:
        console.line(NO_PAGE)
    for each in (*written, report, *([page] if page else []), *pictures):
        console.line(f"wrote {each}")
