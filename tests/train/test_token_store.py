"""Rows of image tokens: right or not known, whoever is killed where, whatever the disk does, whoever else writes."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from smolvla_fast.loss import token_store
from smolvla_fast.loss.token_store import ABOUT, ROWS, TokenStore, open_store, row_of

pytestmark = [pytest.mark.training, pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")]

SHAPE, DTYPE = (2, 3, 5), torch.bfloat16
WIDTH = row_of(SHAPE, DTYPE).itemsize
ABOUT_THIS = {"dataset": "a", "vision tower": "b", "dtype": "c", token_store.RESULT: "d"}


def tokens(frame: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(frame)).to(DTYPE)


def opened(
    folder: Path | None, frames=range(6), limit: int = 0, about=None, shape: tuple[int, ...] = SHAPE
) -> TokenStore:
    return open_store(folder, limit, np.array(frames), shape, DTYPE, {**ABOUT_THIS, **(about or {})})[0]


def states(store: TokenStore, frames=range(6)) -> list[bool]:
    """Which rows are known. Fails for a row that is wrong."""
    found = [store.read(frame) for frame in frames]
    for frame, row in zip(frames, found, strict=True):
        assert row is None or (torch.equal(row, tokens(frame)) and row.dtype is DTYPE), (
            f"row {frame} is wrong"
        )
    return [row is not None for row in found]


def damage(store: TokenStore, frame: int, at: int) -> None:
    """Flips a bit of a row, in the file."""
    with store.path.open("r+b") as file:
        file.seek(frame * WIDTH + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def in_a_process(work, before_line=None) -> int:
    """Status of a forked process that does ``work``, and ``before_line(n)`` before its n-th line, or return, in
    token_store.py."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    number = 0

    def trace(frame, event, argument):
        nonlocal number
        if frame.f_code.co_filename != token_store.__file__:
            return None
        if event in ("line", "return"):
            number += 1
            before_line(number)
        return trace

    try:
        sys.settrace(trace if before_line else None)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def killed_everywhere(work, folder, reset):
    """Yields once for each state of the folder that a killed process can leave: killed before the first line that finds it.
    A kill leaves what stands in the folder, mapped rows included, and nothing else: between two changes of it all kills are
    one. ``reset`` makes the folder what it was before ``work``."""
    reader, writer = os.pipe()
    before = None

    def tell_changes(number: int) -> None:
        nonlocal before
        now = [(path, path.is_file() and path.read_bytes()) for path in sorted(folder.rglob("*"))]
        if now != before:
            before = now
            os.write(writer, b"%d\n" % number)

    reset()
    assert in_a_process(work, tell_changes) == 0
    os.close(writer)
    with os.fdopen(reader) as told:
        numbers = [int(each) for each in told]
    for last in numbers:
        reset()
        status = in_a_process(
            work, lambda number, last=last: number == last and os.kill(os.getpid(), signal.SIGKILL)
        )
        assert status == -signal.SIGKILL
        yield last


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_rows_come_back_to_the_bit(tmp_path, where):
    store = opened(tmp_path if where == "folder" else None, limit=6 * WIDTH)
    assert states(store) == [False] * 6
    store.write(2, tokens(2))
    store.write(5, torch.zeros(SHAPE, dtype=DTYPE))
    assert torch.equal(store.read(5), torch.zeros(SHAPE, dtype=DTYPE))
    other = pickle.loads(pickle.dumps(store))  # as a worker gets it
    assert states(other, range(5)) == [False, False, True, False, False]
    other.write(0, tokens(0))
    assert states(store, range(5)) == [True, False, True, False, False]
    store.write(6, tokens(6))  # no room
    assert store.read(6) is None and len(store) == 6


@pytest.mark.parametrize("before", ["unknown", "known", "damaged"])
def test_a_kill_at_any_line_of_a_write_leaves_a_row_unknown_or_right(tmp_path, before):
    store = opened(tmp_path)
    seen = set()

    def reset() -> None:
        store._rows[3] = 0
        if before != "unknown":
            store.write(3, tokens(3))
        if before == "damaged":
            damage(store, 3, 20)

    for _ in killed_everywhere(lambda: store.write(3, tokens(3)), tmp_path, reset):
        seen.add(states(store)[3])
        store.write(3, tokens(3))
        assert states(store)[3]
    assert seen == {False, True}, "it was killed on both sides of the row's last byte"


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("written", range(0, WIDTH - 8, 7))
def test_a_row_of_which_a_part_was_written_is_unknown(tmp_path, before, written):
    """The state between two bytes of the copy, which no line of Python sees: unknown, whatever checksum stands there."""
    store = opened(tmp_path)
    store.write(3, tokens(3))
    whole = store._rows[3]["tokens"].copy()
    for checksum in (0, int(store._rows[3]["checksum"])):
        store._rows[3]["tokens"] = [*whole[:written], *[before] * (len(whole) - written)]
        store._rows[3]["checksum"] = checksum
        assert states(store) == [False] * 6
    store.write(3, tokens(3))
    assert states(store)[3]


