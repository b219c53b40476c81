"""Messages of LeRobot's clients are read; whatever else a pickle can say is refused, and nothing of it is run."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot.rollout", reason="the fleet speaks the protocol of LeRobot 0.6")

SEEN = {
    "joint0.pos": 0.5, "joint1.pos": np.float32(1.5), "joint2.pos": np.float64(-2), "joint3.pos": 3, "grip": True,
    "camera1": np.arange(24 * 32 * 3, dtype=np.uint8).reshape(24, 32, 3), "task": "pick up",
    "mirrored": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)[:, ::-1], "columns": np.asfortranarray(np.eye(3)),
    "depth": np.arange(6, dtype=">f4").reshape(2, 3), "large": np.ones((480, 640, 3), np.uint8),
}  # fmt: skip


@pytest.fixture(autouse=True)
def messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)  # LeRobot's helpers and any code of a message write where they stand
    from smolvla_fast.fleet import messages

    return messages


def timed(observation: Any = SEEN, **fields: Any) -> Any:
    from lerobot.async_inference.helpers import TimedObservation

    return TimedObservation(
        **{**dict(timestamp=1.5, timestep=3, observation=observation, must_go=True), **fields}
    )


@pytest.mark.parametrize("protocol", [4, 5])
def test_an_observation_is_read_as_it_was_sent(messages: Any, protocol: int) -> None:
    got = messages.read_observation(pickle.dumps(timed(), protocol))
    assert (got.timestamp, got.timestep, got.must_go) == (
        1.5,
        3,
        True,
    ) and got.observation.keys() == SEEN.keys()
    for name, value in SEEN.items():
        np.testing.assert_array_equal(got.observation[name], value)
        assert np.asarray(got.observation[name]).dtype == np.asarray(value).dtype


@pytest.mark.parametrize("protocol", [4, 5])
def test_instructions_are_read_as_they_were_sent(messages: Any, protocol: int) -> None:
    from lerobot.async_inference.helpers import RemotePolicyConfig

    features = {"observation.state": {"dtype": "float32", "shape": (6,), "names": list("abcdef")}}
    wanted = RemotePolicyConfig("smolvla", "lerobot/smolvla_base", features, 50, "cuda", {"a": "b"})
    assert messages.read_instructions(pickle.dumps(wanted, protocol)) == wanted


class Calls:
    """A pickle that calls something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


def stack_global(module: str, name: str) -> bytes:
    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return text(module) + text(name) + b"\x93"


def with_a_step(value: bytes) -> bytes:
    """An observation whose step is what these opcodes make; without a frame, whose length would tell."""
    data = pickle.dumps(timed(timestep=77), 4)
    return (data[:2] + data[11:]).replace(b"timestep\x94KM", b"timestep\x94" + value)


