"""The command line: ``smolvla-fast doctor | demo | tune | verify | encode | train | bench | serve``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from .. import __version__
from ..measure.console import CommandError, Console

DEBUG = "SMOLVLA_FAST_DEBUG"
NEEDS = {"train": "train", "encode": "train", "serve": "fleet", "bench": "bench,lerobot"}
"""The extra to install for a command; the others need "cli" at most."""

COMMANDS = {
    "doctor": "what is installed, what this machine can do, and which backend serves which op",
    "demo": "run SmolVLA stock and patched on one observation; times, error, chart",
    "tune": "measure who computes what fastest on this machine, and keep it for the next patch",
    "verify": "check the patched policy against stock, on recorded frames in the robot's units; exit status 1 if it fails",
    "encode": "fill a folder with the image tokens of a dataset, so that training does not decode its frames",
    "train": "train or fine-tune SmolVLA on a LeRobotDataset, with LeRobot's flags",
    "bench": "run the benchmark suites; JSON, Markdown, HTML and chart",
    "serve": "LeRobot's policy server with its SmolVLA policies patched",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 0 good, 1 a check failed, 2 the command could not run, 3 a check
    could not be made.

    Where a pipe closes early, as in ``doctor | head -1``, the command ends with 1 and no traceback.
    """
    try:
        try:
            return _main(argv)
        finally:
            # A closed pipe must show here: at exit, the interpreter flushes where nobody can catch the error.
            sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter still flushes the rest of the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="smolvla-fast", description="Make LeRobot's SmolVLA fast, and prove it right."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        # Modules of commands are imported on use: `doctor` must work where LeRobot is missing.
        commands.add_parser(name, help=summary, add_help=False)
    given = sys.argv[1:] if argv is None else list(argv)
    name, rest = parser.parse_args(given[:1]).command, given[1:]
    try:
        return _run(name, rest)
    except CommandError as error:
        reason = str(error)
    except KeyboardInterrupt:
        print(f"\nsmolvla-fast {name}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"
        if isinstance(error, ImportError):
            reason += f'; run `pip install "smolvla_fast[{NEEDS.get(name, "cli")}]"`'
        else:
            reason += f". This command did not foresee it; {DEBUG}=1 shows where it came from"
    print(f"smolvla-fast {name}: {reason}", file=sys.stderr)
    return 2


def _at_home(word: str) -> str:
    """A word with ``~/`` expanded, which shells leave alone in ``--flag=~/folder``. A lone ``~`` is YAML's null."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{os.path.expanduser(value) if '/' in value else value}"


def _run(name: str, rest: list[str]) -> int:
    module = import_module(f".{name}", __name__)
    command = argparse.ArgumentParser(
        prog=f"smolvla-fast {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(command)
    args, others = command.parse_known_args(map(_at_home, rest))
    if others and not getattr(module, "PASSES_ON", False):
        flag = others[0].partition("=")[0]
        near = get_close_matches(flag, command._option_string_actions, 1)
        hint = f"; did you mean {near[0]}?" if near else "; see --help"
        command.error(f"unrecognized arguments: {' '.join(others)}{hint}")
    args.passed_on = others
    return module.run(args, Console())
