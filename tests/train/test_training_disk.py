"""Disks that lack what a run uses: symbolic links, fsync of folders, rename onto what is there, room, leave to write.

What a file system does not have it answers with an error; here the system call does, for want of such a disk in a test.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from support.training_runs import resume

from smolvla_fast.train import TrainingError
from smolvla_fast.train.checkpoint import PRETRAINED, STATE, Checkpoints
from smolvla_fast.train.disk import replace
from smolvla_fast.train.log import Log, read_log

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


def save(output: Path, step: int) -> None:
    """A checkpoint of two small files, through all that a run's goes through."""

    def write(folder: Path) -> None:
        for part in (PRETRAINED, STATE):
            (folder / part).mkdir()
            (folder / part / "file").write_text(str(step))

    Checkpoints(output).save(step, 9, write)


NO_LINKS = [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EACCES]


def named(output: Path) -> str:
    return Checkpoints(output).last().name


@pytest.mark.parametrize("number", sorted(set(NO_LINKS)), ids=lambda number: errno.errorcode[number])
def test_a_disk_without_links_keeps_every_checkpoint_and_the_last_is_found(number, tmp_path, lacks, caplog):
    lacks("symlink", number)
    for step in (1, 2, 3):
        save(tmp_path, step)
        assert named(tmp_path) == f"{step:06d}"
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["000001", "000002", "000003", "last.txt"]
    assert "000003" not in caplog.text and "symbolic link" in caplog.text
    # It comes by a step again from an earlier one: the last is what was written last, not what has most steps.
    save(tmp_path, 2)
    assert named(tmp_path) == "000002"


def test_a_run_on_a_disk_without_links_trains_and_resumes(bench_top, tmp_path, lacks, caplog):
    lacks("symlink", errno.EPERM)
    assert bench_top.command(tmp_path / "run", "--save_freq=1") == 0
    assert [r.levelname for r in caplog.records if "symbolic link" in r.message] == ["WARNING"]
    assert resume(tmp_path / "run", "--steps=3") == 0 and named(tmp_path / "run") == "000003"


@pytest.mark.parametrize("before", ["link", "copy"])
def test_a_last_from_before_the_disk_lacked_links_is_not_gone_on_from(before, finished, tmp_path, lacks):
    """A run copied from another disk: with its link, which can be made no more, or with a folder in its place."""
    output = shutil.copytree(finished, tmp_path / "run", symlinks=before == "link")
    lacks("symlink", errno.EPERM)
    assert resume(output, "--steps=5") == 0
    assert named(output) == "000005"


def test_a_link_takes_the_place_of_a_note(tmp_path, monkeypatch, lacks):
    with monkeypatch.context() as patched:
        patched.setattr(
            os, "symlink", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.EPERM, "no links"))
        )
        save(tmp_path, 2)
    save(tmp_path, 3)
    assert os.readlink(tmp_path / "checkpoints" / "last") == "000003" == named(tmp_path)
    assert not (tmp_path / "checkpoints" / "last.txt").exists()


def names_a_folder(descriptor, *_):
    return os.path.isdir(f"/proc/self/fd/{descriptor}")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="tells folders by /proc")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_a_disk_that_cannot_flush_folders_is_written_to(number, tmp_path, lacks):
    lacks("fsync", number, names_a_folder)
    save(tmp_path, 2)
    assert named(tmp_path) == "000002"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.EACCES])
def test_a_disk_that_does_not_rename_onto_what_is_there_is_written_to(number, tmp_path, lacks):
    lacks("replace", number, lambda _, target: os.path.lexists(target))
    for step in (1, 2):
        save(tmp_path, step)
        log = Log(tmp_path, step - 1, every=1)
        log.write(step, {})
    assert named(tmp_path) == "000002" and [entry["step"] for entry in read_log(tmp_path)] == [1, 2]


def test_what_cannot_be_replaced_stays(tmp_path, lacks):
    new, kept, folder = tmp_path / "new", tmp_path / "kept", tmp_path / "folder"
    new.write_text("new")
    folder.mkdir()
    with pytest.raises(OSError):
        replace(new, folder)
    kept.write_text("kept")
    lacks("replace", errno.ENOSPC)
    with pytest.raises(OSError):
        replace(new, kept)
    assert kept.read_text() == "kept" and folder.is_dir() and new.read_text() == "new"


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
def test_a_disk_that_refuses_is_said_and_costs_no_checkpoint(call, number, says, tmp_path, lacks):
    save(tmp_path, 4)
    lacks(call, number)
    if says is None:
        save(tmp_path, 5)
        assert named(tmp_path) == "000005"
        return
    with pytest.raises(TrainingError, match=f"000004, is whole.*{says}" if says[0] in "MF" else says):
        save(tmp_path, 5)
    assert named(tmp_path) == "000004"
    assert (tmp_path / "checkpoints" / "000004" / STATE / "file").read_text() == "4"


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


def test_a_resumed_run_says_that_its_output_dir_is_a_file(finished, tmp_path, capsys):
    from smolvla_fast.cli import main

    (tmp_path / "file").write_text("kept")
    config = finished / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    flags = [f"--config_path={config}", f"--output_dir={tmp_path / 'file'}"]
    assert main(["train", "--resume=true", "--steps=5", *flags]) == 2
    assert f"{tmp_path / 'file'} is a file; give another" in capsys.readouterr().err


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
