"""What ``make train-demo`` does around the training: which folders it empties, and whether its run was really killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.training


def test_only_a_folder_of_its_own_is_emptied(demo, tmp_path, capsys):
    theirs = tmp_path / "outputs"
    theirs.mkdir()
    (theirs / "precious").write_text("kept")
    assert demo.main(theirs) == 2
    assert (theirs / "precious").read_text() == "kept" and list(theirs.iterdir()) == [theirs / "precious"]
    assert "has not written" in capsys.readouterr().err

    for fresh in (tmp_path / "new" / "demo", tmp_path):
        assert demo.cleared(fresh) is (fresh != tmp_path)
    (tmp_path / "new" / "demo" / "run").mkdir()
    assert demo.cleared(tmp_path / "new" / "demo")  # the second time it is the demo's
    assert [p.name for p in (tmp_path / "new" / "demo").iterdir()] == [demo.MARKER]


def test_help_is_printed_and_nothing_is_trained(demo, tmp_path):
    command = [sys.executable, demo.__file__, "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "[FOLDER]" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_ended_by_itself_was_not_killed(demo, tmp_path, capfd):
    saved = tmp_path / "run" / "checkpoints" / "000200" / "training_state"
    assert not demo.kill_once_saved(["sh", "-c", "exit 3"], tmp_path / "run")  # before it had saved
    assert "ended by itself, with status 3" in capfd.readouterr().err
    assert demo.kill_once_saved(["sh", "-c", f"mkdir -p {saved}; exec sleep 60"], tmp_path / "run")
    assert "killed; the last whole checkpoint is" in capfd.readouterr().out
