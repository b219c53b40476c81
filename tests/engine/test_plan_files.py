"""Plans on disk: found for their own key alone, whole or not at all, and never a reason to fail."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from support.policies import LEROBOT_ONLY, make_policy
from support.processors import play

from smolvla_fast.engine import plan_files, plan_key
from smolvla_fast.ops import extension
from smolvla_fast.ops.plan import Plan

pytestmark = LEROBOT_ONLY
ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CHOICES = {"linear 2048 768>3072 float32 gelu_tanh": "onednn", "attention 1024x12x64": "triton 64x64 w4"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(plan_files.CACHE_DIR, str(tmp_path / "cache"))
    monkeypatch.setattr(plan_files, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(plan_files, "_logged", set())
    return tmp_path / "cache" / "plans"


@pytest.fixture
def key() -> dict[str, Any]:
    return plan_key.key_of(make_policy("tiny").model, "fp32", "auto", CPU)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.DEBUG, logger="smolvla_fast"):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_a_saved_plan_is_found_with_its_date_and_its_file(key: dict[str, Any], said: Any) -> None:
    assert plan_files.find(key) == (None, None)
    path = plan_files.save(key, Plan(CHOICES), {"seconds": 3.5})
    assert path == plan_files.path_of(key) and json.loads(path.read_text())["record"] == {"seconds": 3.5}
    assert plan_files.find(key) == (Plan(CHOICES, str(path), plan_files.today().isoformat()), None)
    later = plan_files.save(key, Plan({}, measured="2020-02-29"), {})
    assert later == path and plan_files.find(key)[0] == Plan({}, str(path), "2020-02-29")
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing is left aside"
    assert not said()


def test_the_users_plan_goes_before_the_shipped_one(key: dict[str, Any], said: Any) -> None:
    mine = plan_files.save(key, Plan(CHOICES, measured="2026-01-02"), {})
    plan_files.SHIPPED.mkdir()
    shipped = plan_files.SHIPPED / mine.name
    shipped.write_text(mine.read_text().replace("onednn", "mkl"))
    assert plan_files.find(key)[0].choices == CHOICES
    mine.write_text("torn")
    plan, wrong = plan_files.find(key)
    assert plan.origin == "shipped" and "mkl" in plan.choices.values() and str(mine) in wrong
    mine.unlink()
    assert plan_files.find(key) == (plan, None)
    shipped.unlink()
    assert plan_files.find(key) == (None, None)
    assert len(said()) == 1


# Damaged --------------------------------------------------------------------------------------------------------------


def content(**changes: Any) -> Callable[[Path], None]:
    """Other values in the file; None takes one away."""

    def damage(path: Path) -> None:
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return damage


def data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(change(path.read_bytes())), None)[1]


def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def cache_is_a_file(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()
    path.parent.write_text("")


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def deep_key(depth: int) -> Callable[[Path], None]:
    """Deep enough to be read, perhaps, and too deep to be compared or shown."""
    start, end = b'{"format": 1, "choices": {}, "measured": "2026-01-01", "key": {"threads": ', b"}}"
    return lambda path: (path.write_bytes(start + nested(depth) + end), None)[1]


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (data(lambda x: b""), "torn"),
    "half": (data(lambda x: x[: len(x) // 2]), "torn"),
    "all but the end": (data(lambda x: x[:-1]), "torn"),
    "zeros, as after a power cut": (data(lambda x: bytes(len(x))), "torn"),
    "bytes": (data(lambda x: b"\xff\xfe\x00" + x), "torn"),
    "text behind it": (data(lambda x: x + b"}"), "torn"),
    "nesting": (data(lambda x: nested(200_000)), "torn"),
    **{f"a key of {n} brackets": (deep_key(n), "another machine's|torn|recursion") for n in (300, 900, 960, 980, 3000)},
    "a number of ten thousand digits": (data(lambda x: b"1" * 10_000), "torn|holds a int"),
    "too large": (data(lambda x: x + b" " * plan_files.MAX_BYTES), "MiB"),
    "a list": (data(lambda x: b"[" + x + b"]"), "holds a list"),
    "null": (data(lambda x: b"null"), "holds a NoneType"),
    "a string": (data(lambda x: b'"plan"'), "holds a str"),
    "another format": (content(format=2), "its format is 2"),
    "no format": (content(format=None), "its format is None"),
    "a format that is true": (content(format=True), "its format is True"),
    "a format in words": (content(format="1"), "its format is 1"),
    "no key": (content(key=None), "no key"),
    "a key that is a list": (content(key=[1]), "no key"),
    "an empty key": (content(key={}), "another machine's"),
    "no choices": (content(choices=None), "no object"),
    "choices in a list": (content(choices=["onednn"]), "no object"),
    "choices without end": (content(choices={f"op {i}": "a" for i in range(20_000)}), "no object"),
    "a number for a candidate": (content(choices={"linear": 3}), "linear: 3 is not of two names"),
    "an object for a candidate": (content(choices={"linear": {"run": "rm"}}), "not of two names"),
    "null for a candidate": (content(choices={"linear": [None]}), "not of two names"),
    "a path for a candidate": (content(choices={"linear": "/tmp/evil.so"}), "not of two names"),
    "a module for a candidate": (content(choices={"linear": "__import__('os')"}), "not of two names"),
    "a parent folder for a candidate": (content(choices={"linear": "../evil"}), "not of two names"),
    "an empty candidate": (content(choices={"linear": ""}), "not of two names"),
    "a candidate of two lines": (content(choices={"linear": "onednn\nroot logged in"}), "not of two names"),
    "a long candidate": (content(choices={"linear": "a" * 1000}), "not of two names"),
    "a candidate that is no text": (content(choices={"linear": "\ud800"}), "not of two names"),
    "an empty op": (content(choices={"": "onednn"}), "not of two names"),
    "no date": (content(measured=None), "its date is None"),
    "a date that is none": (content(measured="2026-02-30"), "its date is 2026-02-30"),
    "a date in words": (content(measured="yesterday"), "its date is yesterday"),
    "a number for a date": (content(measured=20260101), "its date is 20260101"),
    "a folder": (instead(lambda p: p.mkdir()), "no file"),
    "a link to itself": (instead(lambda p: p.symlink_to(p)), "cannot be read"),
    "a link to a folder": (instead(lambda p: p.symlink_to(p.parent)), "no file"),
    "a link to what never ends": (instead(lambda p: p.symlink_to("/dev/zero")), "no file"),
    "a pipe that nobody writes": (instead(lambda p: os.mkfifo(p)), "no file"),
    "a cache folder that is a file": (cache_is_a_file, "cannot be read: Not a directory"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_file_that_is_no_plan_is_ignored_and_said_once(name: str, key: dict[str, Any], said: Any) -> None:
    damage, why = DAMAGE[name]
    path = plan_files.save(key, Plan(CHOICES), {})
    damage(path)
    for _ in range(3):
        plan, wrong = plan_files.find(key)
        assert plan is None and str(path) in wrong
        assert any(word in wrong for word in why.split("|")), wrong
    [line] = said()
    assert wrong in line and "smolvla-fast tune" in line and len(line) < 1000 and line.isprintable()
    for row in plan_files.listing()[0]:
        assert row["reason"], "doctor does not call it a plan either"


def test_a_link_to_a_plan_is_a_plan(key: dict[str, Any], tmp_path: Path) -> None:
    path = plan_files.save(key, Plan(CHOICES), {})
    path.rename(tmp_path / "kept.json")
    path.symlink_to(tmp_path / "kept.json")
    assert plan_files.find(key)[0].choices == CHOICES
    plan_files.save(key, Plan({}), {})
    assert not path.is_symlink() and plan_files.find(key)[0].choices == {}


DENIED = """
import json, os, sys
sys.dont_write_bytecode = True
from smolvla_fast.engine import plan_files
from smolvla_fast.ops.plan import Plan
key = json.loads(sys.stdin.read())
plan_files.listing()  # imports what it needs while this user may read it
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
print(plan_files.find(key))
for act in (plan_files.check_writable, lambda: plan_files.save(key, Plan({}), {})):
    try:
        print("written", act())
    except plan_files.CannotSave as error:
        print(error)
