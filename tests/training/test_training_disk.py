"""Disks that lack what a run uses: symbolic links, fsync of folders, rename onto what is there, room, leave to write.

What a file system does not have it answers with an error; here the system call does, for want of such a disk in a test.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from training_runs import resume, state_files

from smolvla_fast.train.checkpoint import Checkpoints
from smolvla_fast.train.log import read_log

pytestmark = pytest.mark.training


@pytest.fixture
def lacks(monkeypatch):
    """lacks(call, number, when): ``os.call`` fails from now on, for arguments of which ``when`` holds."""

    def arm(call, number, when=lambda *_: True):
        original = getattr(os, call)

        def failing(*arguments, **options):
            if when(*arguments):
                raise OSError(number, os.strerror(number), str(arguments[-1]))
            return original(*arguments, **options)

        monkeypatch.setattr(os, call, failing)

    return arm


NO_LINKS = [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EACCES]


def named(output: Path) -> str:
    return Checkpoints(output).last().name


@pytest.mark.parametrize("number", sorted(set(NO_LINKS)), ids=lambda number: errno.errorcode[number])
def test_a_disk_without_links_keeps_every_checkpoint_and_resume_finds_the_last(
    number, bench_top, tmp_path, lacks, caplog
):
    lacks("symlink", number)
    output = tmp_path / "run"
    assert bench_top.command(output, "--save_freq=1") == 0
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["000001", "000002", "last.txt"]
    assert [r.levelname for r in caplog.records if "symbolic link" in r.message] == ["WARNING"]
    assert named(output) == "000002"
    # It comes by the steps again from an earlier one: the last is what was written last, not what has most steps.
    config = output / "checkpoints" / "000001" / "pretrained_model" / "train_config.json"
    shutil.rmtree(output / "checkpoints" / "000002")
    assert resume(output, f"--config_path={config}") == 0 and named(output) == "000002"
    assert resume(output, "--steps=3") == 0 and named(output) == "000003"


@pytest.mark.parametrize("before", ["link", "copy"])
def test_a_last_from_before_the_disk_lacked_links_is_not_gone_on_from(before, finished, tmp_path, lacks):
    """A run copied from another disk: with its link, which can be made no more, or with a folder in its place."""
    output = shutil.copytree(finished, tmp_path / "run", symlinks=before == "link")
    lacks("symlink", errno.EPERM)
    assert resume(output, "--steps=5") == 0
    assert named(output) == "000005"


def test_a_link_takes_the_place_of_a_note(bench_top, tmp_path, monkeypatch, lacks):
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
        )
        assert bench_top.command(output) == 0
    assert resume(output, "--steps=3") == 0
    assert os.readlink(output / "checkpoints" / "last") == "000003" == named(output)
    assert not (output / "checkpoints" / "last.txt").exists()


def names_a_folder(descriptor, *_):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="tells folders by /proc")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_disk_that_cannot_flush_folders_is_written_to(number, bench_top, tmp_path, lacks):
    lacks("fsync", number, names_a_folder)
    assert bench_top.command(tmp_path / "run") == 0
    assert named(tmp_path / "run") == "000002"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_a_disk_that_does_not_rename_onto_what_is_there_is_written_to(number, bench_top, tmp_path, lacks):
    lacks("replace", number, lambda _, target: os.path.lexists(target))
    output = tmp_path / "run"
    assert bench_top.command(output, "--save_freq=1", "--log_freq=1") == 0
    assert resume(output, "--steps=3") == 0
    assert named(output) == "000003" and [entry["step"] for entry in read_log(output)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [
        ("symlink", errno.ENOSPC, None),  # a note of a few bytes may still fit
        ("fsync", errno.EIO, "Input/output error"),
        ("rename", errno.EROFS, "Make it writable"),
        ("rename", errno.ENOSPC, "Free some space"),
        ("rename", errno.EDQUOT, "Free some space"),
    ],
)
def test_a_disk_that_refuses_is_said_and_costs_no_checkpoint(
    call, number, says, finished, tmp_path, lacks, capsys
):
    output = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    before = state_files(output / "checkpoints" / "000004")
    lacks(call, number)
    assert resume(output, "--steps=5") == (2 if says else 0)
    message = capsys.readouterr().err
    assert says is None or (says in message and "--resume=true" in message and "000004, is whole" in message)
    assert state_files(output / "checkpoints" / "000004") == before
    assert named(output) == ("000004" if says else "000005")


@pytest.mark.parametrize("place", ["below-a-file", "below-proc", "too-long"])
def test_an_output_dir_that_cannot_be_written_is_refused_before_the_first_step(
    place, bench_top, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    places = {
        "below-a-file": tmp_path / "file" / "run",
        "below-proc": Path("/proc/run"),
        "too-long": tmp_path / ("x" * 300),
    }
    assert bench_top.command(places[place]) == 2
    message = capsys.readouterr().err
    assert f"--output_dir={places[place]} cannot be" in message and "Traceback" not in message


def test_a_folder_that_lets_nothing_be_written_is_refused_before_the_first_step(
    bench_top, tmp_path, lacks, capsys
):
    (tmp_path / "run").mkdir()
    lacks(
        "open",
        errno.EROFS,
        lambda path, flags, *_: flags & os.O_CREAT and str(path).startswith(str(tmp_path / "run")),
    )
    assert bench_top.command(tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "cannot be written to (Read-only file system); make it writable" in message