HELPERS = "lerobot.async_inference.helpers"
ATTACKS: dict[str, Any] = {
    "os.system": lambda: pickle.dumps(Calls(os.system, "touch ran")),
    "in an observation": lambda: pickle.dumps(timed({"task": Calls(os.system, "touch ran")})),
    "eval in a field": lambda: pickle.dumps(timed(timestep=Calls(eval, "open('ran', 'w')"))),
    "an array of objects": lambda: pickle.dumps(timed({"x": np.array([Calls(os.system, "touch ran")])})),
    "a tensor, which torch unpickles": lambda: pickle.dumps(timed({"x": torch.zeros(2)})),
    "GLOBAL of protocol 0": lambda: b"cos\nsystem\n(S'touch ran'\ntR.",
    "INST of protocol 0": lambda: b"(S'touch ran'\nios\nsystem\n.",
    "a registered extension": lambda: b"\x80\x04\x82\x01.",
    "a persistent id": lambda: b"Ptouch ran\n.",
    "a method of an admitted class": lambda: b"\x80\x04" + stack_global(HELPERS, "TimedObservation.get_timestep") + b".",
    "a module beside it": lambda: b"\x80\x04" + stack_global(HELPERS, "os") + b".",
    # BUILD with a pair sets attributes, here of the class that stands for every observation.
    "attributes of a class": lambda: (
        b"\x80\x04" + stack_global(HELPERS, "TimedObservation") + b"N}\x8c\x06fieldsK\x07s\x86b."
    ),
    "a place in the memo that takes 16 GB": lambda: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "4 EB of bytes": lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
    "8 GB in a bytearray": lambda: b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
    "an array of 8 TB": lambda: (
        b"\x80\x04" + stack_global("numpy", "ndarray") + b"\x8a\x06" + struct.pack("<Q", 2**40)[:6] + b"\x85R."
    ),
    "a shape that its bytes do not fill": lambda: pickle.dumps(timed()).replace(b"K\x18K K\x03\x87", b"K\xffK\xffK\xff\x87"),
    "a million nested tuples": lambda: b"\x80\x04}N" + b"\x85" * 10**6 + b"Ns.",
    "fifteen thousand nested tuples": lambda: with_a_step(b")" + b"\x85" * 15_000),
    "nothing": lambda: b"",
    "noise": lambda: bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8)),
    "half a message": lambda: pickle.dumps(timed())[:2000],
    "an observation of numbers": lambda: pickle.dumps(timed([1, 2])),
    "names that are numbers": lambda: pickle.dumps(timed({3: 1.0})),
    "a nested observation": lambda: pickle.dumps(timed({"a": {"b": 1}})),
    "a step that is a text": lambda: pickle.dumps(timed(timestep="3")),
    "a dict in its place": lambda: pickle.dumps(dict(timestamp=1.5, timestep=3, observation={}, must_go=True)),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_anything_else_is_refused_and_nothing_is_run(messages: Any, attack: str, tmp_path: Path) -> None:
    data = ATTACKS[attack]()
    before = {name: dict(vars(each)) for name, each in messages.NAMES.items()}
    for read in (messages.read_observation, messages.read_instructions):
        with pytest.raises(messages.Refused):
            read(data)
    assert not (tmp_path / "ran").exists()
    assert before == {name: dict(vars(each)) for name, each in messages.NAMES.items()}


def test_a_message_of_another_release_is_told_the_fields(messages: Any) -> None:
    data = pickle.dumps(timed()).replace(b"must_go", b"must_do")
    with pytest.raises(messages.Refused, match=r"'must_do'\].* LeRobot's Observation of .*'must_go'"):
        messages.read_observation(data)


def test_the_attacks_run_code_where_pickle_reads_them(tmp_path: Path) -> None:
    """What the test above refuses is real: LeRobot's server, which unpickles, would run it."""
    for attack in (
        "os.system",
        "in an observation",
        "eval in a field",
        "an array of objects",
        "GLOBAL of protocol 0",
    ):
        pickle.loads(ATTACKS[attack]())
        (tmp_path / "ran").unlink()


def test_a_message_that_is_too_large_is_refused_unread(
    messages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(timed())
    monkeypatch.setattr(messages, "MAX_OBSERVATION", len(data) - 1)
    monkeypatch.setattr(messages.pickletools, "genops", lambda _: pytest.fail("it was read"))
    with pytest.raises(messages.Refused) as refused:
        messages.read_observation(data)
    assert refused.value.code == "RESOURCE_EXHAUSTED"


def test_a_damaged_message_is_read_or_refused(messages: Any) -> None:
    """Five hundred messages with bytes changed, taken out or put in: no error but ``Refused``."""
    whole = pickle.dumps(timed({"joint0.pos": 0.5, "task": "go", "camera1": np.ones((2, 3), np.uint8)}))
    rng, refused = np.random.default_rng(1), 0
    for _ in range(500):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            kind = int(rng.integers(3))
            data[place : place + (kind < 2)] = bytes(rng.integers(0, 256, int(kind > 0), np.uint8))
        try:
            messages.read_observation(bytes(data))
        except messages.Refused:
            refused += 1
    assert 100 < refused < 500  # some bytes are of a text or a frame, and any will do