print(plan_files.listing()[0][0]["reason"])
"""


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users as Unix has them")
def test_what_may_not_be_read_or_written_is_a_sentence(
    key: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nobody where this user is root, to whom nothing is denied."""
    with TemporaryDirectory() as name:  # pytest's own folders are closed to others
        os.chmod(name, 0o755)
        monkeypatch.setenv(plan_files.CACHE_DIR, name)
        path = plan_files.save(key, Plan(CHOICES), {})
        path.chmod(0)
        path.parent.chmod(0o555)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", DENIED],
            input=json.dumps(key),
            capture_output=True,
            text=True,
            env=environment,
        )
        path.parent.chmod(0o755)
    assert done.returncode == 0, done.stderr
    found, checked, saved, listed = done.stdout.splitlines()
    assert found.startswith("(None, ") and "Permission denied" in found and "Permission denied" in listed
    for line, what in ((checked, path.parent), (saved, path)):
        assert (
            line
            == f"cannot write {what}: Permission denied; set SMOLVLA_FAST_CACHE_DIR to a folder that can be written"
        )
    assert f"ignored the plan {path}: it cannot be read: Permission denied" in done.stderr


@pytest.mark.parametrize(
    "wish",
    ["/proc/no/cache", "FILE/cache", "FILE", "~no-such-user-of-this-machine/x", "/dev/full", "x" * 5000],
)
def test_a_cache_folder_that_cannot_be_is_a_sentence(
    wish: str, key: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "FILE").write_text("kept")
    monkeypatch.setenv(plan_files.CACHE_DIR, wish.replace("FILE", str(tmp_path / "FILE")))
    for act in (plan_files.check_writable, lambda: plan_files.save(key, Plan({}), {})):
        with pytest.raises(plan_files.CannotSave, match="set SMOLVLA_FAST_CACHE_DIR to a folder"):
            act()
    assert plan_files.find(key)[0] is None and plan_files.listing()[0] == []
    assert (tmp_path / "FILE").read_text() == "kept"


