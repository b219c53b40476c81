"""Finds statistics under the names that LeRobot gave them before version 0.4.

They lay among the weights, as ``normalize_inputs.buffer_observation_state.mean``; in some checkpoints there is one set per
robot type: ``unnormalize_outputs.so100-red_buffer_action.std``. Migrated ones can be called ``so100.buffer.action``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

MODULES = r"(?:un)?normalize(?:_inputs|_targets|_outputs)?|(?:in|out)put_normalizer|normalizer"
_BUFFER = re.compile(rf"(?:(?:{MODULES})\.|(?:.*[._])?buffer[._]).*\b(?:mean|std|min|max|count|q\d\d)$")
_PAIRS = ({"mean", "std"}, {"min", "max"}, {"q01", "q99"}, {"q10", "q90"})


def robot_type(name: str, feature: str) -> str | None:
    """The robot type in a name of a feature's statistics: ``so100`` in ``so100.buffer.action`` for ``action``.

    Empty where the name has none; None for a name of another feature.
    """
    plain, wanted = (re.sub(r"[^a-z0-9]", "_", text.lower()) for text in (name, feature))
    if plain == wanted:
        return ""
    if not plain.endswith(f"_{wanted}"):
        return None
    prefix = name[: -len(wanted) - 1]
    prefix = re.sub(rf"^(?:{MODULES})(?:[._]|$)", "", prefix)
    prefix = re.sub(r"(?:^|[._])buffer$", "", prefix)
    # What follows "buffer" or "observation" is the name of a longer feature.
    return None if re.search(r"buffer|(?:^|[._])observation(?:[._]|$)", prefix, re.IGNORECASE) else prefix


def other_names(feature: str, names: Iterable[str], file: str | None = None) -> str:
    """The end of a message: names that look like this feature's, and what to do about them. Empty where there are none.

    file  the file to mend; None: the statistics came as ``dataset_stats``
    """
    found = {name: robot_type(name, feature) for name in names if name != feature}
    found = {name: robot for name, robot in found.items() if robot is not None}
    if not found:
        return ""
    shown = ", ".join(
        f"{name!r}" + (f" of robot type {robot!r}" if robot else "") for name, robot in sorted(found.items())
    )
    which = "them" if len(found) == 1 else "those of your robot"
    if file is None:
        return f"; like it are {shown}: if they are meant, pass {which} as dataset_stats={{{feature!r}: ...}}"
    entry = "that entry" if len(found) == 1 else "that of your robot"
    return f"; like it are {shown}: if they are meant, rename {entry} to {feature!r} in {file}"


def split_buffers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Splits tensors into weights, and statistics by the name of their buffer.

    An incomplete buffer, such as a mean without std, stays among the weights, where strict loading refuses it.
    """
    buffers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        stem, _, statistic = name.rpartition(".")
        if is_buffer(name):
            buffers.setdefault(stem, {})[statistic] = value
    whole = {stem: entry for stem, entry in buffers.items() if any(pair <= set(entry) for pair in _PAIRS)}
    taken = {f"{stem}.{statistic}" for stem, entry in whole.items() for statistic in entry}
    return {name: value for name, value in tensors.items() if name not in taken}, whole


def is_buffer(name: str) -> bool:
    """Whether a tensor of a weights file is a statistic."""
    return _BUFFER.match(name) is not None


def buffers_to_stats(
    buffers: Mapping[str, Mapping[str, Tensor]], features: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Statistics by feature; for features whose buffers differ, the robot types to choose from.

    Inputs, targets and outputs had separate buffers; equal ones count once.
    """
    stats: dict[str, dict[str, Any]] = {}
    unclear: dict[str, str] = {}
    for feature in features:
        found = {name: robot_type(name, feature) for name in buffers}
        names = [name for name, robot in found.items() if robot is not None]
        if not names:
            continue
        first = buffers[names[0]]
        if all(_equal(first, buffers[name]) for name in names[1:]):
            stats[feature] = dict(first)
        else:
            unclear[feature] = ", ".join(sorted({found[name] or name for name in names}))
    return stats, unclear


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
