"""Recordings for `verify` and `demo`: how frames are drawn, units, and recordings that do not fit the policy."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.recordings import CAMERAS, RENAMED, dataset, folder, no_pictures, refuses, run, saved, writer

from smolvla_fast.cli import main
from smolvla_fast.cli.recording import Joint, Recording, unit_of
from smolvla_fast.cli.recording_files import Frame, Recorded, open_folder
from smolvla_fast.smolvla import aloha
from smolvla_fast.testing.policies import make_policy

__all__ = ["dataset", "folder", "no_pictures", "saved"]

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_frames_come_from_all_episodes_and_a_short_run_covers_many() -> None:
    lengths = {"a": 100, "b": 3, "c": 50, "d": 50}
    episodes = {name: [Frame(name, i) for i in range(count)] for name, count in lengths.items()}
    recorded = Recorded("", "", episodes, {}, None, lambda frames: lambda frame: {})
    drawn = recorded.draw(40, seed=0)
    assert len(set(drawn)) == 40 and {frame.episode for frame in drawn[:4]} == set(lengths)
    counts = {name: sum(frame.episode == name for frame in drawn) for name in lengths}
    assert counts["b"] == 3 and all(counts[name] in (12, 13) for name in "acd")
    assert drawn == recorded.draw(40, seed=0) != recorded.draw(40, seed=1)
    late = [frame.number for frame in drawn if frame.episode == "a"]
    assert min(late) < 10 and max(late) >= 90, "over the length of an episode"
    assert len(set(recorded.draw(1000, seed=0))) == 203, "all there are"
    assert len({frame.episode for frame in recorded.draw(2, seed=0)}) == 2


def test_a_folder_of_observations(saved: Path, folder: Path, tmp_path: Path) -> None:
    named = shutil.copytree(folder, tmp_path / "named")
    names = ["shoulder.deg", "elbow.pos", "x_mm", "y_mm", "wrist.rad", "gripper.percent"]
    (named / "info.json").write_text(
        json.dumps({"fps": 20, "features": {"action": {"names": {"motors": names}}}})
    )
    for part in (named, named / "episode_1"):  # what programs leave behind is no observation
        (part / ".ipynb_checkpoints").mkdir()
        (part / "._9.npz").write_bytes(b"of a Mac")
    for root, said in (
        (folder, {"dataset units"}),
        (named, {"degrees", "dataset units", "mm", "radians", "%"}),
    ):
        status, found = run(saved, tmp_path / "a.json", "--observations", str(root))
        assert status == 0 and found["frames"] == 4 and found["episodes"] == 2 and found["notes"] == []
        assert {joint["unit"] for joint in found["joints"]} == said
    assert [joint["name"] for joint in found["joints"]] == names and found["fps"] == 20


def test_a_home_folder_is_expanded(
    saved: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ``--flag=~/folder`` a shell does not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name, place in (("policy", saved), ("log", folder)):
        (tmp_path / name).symlink_to(place)
    words = ["--policy.path=~/policy", "--observations=~/log", "--json=~/a.json", "--frames=1", "--threads=1"]
    assert main(["verify", *words]) == 0
    assert (tmp_path / "a.json").is_file() and not (tmp_path / "~").exists()


def test_files_are_in_the_order_of_their_numbers(folder: Path, tmp_path: Path) -> None:
    names = ["episode_2/frame2.pt", "episode_2/frame10.pt", "episode_10/9.npz", "episode_10/a.npz"]
    for name in reversed(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = open_folder(argparse.Namespace(observations=str(tmp_path))).episodes
    assert [f"{f.path.parent.name}/{f.path.name}" for frames in found.values() for f in frames] == names


def test_observations_beside_subfolders_are_refused(
    saved: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = shutil.copytree(folder, tmp_path / "log")
    shutil.copy(log / "episode_0" / "1.npz", log / "7.npz")
    message = refuses(saved, capsys, "--observations", str(log))
    assert "7.npz lies beside the subfolder episode_0" in message and "Move it into a subfolder" in message


def test_a_units_word_is_said_and_never_guessed() -> None:
    found = {
        name: unit_of(name)
        for name in ("a.pos", "elbow_degrees", "degree_of_freedom_1", "x [mm]", "arm", "grip_%")
    }
    assert found == {
        "a.pos": "dataset units", "elbow_degrees": "degrees", "degree_of_freedom_1": "dataset units", "x [mm]": "mm",
        "arm": "dataset units", "grip_%": "%",
    }  # fmt: skip


def test_units_are_the_datasets_or_those_that_are_given(saved: Path, dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "units")
    features(lambda f: f["action"].update(units=["degrees"] * 5 + ["%"]))(root)
    one = (saved, tmp_path / "a.json", "--frames", "1", "--dataset.root")
    for given, said in (
        ((str(root),), ["degrees"] * 5 + ["%"]),
        ((str(dataset), "--dataset.units", "mm"), ["mm"] * 6),
        (
            (str(dataset), "--dataset.units", "joint_0.pos=degrees,joint_5.pos=%"),
            ["degrees", *["dataset units"] * 4, "%"],
        ),
    ):
        _, found = run(*one, *given)
        assert [joint["unit"] for joint in found["joints"]] == said


def test_units_that_do_not_fit_are_refused(
    saved: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refuses(saved, capsys, "--dataset.root", str(dataset), "--dataset.units", "elbow=degrees")
    assert (
        "--dataset.units names ['elbow'], which the recording does not have; it has ['joint_0.pos'" in message
    )
    root = shutil.copytree(dataset, tmp_path / "units")
    features(lambda f: f["action"].update(units=["degrees"]))(root)
    message = refuses(saved, capsys, "--dataset.root", str(root))
    assert "info.json has the units ['degrees'] for 6 actions; accepted is one for each" in message


def test_only_the_drawn_episodes_are_opened(
    saved: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lerobot.datasets

    opened: list[list[int]] = []

    class Spy(lerobot.datasets.LeRobotDataset):
        def __init__(self, *args: Any, **more: Any) -> None:
            opened.append(more["episodes"])
            super().__init__(*args, **more)

    monkeypatch.setattr(lerobot.datasets, "LeRobotDataset", Spy)
    _, found = run(saved, tmp_path / "a.json", "--dataset.root", str(dataset), "--frames", "2")
    drawn = {int(frame["episode"]) for frame in found["tiers"][0]["frames"]}
    assert opened == [sorted(drawn)] and len(drawn) == 2


def test_an_episode_may_count_its_frames_from_another_number_than_0(
    saved: Path, dataset: Path, tmp_path: Path
) -> None:
    import pandas as pd

    root = shutil.copytree(dataset, tmp_path / "trimmed")
    for path in (root / "data").rglob("*.parquet"):
        table = pd.read_parquet(path)
        table["frame_index"] += 5 * (table["episode_index"] == 1)
        table.to_parquet(path)
    recorded = ("--dataset.root", str(root), "--dataset.episodes", "1", "--frames", "2")
    status, found = run(saved, tmp_path / "a.json", *recorded)
    assert status == 0 and found["frames"] == 2 and found["notes"] == []


def cut(root: Path) -> None:
    """The last episode's rows and its length: an episode without frames."""
    import pandas as pd

    (path,) = (root / "meta/episodes").rglob("*.parquet")
    table = pd.read_parquet(path)
    begin = table["dataset_from_index"].iloc[-1]
    table.loc[table.index[-1], ["dataset_to_index", "length"]] = [begin, 0]
    table.to_parquet(path)