def test_looking_whether_it_can_be_written_leaves_nothing(folder: Path) -> None:
    assert plan_files.check_writable() == folder and list(folder.iterdir()) == []


def test_the_users_cache_folder_is_the_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(plan_files.CACHE_DIR)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_files.cache_folder() == tmp_path / "smolvla_fast"
    monkeypatch.setenv(plan_files.CACHE_DIR, "")
    assert plan_files.cache_folder() == tmp_path / "smolvla_fast", "empty is not set"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    with pytest.raises(
        plan_files.CannotSave, match="platformdirs is not installed; set SMOLVLA_FAST_CACHE_DIR"
    ):
        plan_files.cache_folder()
    assert plan_files.find({"device": {"name": "x"}, "tier": "fp32"})[0] is None


@pytest.mark.parametrize("plan", [Plan({"a": "/b"}), Plan({"a": "b"}, measured="soon"), Plan({"": "b"})])
def test_what_would_not_be_found_is_not_saved(plan: Plan, key: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ValueError, match="this is no plan"):
        plan_files.save(key, plan, {})
    assert not folder.exists()


def test_a_record_that_is_too_long_is_left_out(key: dict[str, Any]) -> None:
    path = plan_files.save(key, Plan(CHOICES), {"rounds": "1" * plan_files.MAX_BYTES})
    assert "record" not in json.loads(path.read_text()) and plan_files.find(key)[0].choices == CHOICES


# Another key ----------------------------------------------------------------------------------------------------------


