"""A LeRobot release that nobody has read: copies of its source in a package of their own, with changes."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lerobot.policies as installed

FILES = (
    "smolvla/modeling_smolvla.py", "smolvla/smolvlm_with_expert.py", "rtc/modeling_rtc.py", "common/vla_utils.py",
    "common/flow_matching.py",
)  # fmt: skip
IS_THERE = all((Path(installed.__file__).parent / name).is_file() for name in FILES)
"""Whether the installed release has its source in the files of 0.6."""
_numbers = itertools.count()


def next_release(folder: Path, *changes: tuple[str, str]) -> SimpleNamespace:
    """The classes of a copy with each text, which stands in one file alone, replaced by the other."""
    name = f"lerobot_next_{next(_numbers)}"
    (folder / name).mkdir()
    sources = {
        Path(each).name: (Path(installed.__file__).parent / each).read_text(encoding="utf-8")
        for each in FILES
    }
    for old, new in changes:
        found = [file for file, text in sources.items() if text.count(old) == 1]
        assert len(found) == 1, f"{old!r} stands once in {found}"
        sources[found[0]] = sources[found[0]].replace(old, new)
    for file, text in sources.items():
        for room in ("common", "rtc"):
            text = text.replace(f"from ..{room}.", "from .")
        text = text.replace("from .configuration_rtc", "from lerobot.policies.rtc.configuration_rtc")
        text = text.replace("from .debug_tracker", "from lerobot.policies.rtc.debug_tracker")
        text = text.replace(
            "from .configuration_smolvla", "from lerobot.policies.smolvla.configuration_smolvla"
        )
        (folder / name / file).write_text(text.replace("from ..", "from lerobot.policies."), encoding="utf-8")
    (folder / name / "__init__.py").write_text("")
    sys.path.insert(0, str(folder))
    try:
        modules = [importlib.import_module(f"{name}.{Path(file).stem}") for file in FILES]
    finally:
        sys.path.remove(str(folder))
    return SimpleNamespace(**{key: value for each in modules for key, value in vars(each).items()})


def under(release: SimpleNamespace, policy: Any) -> Any:
    """The policy with the classes of another release."""
    model = policy.model
    model.__class__, model.vlm_with_expert.__class__ = release.VLAFlowMatching, release.SmolVLMWithExpertModel
    if model.rtc_processor is not None:
        model.rtc_processor.__class__ = release.RTCProcessor
    return policy