def without_data(root: Path) -> None:
    shutil.rmtree(root / "data")


def features(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        info = json.loads((root / "meta/info.json").read_text())
        change(info["features"])
        (root / "meta/info.json").write_text(json.dumps(info))

    return damage


def first(found: dict[str, Any]) -> str:
    frame = found["tiers"][0]["frames"][0]
    return f"frame {frame['frame']} of episode {frame['episode']}"


@pytest.mark.parametrize(
    ("made", "damage", "says"),
    [
        (dict(cameras=("front",)), None, None),
        (dict(joints=7), None, "'observation.state' has the shape [7] there (['joint_0.pos'"),
        ({}, cut, "episodes [3] have no frames; leave them out: --dataset.episodes"),
        ({}, lambda root: (root / "meta/info.json").unlink(), "meta/info.json is missing"),
        ({}, lambda root: shutil.rmtree(root), "there is no such folder"),
        ({}, without_data, "is missing"),
        (dict(joints=7), without_data, "'observation.state' has the shape [7] there"),
    ],
    ids=[
        "one camera",
        "seven joints",
        "an empty episode",
        "no info",
        "no folder",
        "no data",
        "seven joints, before the data is looked for",
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(
    saved: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, Any],
    damage: Any,
    says: str | None,
) -> None:
    root = tmp_path / "pick"
    if made:
        writer()(root, episodes=2, **made)
    else:
        shutil.copytree(dataset, root)
    if damage:
        damage(root)
    if says is None:  # stock computes without a camera that is not there
        _, found = run(saved, tmp_path / "a.json", "--dataset.root", str(root), "--frames", "1")
        assert found["notes"] == [
            f"1 frame without the cameras ['observation.images.camera2'], the first {first(found)}; stock and every "
            "tier computed without them"
        ]
        return
    assert says in refuses(saved, capsys, "--dataset.root", str(root))


@pytest.mark.parametrize(
    ("renamed", "says"),
    [
        ({}, "it lacks the cameras ['observation.images.camera1', 'observation.images.camera2']; it has"),
        ({**RENAMED, "observation.state": "observation.joints"}, "it has no 'observation.state', from which"),
    ],
    ids=["cameras", "state"],
)
def test_other_names_than_the_policys_are_refused(
    saved: Path,
    dataset: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    renamed: Any,
    says: str,
) -> None:
    other = shutil.copytree(saved, tmp_path / "other")
    path = other / "policy_preprocessor.json"
    steps = json.loads(path.read_text())
    steps["steps"][0]["config"]["rename_map"] = renamed
    path.write_text(json.dumps(steps))
    for option, root in (("--dataset.root", dataset), ("--observations", folder)):
        message = refuses(other, capsys, option, str(root))
        assert option in message and f"does not fit the policy: {says}" in message


def test_a_tokenizer_that_was_not_downloaded_is_named(
    saved: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(saved, tmp_path / "other")
    backbone = json.loads((other / "config.json").read_text())["vlm_model_name"]
    for path in other.glob("*.json"):
        path.write_text(path.read_text().replace(backbone, "owner/no-backbone"))
    message = refuses(other, capsys, "--observations", str(folder))
    assert "run `hf download owner/no-backbone --include '*.json'`" in message and "again" not in message


def test_a_policy_without_statistics_is_refused(
    saved: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(saved, tmp_path / "bare")
    for path in bare.glob("policy_*.safetensors"):
        path.unlink()
    assert "not found" in refuses(bare, capsys, "--observations", str(folder))
    for path in bare.glob("policy_*.json"):
        path.unlink()
    message = refuses(bare, capsys, "--observations", str(folder))
    assert "observation.state (" in message and "dataset_stats" in message


STATE = {"observation.state": np.zeros(6, np.float32)}
FRONT, WRIST = ({f"observation.images.{name}": np.zeros((8, 8, 3), np.uint8)} for name in CAMERAS)
BAD: list[tuple[str, bytes | dict[str, Any], str]] = [
    ("no archive", b"not a zip", "is no observation"),
    ("other names", {"state": np.zeros(6)}, "no name that begins with 'observation.'"),
    ("nan", {**FRONT, "observation.state": np.full(6, np.nan, np.float32)}, "numbers that are not finite"),
    ("no cameras", STATE, "does not fit the policy: it lacks the cameras"),
    ("no state", {**FRONT, **WRIST}, "does not fit the policy: it has no 'observation.state'"),
    ("seven joints", {**FRONT, **WRIST, "observation.state": np.zeros(7)}, "has the shape [7] there and [6] in the policy"),
    ("two dimensions", {**STATE, "observation.images.front": np.zeros((4, 4), np.uint8)}, "has three dimensions"),
    ("floats to 255", {**STATE, "observation.images.front": np.full((8, 8, 3), 255.0)}, "has values outside [0, 1]"),
    ("image of nan", {**STATE, "observation.images.front": np.full((8, 8, 3), np.nan)}, "has values outside [0, 1]"),
]  # fmt: skip


def write(path: Path, content: bytes | dict[str, Any]) -> None:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)


def test_a_bad_observation_costs_itself_alone(saved: Path, folder: Path, tmp_path: Path) -> None:
    """Each kind of them in one log, at its beginning, middle and end."""
    log = shutil.copytree(folder, tmp_path / "log")
    for place, (_, content, _) in enumerate(BAD):
        part, name = (("episode_0", "00"), ("episode_0", "1"), ("episode_1", "9"))[place % 3]
        write(log / part / f"{name}_{place}.npz", content)
    status, found = run(saved, tmp_path / "a.json", "--observations", str(log))
    assert status == 0 and found["frames"] == 4 and found["drawn"] == 4 + len(BAD)
    assert found["verdict"].startswith(f"Passed on 4 of {4 + len(BAD)} frames drawn: ")
    assert len(found["notes"]) == len(BAD)
    for place, (_, _, says) in enumerate(BAD):
        (note,) = [note for note in found["notes"] if f"_{place}.npz" in note]
        assert note.startswith("left out: ") and says in note


@pytest.mark.parametrize(("content", "says"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_log_of_bad_observations_is_refused(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, says: str
) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.npz", content)
    message = refuses(saved, capsys, "--observations", str(tmp_path))
    assert "--observations: none of 2 frames can be used; " in message and says in message


def test_frames_without_a_camera_are_noted(saved: Path, folder: Path, tmp_path: Path) -> None:
    """That other frames have it, or that a dataset's info.json declares it, does not hide it."""
    log = shutil.copytree(folder, tmp_path / "log")
    declared = {f"observation.images.{name}": {"dtype": "video", "shape": [480, 640, 3]} for name in CAMERAS}
    action = {"shape": [6], "names": ["a", "b", "c", "d", "e", "f"]}
    (log / "info.json").write_text(json.dumps({"fps": 30, "features": {**declared, "action": action}}))
    for number in (5, 6):
        np.savez(log / "episode_1" / f"{number}.npz", **STATE, **FRONT)
    status, found = run(saved, tmp_path / "a.json", "--observations", str(log))
    assert status == 0 and found["frames"] == 6
    (note,) = found["notes"]
    assert note.startswith("2 frames without the cameras ['observation.images.camera2'], the first frame ")


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ("[]", "no info.json as a dataset's"),
        ('{"fps": "30"}', '"fps" is "30", not a number above 0'),
        ('{"fps": 0}', '"fps" is 0, not a number above 0'),
        ('{"features": []}', "no info.json as a dataset's"),
        ('{"features": {"action": 6}}', 'the "action" of "features" is 6'),
        ('{"features": {"action": {"names": ["a"]}}}', "'action' has the shape [1] there (['a']) and [6]"),
        ('{"features": {"action": {"shape": 6}}}', "'action' has the shape 6 there and [6]"),
        ('{"features": {"action": {"units": ["mm"]}}}', "has the units ['mm'] for 6 actions"),
        ('{"features": {"action": {"units": {"a": "mm"}}}}', "has the units {'a': 'mm'} for 6 actions"),
    ],
)
def test_an_info_that_cannot_be_used_is_refused(
    saved: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], info: str, says: str
) -> None:
    log = shutil.copytree(folder, tmp_path / "log")
    (log / "info.json").write_text(info)
    assert says in refuses(saved, capsys, "--observations", str(log))


def test_units_alone_are_enough(saved: Path, folder: Path, tmp_path: Path) -> None:
    log = shutil.copytree(folder, tmp_path / "log")
    (log / "info.json").write_text('{"features": {"action": {"units": "degrees"}}}')
    _, found = run(saved, tmp_path / "a.json", "--observations", str(log), "--frames", "1")
    assert found["joints"][0] == {"name": "action[0]", "unit": "degrees"}


@pytest.mark.parametrize("origin", ["lerobot", "ours"])
def test_actions_of_an_aloha_robot(origin: str) -> None:
    """In its own conventions, of either class; the chunk is judged again, so it stays as it was."""
    if origin == "lerobot":
        pytest.importorskip("lerobot.policies.smolvla.modeling_smolvla")
    policy = make_policy("tiny", origin=origin, adapt_to_pi_aloha=True, state_dim=14, action_dim=14)
    recorded = Recorded("", "", {}, {}, None, lambda frames: lambda frame: {})
    joints = [Joint(str(index), "") for index in range(14)]
    recording = Recording(recorded, [], joints, None, lambda actions: 10 * actions, lambda *_: [])
    chunk = torch.rand(1, 6, 32, generator=torch.Generator().manual_seed(0))
    before = chunk.clone()
    found = recording.actions(policy, chunk)
    assert torch.equal(chunk, before)
    wanted = 10 * aloha.encode_actions(before[0, :, :14])
    assert np.array_equal(found, wanted.numpy()) and not np.array_equal(found, 10 * before[0, :, :14].numpy())


def test_demo_takes_a_recorded_frame(saved: Path, dataset: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("smolvla_fast.cli.demo.draw", lambda *_: None)  # takes longer than all the rest
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    command = ["demo", "--policy.path", str(saved), "--threads", "1", "--rounds", "1", *files]
    assert main([*command, "--dataset.root", str(dataset), "--dataset.episodes", "2"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert re.fullmatch(r"frame \d+ of episode 2 in pick \(4 episodes\)", found["observation"])
    assert found["cameras"] == 2 and found["status"]["calls_stock"] == 0