def leaves(value: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from leaves(each, (*where, name))
    else:
        yield where


def changed(key: dict[str, Any], where: tuple[str, ...]) -> dict[str, Any]:
    """The same key but for one value."""
    found = copy.deepcopy(key)
    inner = found
    for name in where[:-1]:
        inner = inner[name]
    value = inner[where[-1]]
    inner[where[-1]] = (
        [*value, "more"] if isinstance(value, list) else value + 1 if isinstance(value, int) else f"{value}0"
    )
    return found


def test_a_plan_is_for_its_own_key_alone(key: dict[str, Any], said: Any) -> None:
    """Every value of the key in turn: its file has another name, and under this name it is foreign."""
    plan_files.save(key, Plan(CHOICES), {})
    names = list(leaves(key))
    assert {where[0] for where in names} == {"device", "threads", "versions", "shapes", "tier", "backend"}
    for where in names:
        other = changed(key, where)
        assert plan_files.find(other) == (None, None), where
        plan_files.path_of(key).rename(plan_files.path_of(other))
        plan, wrong = plan_files.find(other)
        assert plan is None and f"another machine's or policy's: {'.'.join(where)} (" in wrong
        assert wrong in said()[-1]
        plan_files.path_of(other).rename(plan_files.path_of(key))
    assert plan_files.find(key)[0].choices == CHOICES


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("expert_width", dict(size="tiny", expert_width_multiplier=0.5)),
        ("weights", dict(size="tiny", layout="mixed")),
        ("weights", dict(size="tiny", layout="bf16_text")),
        ("layers", dict(size="tiny", num_vlm_layers=2)),
    ],
)  # fmt: skip
def test_another_policy_has_another_key(part: str, settings: dict[str, Any], key: dict[str, Any]) -> None:
    other = plan_key.key_of(make_policy(**settings).model, "fp32", "auto", CPU)
    assert other["shapes"][part] != key["shapes"][part]
    assert plan_files.path_of(other) != plan_files.path_of(key)


def test_other_weights_cameras_and_steps_have_the_same_key(key: dict[str, Any]) -> None:
    other = make_policy("tiny", seed=7, cameras=3, num_steps=3).model
    assert plan_key.key_of(other, "fp32", "auto", CPU) == key
    assert plan_key.key_of(other.vlm_with_expert, "fp32", "auto", CPU) == key, (
        "a layer finds its chunk's plan"
    )


def test_the_key_follows_the_machine_and_its_software(monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan_key.here(CPU)
    assert before["threads"] == 1
    torch.set_num_threads(2)
    assert plan_key.here(CPU) == {**before, "threads": 2}
    torch.set_num_threads(1)
    with monkeypatch.context() as other:
        play(other, "Zen 1")
        zen = plan_key.machine_key(CPU)
        assert zen["features"] == ["AVX2", "FMA", "F16C"]
    with monkeypatch.context() as other:
        other.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
        assert plan_key.machine_key(CPU)["features"] == []
    with monkeypatch.context() as other:
        other.setattr(extension, "available", lambda kind: False)
        assert plan_key.machine_key(CPU)["level"] is None
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "9.9.9+cu999")
        other.setattr("smolvla_fast.__version__", "7.0")
        assert plan_key.here(CPU)["versions"] == {"torch": "9.9.9", "smolvla_fast": "7.0"}
    with monkeypatch.context() as other:
        other.setattr(torch.version, "cuda", "99.9")
        other.setattr(torch.version, "hip", "99.9")
        other.setattr(plan_key, "_triton", lambda: "99.9")
        assert plan_key.here(CPU) == before, "a GPU's package changes nothing on a CPU"


def test_a_gpu_is_keyed_by_what_it_is_and_not_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    class Facts:
        name, major, minor, multi_processor_count, total_memory = (
            "NVIDIA H200",
            9,
            0,
            132,
            139 * 2**30 + 12345,
        )

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    first = plan_key.machine_key(torch.device("cuda:0"))
    assert first == plan_key.machine_key(torch.device("cuda:1")) and "gcnArchName" not in first
    assert (first["capability"], first["multiprocessors"], first["gibibytes"]) == ("9.0", 132, 139)
    monkeypatch.setattr(torch.version, "cuda", "99.9")
    assert plan_key.here(torch.device("cuda"))["versions"]["cuda"] == "99.9"
    monkeypatch.setattr(Facts, "gcnArchName", "gfx942:sramecc+", raising=False)
    assert plan_key.machine_key(torch.device("cuda"))["capability"] == "gfx942:sramecc+"