@pytest.mark.parametrize(("before", "states_left"), [("nothing", 5), ("opened", 3)])
def test_a_kill_at_any_line_of_opening_leaves_what_opens_again(tmp_path, before, states_left):
    folder, killed = tmp_path / "all", []

    def reset() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if before == "opened":
            opened(folder).write(0, tokens(0))

    for line in killed_everywhere(lambda: opened(folder).write(1, tokens(1)), folder, reset):
        killed.append(line)
        store = opened(folder)
        assert states(store)[0] is (before == "opened")
        store.write(0, tokens(0))
        assert states(store)[0] and len(list(folder.glob(f"*/{ABOUT}"))) == 1
    assert len(killed) >= states_left, killed


def test_a_damaged_row_is_unknown_and_written_again(tmp_path):
    store = opened(tmp_path)
    for frame in range(6):
        store.write(frame, tokens(frame))
    damage(store, 1, 0)  # its checksum
    damage(store, 4, WIDTH - 1)
    assert states(store) == [True, False, True, True, False, True]
    store.write(4, tokens(4))
    assert states(opened(tmp_path)) == [True, False, True, True, True, True]


def test_two_processes_at_once_leave_right_rows(tmp_path):
    """Both open, write and read the same rows, over and over; what they read is right or not known."""

    def work() -> None:
        store = opened(tmp_path)
        for turn in range(60):
            store.write(turn % 6, tokens(turn % 6))
            states(store)

    pid = os.fork()
    if not pid:
        os._exit(0 if in_a_process(work) == 0 else 1)
    assert in_a_process(work) == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert states(opened(tmp_path)) == [True] * 6 and len(list(tmp_path.glob(f"*/{ROWS}"))) == 1


def test_a_limit_keeps_the_first_frames_that_are_read(tmp_path):
    store, words = open_store(tmp_path, 3 * WIDTH, np.array([2, 3, 8, 9]), SHAPE, DTYPE, dict(ABOUT_THIS))
    assert "4 frames x 68 bytes (2 cameras) = 2.72e-07 GB, room for the first 3" in words
    for frame in (2, 3, 8, 9):
        store.write(frame, tokens(frame))
    assert states(store, (2, 3, 8, 9)) == [True, True, True, False]
    wider = opened(tmp_path, frames=(8, 9, 10))
    assert states(wider, (2, 8, 9, 10)) == [True, True, False, False]
    wider.write(10, tokens(10))
    assert states(wider, (2, 8, 9, 10)) == [True, True, False, True]


@pytest.mark.parametrize("folder", [True, False])
def test_less_than_one_row_is_refused(tmp_path, folder):
    with pytest.raises(OSError, match=r"6 frames x 68 bytes \(2 cameras\) = .* not one fits into 20 bytes"):
        opened(tmp_path if folder else None, limit=20)


def test_a_disk_without_room_is_said_before_anything_is_taken(tmp_path):
    """More than any disk has; then less than the disk has and more than this process may write."""
    with pytest.raises(OSError, match=r"12,000,000 frames .* GB are free"):
        opened(tmp_path, frames=np.arange(12_000_000), shape=(2, 64, 96_000))
    assert not [path for path in tmp_path.rglob(ROWS) if path.stat().st_size]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * WIDTH, before[1]))
    try:
        with pytest.raises(OSError, match="6 frames .* File too large"):
            opened(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert states(opened(tmp_path)) == [False] * 6


def test_memory_without_room_is_said():
    with pytest.raises(OSError, match="12,000,000 frames .* GB are free"):
        opened(None, frames=np.arange(12_000_000), limit=10**18, shape=(2, 64, 96_000))


def test_space_is_taken_at_once(tmp_path):
    """A hole in the file would be filled at a write to the map, which a full disk answers with a signal."""
    store = opened(tmp_path, frames=range(4096))
    assert store.path.stat().st_blocks * 512 >= 4096 * WIDTH


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        opened(tmp_path / "file")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"dataset": "x"}, "dataset"),
        ({"dtype": "x", token_store.RESULT: "x"}, "dtype"),
        ({"dtype": "x", "vision tower": "x"}, "vision tower and dtype"),
        ({token_store.RESULT: "x"}, "preparation of frames or arithmetic"),
    ],
)
def test_other_tokens_have_another_key_and_a_line_says_why(tmp_path, caplog, changed, said):
    opened(tmp_path).write(0, tokens(0))
    assert states(opened(tmp_path))[0] and not caplog.text
    far = opened(tmp_path, about=dict.fromkeys(ABOUT_THIS, "far"))
    far.write(0, tokens(7))
    caplog.clear()
    store = opened(tmp_path, about=changed)
    assert store.read(0) is None
    near = opened(tmp_path).path.parent
    assert (
        f"not the same {said} as in {near}: frames are encoded anew" in caplog.text
    )  # the one that is most alike
    caplog.clear()
    opened(tmp_path, about=changed)
    assert not caplog.text


def test_a_folder_that_says_nothing_readable_is_another(tmp_path, caplog):
    place = opened(tmp_path).path.parent
    (place / ABOUT).write_text("{")
    opened(tmp_path, about={"dtype": "x"})
    assert "not the same dataset and vision tower and dtype as in" in caplog.text
    assert (
        json.loads((opened(tmp_path, about={"dtype": "x"}).path.parent / ABOUT).read_text())["dtype"] == "x"
    )
