"""README and docs: commands that exist, links that lead somewhere, figures that stand in the page of figures."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from support.train_steps import make_batch

import smolvla_fast
from smolvla_fast import cli
from smolvla_fast.testing.policies import make_observation, make_policy

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
ELSEWHERE = ("lerobot-rollout", "lerobot-train", "lerobot-eval", "pre-commit", "accelerate", "torchrun")
"""Others' commands; tests/acceptance/test_plugin.py runs the README's, tests/train those of training."""


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a shell block, continued lines joined, and of commands in prose."""
    found = []
    for page, text in TEXTS.items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, line) for line in lines if line.strip()]
        found += [(page, line) for line in re.findall(r"`((?:make|smolvla-fast|pip) [^`]*)`", text)]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_exists_and_takes_these_flags(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    while "=" in words[0]:  # variables of its environment
        words.pop(0)
    program, rest = words[0], words[1:]
    if program == "make":
        assert {word for word in rest if "=" not in word} <= MAKE, f"{page}: no such target"
    elif program == "pip":
        asked = re.findall(r"(?:\.|smolvla_fast)\[([\w,]+)\]", command)  # of LeRobot's own it knows none
        assert {name for names in asked for name in names.split(",")} <= EXTRAS.keys(), (
            f"{page}: no such extra"
        )
    elif program == "pytest":
        for word in rest:
            assert not word.startswith("tests/") or (ROOT / word).exists(), f"{page}: {word} is not there"
    elif program == "smolvla-fast":
        assert rest[0] in cli.COMMANDS, f"{page}: no such command"
        if "..." not in rest and rest[0] != "serve":  # the server reads its own flags
            parser = argparse.ArgumentParser(allow_abbrev=False)
            import_module(f"smolvla_fast.cli.{rest[0]}").add_arguments(parser)
            parser.parse_args(rest[1:] or [])
    else:
        assert program in ELSEWHERE, f"{page}: who runs {program!r}?"


PYTHON = {
    "README.md": (1, 0),
    "docs/fallbacks.md": (1, 0),
    "docs/layers.md": (1, 0),
    "docs/training.md": (1, 1),
    "docs/trial.md": (1, 0),
}
"""Pages with Python, and the chunks and losses that the engine has served after their blocks and one chunk."""


def test_every_page_with_python_is_run() -> None:
    """docs/standalone.md shows examples/standalone.py, which tests/smolvla runs."""
    assert {page for page, text in TEXTS.items() if "```python" in text} == {*PYTHON, "docs/standalone.md"}


@pytest.mark.parametrize("page", PYTHON)
def test_the_python_of_a_page_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block, on a tiny policy of LeRobot's class and a batch."""
    modeling = pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla")
    policy = make_policy("tiny", num_steps=1)
    if page == "README.md":
        monkeypatch.setattr(modeling.SmolVLAPolicy, "from_pretrained", lambda name: policy)
    else:
        smolvla_fast.patch(policy)
    names = {"smolvla_fast": smolvla_fast, "policy": policy, "batch": make_batch(policy)}
    for block in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL):
        exec(compile(block, page, "exec"), names)
    policy.predict_action_chunk(make_observation(policy))
    now = smolvla_fast.status(policy)
    assert (now.calls_fast, now.training_fast) == PYTHON[page], (now.last_fallback, now.training_fallback)


@pytest.mark.parametrize("page", TEXTS)
def test_a_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_a_path_in_the_text_is_there(page: str) -> None:
    rooms = "benchmarks|csrc|docs|examples|kernels|plugin|scripts|smolvla_fast|tests"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]*)`", TEXTS[page]):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_the_readme_is_read_in_one_go() -> None:
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 120


def test_the_readmes_figures_stand_in_the_page_of_figures() -> None:
    rows = re.findall(
        r"^\| [^|]*\| (`\w+`) \| ([\d,.]+) \| ([^|]*) \| ([^|]*) \|$", TEXTS["README.md"], re.MULTILINE
    )
    assert len(rows) == 7
    for tier, p50, ratio, error in rows:
        assert re.search(
            rf"{re.escape(tier)} \| {p50} \| [\d,.]+ \| {ratio} \| {re.escape(error)} \|",
            TEXTS["docs/figures.md"],
        )


def test_every_page_is_in_the_index() -> None:
    index = TEXTS["docs/README.md"]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"\((\w[\w-]*\.md)\)", index))