@pytest.mark.parametrize("name", ["mps", "xpu", "meta"])
def test_a_device_that_nobody_knows_has_a_key(name: str, key: dict[str, Any]) -> None:
    other = {**key, "device": plan_key.machine_key(torch.device(name))}
    assert other["device"]["type"] == name and plan_files.find(other) == (None, None)


# Two at once ----------------------------------------------------------------------------------------------------------

WRITER = """
import json, sys
sys.dont_write_bytecode = True
from smolvla_fast.engine import plan_files
from smolvla_fast.ops.plan import Plan
key = json.loads(sys.stdin.read())
print("ready", flush=True)
i = 0
while True:
    i += 1
    plan_files.save(key, Plan({f"op {n}": f"candidate {i}" for n in range(300 + i % 7)}), {"filler": "x" * (i % 50_000)})
"""


def test_who_finds_while_another_saves_never_sees_half_a_plan(
    key: dict[str, Any], said: Any, folder: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        try:
            assert writer.stdin and writer.stdout
            writer.stdin.write(json.dumps(key))
            writer.stdin.close()
            assert writer.stdout.readline() == "ready\n"
            while not plan_files.path_of(key).exists():
                time.sleep(0.01)
            seen = set()
            deadline = time.monotonic() + 60
            while len(seen) < 20 and time.monotonic() < deadline:
                plan, wrong = plan_files.find(key)
                assert plan is not None and wrong is None, wrong
                candidates = set(plan.choices.values())
                assert len(candidates) == 1 and len(plan.choices) >= 300, "one plan, not two"
                seen |= candidates
            assert len(seen) >= 20, "the other one did not write"
        finally:
            writer.kill()
    assert not said() and plan_files.find(key)[0] is not None
    # What the killed one had not renamed yet lies aside, and nobody takes it for a plan.
    assert [row["reason"] for row in plan_files.listing()[0]] == [None]


# Told -----------------------------------------------------------------------------------------------------------------


def test_a_plan_is_described_by_its_date_age_and_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    day = plan_files.today()
    for days, words in (
        (0, "today"),
        (1, "1 day old"),
        (3, "3 days old"),
        (-1, "dated after this machine's clock"),
    ):
        date = (day - timedelta(days)).isoformat()
        assert (
            plan_files.describe(Plan(CHOICES, "/a.json", date))
            == f"plan of {date} ({words}), 2 choices, /a.json"
        )
    assert plan_files.describe(Plan({"a": "b"})) == "plan without a date, 1 choice"


def test_the_listing_says_which_plan_fits_and_why_another_does_not(key: dict[str, Any], folder: Path) -> None:
    mine = plan_files.save(key, Plan(CHOICES, measured="2026-01-02"), {})
    theirs = plan_files.save({**key, "threads": 64}, Plan(CHOICES), {})
    (folder / "torn.json").write_text("{")
    (folder / "copied.json").write_text(mine.read_text())
    rows, trouble = plan_files.listing()
    found = {Path(row["file"]).name: row for row in rows}
    assert trouble is None and len(found) == 4
    assert found[mine.name]["reason"] is None
    assert [found[mine.name][name] for name in ("tier", "backend", "measured", "choices")] == [
        "fp32", "auto", "2026-01-02", 2,
    ]  # fmt: skip
    assert found[theirs.name]["reason"] == "threads (64, here 1)"
    assert "torn" in found["torn.json"]["reason"] and "name" in found["copied.json"]["reason"]


def test_a_listing_has_an_end(folder: Path) -> None:
    folder.mkdir(parents=True)
    for index in range(plan_files.LISTED + 5):
        (folder / f"{index}.json").write_text("{")
    rows, trouble = plan_files.listing()
    assert len(rows) == plan_files.LISTED and "205 files" in trouble
