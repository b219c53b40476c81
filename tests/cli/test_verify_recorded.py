"""`verify` and `demo` on recorded frames: the numbers, the verdict, a planted fault, and recordings that do not fit."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import smolvla_fast
from smolvla_fast.cli import main, verify
from smolvla_fast.cli.recording import unit_of
from smolvla_fast.patch import engine_of
from smolvla_fast.smolvla import SmolVLAPolicy, make_pre_post_processors, make_smolvla_pre_post_processors
from smolvla_fast.testing.observations import TASK, make_observation
from smolvla_fast.testing.policies import make_noise, make_policy

JOINTS, CAMERAS = 6, ("front", "wrist")
MEAN, STD = [10.0 * i for i in range(JOINTS)], [1.0 + i for i in range(JOINTS)]
RENAMED = {
    f"observation.images.{name}": f"observation.images.camera{i + 1}" for i, name in enumerate(CAMERAS)
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with statistics of its own, whose preprocessor renames the dataset's cameras."""
    root = tmp_path_factory.mktemp("policy")
    policy = make_policy("tiny", origin="ours", folder=root / "vlm")
    policy.save_pretrained(root / "saved")
    stats = {
        "observation.state": {"mean": [0.1] * JOINTS, "std": [0.5] * JOINTS},
        "action": {"mean": MEAN, "std": STD},
    }
    before, after = make_smolvla_pre_post_processors(policy.config, stats)
    before.steps[0].rename_map = RENAMED
    for pipeline in (before, after):
        pipeline.save_pretrained(root / "saved")
    return root / "saved"


def writer() -> Any:
    """``write_dataset``; skips where LeRobot 0.6's datasets are not installed."""
    for package in ("datasets", "lerobot.datasets"):
        pytest.importorskip(package, reason="LeRobot 0.6's datasets")
    if not hasattr(sys.modules["lerobot.datasets"], "LeRobotDataset"):
        pytest.skip("the datasets of an older LeRobot")
    from smolvla_fast.testing.dataset import write_dataset

    return write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four short episodes."""
    write_dataset = writer()
    root = tmp_path_factory.mktemp("recorded") / "pick"
    write_dataset(root, episodes=4)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, saved: Path) -> Path:
    """Two episodes of saved observations: as a robot gives them, .npz, and as LeRobot prepares them, .pt."""
    root, policy = tmp_path_factory.mktemp("log"), SmolVLAPolicy.from_pretrained(saved)
    for number in range(4):
        drawn = make_observation(policy, seed=number)
        frames = {
            f"observation.images.{name}": drawn[RENAMED[f"observation.images.{name}"]] for name in CAMERAS
        }
        part = root / f"episode_{number // 2}"
        part.mkdir(exist_ok=True)
        state = drawn["observation.state"]
        if number < 2:
            bytes_ = {k: (255 * v[0].permute(1, 2, 0)).byte().numpy() for k, v in frames.items()}
            np.savez(
                part / f"{number}.npz", **bytes_, **{"observation.state": state[0].numpy(), "task": TASK}
            )
        else:
            torch.save({**frames, "observation.state": state, "task": [TASK]}, part / f"{number}.pt")
    return root


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all the rest, so two tests alone have them."""
    if "page" not in request.node.name:
        monkeypatch.setattr("smolvla_fast.measure.difference_charts.draw", lambda *_: [])


def run(saved: Path, report: Path, *arguments: str) -> tuple[int, Any]:
    command = ["verify", "--policy.path", str(saved), "--threads", "1", "--json", str(report), *arguments]
    status = main(command)
    return status, json.loads(report.read_text())


def refuses(saved: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["verify", "--policy.path", str(saved), "--threads", "1", *arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and "did not foresee" not in message, message
    assert "loading the policy" not in message, "refused before the weights are read"
    return message


def test_a_joints_numbers_by_hand(saved: Path, dataset: Path, tmp_path: Path) -> None:
    """Joint 4 of every frame computed again by other means: LeRobot's reader, the policy called by hand, mean and std."""
    from lerobot.datasets import LeRobotDataset

    status, found = run(
        saved,
        tmp_path / "a.json",
        "--dataset.root",
        str(dataset),
        "--frames",
        "3",
        "--precision",
        "fp32,bf16",
    )
    assert status == 0 and [tier["name"] for tier in found["tiers"]] == ["fp32", "bf16"]
    rows = LeRobotDataset("any/name", root=dataset, video_backend="pyav")
    begins = rows.meta.episodes["dataset_from_index"]
    plain, joint = SmolVLAPolicy.from_pretrained(saved).eval(), 4
    preprocess, _ = make_pre_post_processors(plain.config, saved)
    for tier in found["tiers"]:
        fast = smolvla_fast.patch(SmolVLAPolicy.from_pretrained(saved).eval(), precision=tier["name"])
        apart, changed = [], []
        for frame in tier["frames"]:
            item = rows[begins[int(frame["episode"])] + frame["frame"]]
            batch = preprocess({k: v for k, v in item.items() if k.startswith("observation.") or k == "task"})
            one, two = (make_noise(plain, seed=frame["noise_seed"] + i) for i in (0, 1))
            chunks = [
                p.predict_action_chunk(dict(batch), noise=n)
                for p, n in ((fast, one), (plain, one), (plain, two))
            ]
            degrees = [MEAN[joint] + STD[joint] * chunk[0, :, joint].double().numpy() for chunk in chunks]
            apart += abs(degrees[0] - degrees[1]).tolist()
            changed += abs(degrees[2] - degrees[1]).tolist()
        # fp32 actions about 40: the command's own unnormalising rounds at 4e-6.
        for values, key in ((apart, "joints"), (changed, "noise")):
            ordered = sorted(values)
            place = 0.99 * (len(ordered) - 1)
            below = ordered[int(place)]
            p99 = below + (place - int(place)) * (ordered[int(place) + 1] - below)
            assert tier[key][joint]["max"] == pytest.approx(ordered[-1], abs=8e-6)
            assert tier[key][joint]["p99"] == pytest.approx(p99, abs=8e-6)
        assert max(changed) > 1, "another noise changes something, and so the comparison is one"
    assert found["joints"][joint] == {"name": "joint_4.pos", "unit": "dataset units"}


def test_a_report_is_one_page(
    saved: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(
        saved, tmp_path / "my report.json", "--dataset.root", str(dataset), "--frames", "9", "--precision", "exact,fp32",
        "--dataset.episodes", "1,3",
    )  # fmt: skip
    assert status == 0 and found["passed"] and found["frames"] == 9
    frames = [(frame["episode"], frame["frame"]) for frame in found["tiers"][0]["frames"]]
    assert len(set(frames)) == 9 and {episode for episode, _ in frames} == {"1", "3"}
    assert [frame["passed"] for tier in found["tiers"] for frame in tier["frames"]] == [True] * 18
    assert found["tiers"][0]["joints"] == [{"max": 0.0, "p99": 0.0}] * JOINTS
    assert all(each["max"] > 0 for each in found["tiers"][1]["joints"])
    text = (tmp_path / "my report.md").read_text()
    assert (
        found["verdict"] in text
        and "exact keeps its bound on all 9 frames, every bit is stock's" in found["verdict"]
    )
    assert found["verdict"] in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    pytest.importorskip("markdown_it")
    page = (tmp_path / "my report.html").read_text()
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == 4 == text.count("![")
    assert all(base64.b64decode(each.partition(",")[2]).startswith(b"\x89PNG") for each in pictures)
    assert "joint_4.pos" in page and "<table>" in page and "http" not in page


@pytest.mark.parametrize("factor", [1.001, 1.2, float("nan")])
def test_a_planted_fault_is_told(
    saved: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], factor: float,
) -> None:  # fmt: skip
    """A velocity that is too large. A thousandth is far beyond fp32, and less than bf16's own loss."""
    real = verify.patched

    def faulty(*args: Any) -> Any:
        policy = real(*args)
        engine = engine_of(policy.model)
        step = engine.ops.euler_step

        def scaled(h: Any, norm: Any, out: Any, x: Any, dt: Any, *rest: Any, **more: Any) -> Any:
            return step(h, norm, out, x, factor * dt, *rest, **more)

        engine.ops = dataclasses.replace(engine.ops, euler_step=scaled)
        return policy

    monkeypatch.setattr(verify, "patched", faulty)
    status, found = run(
        saved,
        tmp_path / "a.json",
        "--dataset.root",
        str(dataset),
        "--frames",
        "2",
        "--precision",
        "fp32,bf16",
    )
    fp32, bf16 = found["tiers"]
    assert status == 1 and not found["passed"] and not fp32["passed"] and fp32["within"] == 0
    assert bf16["passed"] == (factor == 1.001)
    named = "fp32" if factor == 1.001 else "fp32 or bf16"
    assert found["verdict"].startswith(
        f"FAILED, do not run {named} on this robot: fp32 BREAKS its bound: 0 of 2 frames"
    )
    assert found["verdict"] in capsys.readouterr().out and found["verdict"] in (tmp_path / "a.md").read_text()


def test_frames_come_from_all_episodes_and_a_short_run_covers_many(saved: Path, folder: Path) -> None:
    from smolvla_fast.cli.recording_files import Frame, Recorded

    lengths = {"a": 100, "b": 3, "c": 50, "d": 50}
    episodes = {name: [Frame(name, i, None) for i in range(count)] for name, count in lengths.items()}
    recorded = Recorded("", "", episodes, lambda key: {}, {}, None)
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
    for root, units in (
        (folder, {"dataset units"}),
        (named, {"degrees", "dataset units", "mm", "radians", "%"}),
    ):
        status, found = run(saved, tmp_path / "a.json", "--observations", str(root))
        assert status == 0 and found["frames"] == 4 and found["episodes"] == 2
        assert {joint["unit"] for joint in found["joints"]} == units
    assert [joint["name"] for joint in found["joints"]] == names and found["fps"] == 20


def test_a_units_word_is_said_and_never_guessed() -> None:
    found = {
        name: unit_of(name)
        for name in ("a.pos", "elbow_degrees", "degree_of_freedom_1", "x [mm]", "arm", "grip_%")
    }
    assert found == {
        "a.pos": "dataset units", "elbow_degrees": "degrees", "degree_of_freedom_1": "dataset units", "x [mm]": "mm",
        "arm": "dataset units", "grip_%": "%",
    }  # fmt: skip


def test_a_robot_in_its_own_units_is_taken_at_its_word(saved: Path, dataset: Path, tmp_path: Path) -> None:
    root = shutil.copytree(dataset, tmp_path / "units")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["action"]["units"] = ["degrees"] * 5 + ["%"]
    (root / "meta/info.json").write_text(json.dumps(info))
    _, found = run(saved, tmp_path / "a.json", "--dataset.root", str(root), "--frames", "1")
    assert [joint["unit"] for joint in found["joints"]] == ["degrees"] * 5 + ["%"]


def test_the_time_is_kept_and_so_is_what_was_measured(saved: Path, dataset: Path, tmp_path: Path) -> None:
    status, found = run(
        saved, tmp_path / "a.json", "--dataset.root", str(dataset), "--frames", "50", "--max_minutes", "1e-9"
    )
    assert status == 0 and found["frames"] == 1
    assert found["stopped"] == "of 50 that were drawn: stopped by --max_minutes 1e-09"
    assert found["stopped"] in (tmp_path / "a.md").read_text()


def test_an_interrupted_run_keeps_what_it_has(
    saved: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, frames = verify.check_frame, []

    def interrupted(*args: Any) -> None:
        frames.append(args)
        if len(frames) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(verify, "check_frame", interrupted)
    status, found = run(saved, tmp_path / "a.json", "--observations", str(folder))
    assert status == 130 and found["frames"] == 2 and found["stopped"] == "interrupted"


def test_chunks_that_stock_serves_are_counted_apart(
    saved: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, hooks = verify.check_frame, []

    def hooked(tiers: Any, *args: Any) -> None:
        layer = tiers[0].policy.model.vlm_with_expert.lm_expert.layers[0]
        hooks.append(None)
        handle = layer.register_forward_hook(lambda *_: None) if len(hooks) > 2 else None
        real(tiers, *args)
        if handle:
            handle.remove()

    monkeypatch.setattr(verify, "check_frame", hooked)
    status, found = run(saved, tmp_path / "a.json", "--observations", str(folder))
    assert status == 0 and len(found["tiers"][0]["frames"]) == 2
    assert found["tiers"][0]["stock_served"]["frames"] == 2
    assert "(stock served 2 frames more: " in found["verdict"] and "hook" in found["verdict"]
    monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    assert main(["verify", "--policy.path", str(saved), "--observations", str(folder)]) == 2
    assert "nothing to verify: SMOLVLA_FAST_DISABLE is set" in capsys.readouterr().err


def test_a_tier_that_stock_served_has_no_place_on_the_page(
    saved: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = verify.patched

    def hooked(policy: Any, name: str, args: Any) -> Any:
        own = real(policy, name, args)
        if name == "bf16":
            own.model.vlm_with_expert.lm_expert.layers[0].register_forward_hook(lambda *_: None)
        return own

    monkeypatch.setattr(verify, "patched", hooked)
    status, found = run(
        saved, tmp_path / "a.json", "--observations", str(folder), "--frames", "2", "--precision", "bf16,fp32"
    )
    assert status == 1 and [tier["passed"] for tier in found["tiers"]] == [False, True]
    assert found["verdict"].startswith("Not verified: bf16 was not verified, stock served every frame (")
    assert list(found["worst"]["chunks"]) == ["fp32"] and "## bf16" not in (tmp_path / "a.md").read_text()


def cut(root: Path) -> None:
    """The last episode's rows and its length: an episode without frames."""
    import pandas as pd

    (path,) = (root / "meta/episodes").rglob("*.parquet")
    table = pd.read_parquet(path)
    begin = table["dataset_from_index"].iloc[-1]
    table.loc[table.index[-1], ["dataset_to_index", "length"]] = [begin, 0]
    table.to_parquet(path)


def features(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        info = json.loads((root / "meta/info.json").read_text())
        change(info["features"])
        (root / "meta/info.json").write_text(json.dumps(info))

    return damage


@pytest.mark.parametrize(
    ("made", "damage", "says"),
    [
        (dict(cameras=("front",)), None, None),
        (dict(joints=7), None, "'observation.state' has the shape [7] there (['joint_0.pos'"),
        ({}, cut, "episodes [1] have no frames; leave them out: --dataset.episodes"),
        ({}, lambda root: (root / "meta/info.json").unlink(), "meta/info.json is missing"),
        ({}, lambda root: shutil.rmtree(root), "there is no such folder"),
        ({}, lambda root: next((root / "data").rglob("*.parquet")).unlink(), "is missing"),
        ({}, features(lambda f: f["action"].update(shape=[5])), "'action' has the shape [5] there"),
    ],
    ids=[
        "one camera",
        "seven joints",
        "an empty episode",
        "no info",
        "no folder",
        "no data",
        "another shape",
    ],
)
def test_a_dataset_that_does_not_fit_is_refused(
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, Any],
    damage: Any,
    says: str | None,
) -> None:
    root = tmp_path / "pick"
    writer()(root, episodes=2, **made)
    if damage:
        damage(root)
    if says is None:  # stock computes without a camera that is not there
        _, found = run(saved, tmp_path / "a.json", "--dataset.root", str(root), "--frames", "1")
        assert found["notes"] == [
            "pick (2 episodes) lacks the cameras ['observation.images.camera2']; stock and every tier computed without them"
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
        assert f"{option} does not fit the policy: {says}" in message


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


def test_bad_observations_are_refused(
    saved: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = shutil.copytree(folder, tmp_path / "log")
    (log / "episode_9").mkdir()
    assert "no observation in" in refuses(saved, capsys, "--observations", str(log))
    (log / "episode_9").rmdir()
    first = log / "episode_0" / "0.npz"
    for content, says in (
        (b"not a zip", "is no observation"),
        ({"state": np.zeros(6)}, "no name that begins with 'observation.'"),
        ({"observation.state": np.full(6, np.nan, np.float32)}, "numbers that are not finite"),
        ({"observation.state": np.zeros(6, np.float32)}, "it lacks the cameras"),
        ({"observation.images.front": np.zeros((4, 4), np.uint8)}, "a frame has three dimensions"),
    ):
        if isinstance(content, bytes):
            first.write_bytes(content)
        else:
            np.savez(first, **content)
        assert says in refuses(saved, capsys, "--observations", str(log))
    shutil.copy(folder / "episode_0" / "0.npz", first)
    (log / "info.json").write_text("[]")
    assert "no info.json as a dataset's" in refuses(saved, capsys, "--observations", str(log))
    (log / "info.json").unlink()
    (log / "episode_1" / "3.pt").write_bytes(b"")
    status, found = run(saved, tmp_path / "a.json", "--observations", str(log))
    assert status == 0 and found["frames"] == 3, "an observation that cannot be read costs itself alone"
    assert len(found["notes"]) == 1 and "3.pt is no observation" in found["notes"][0]


def test_demo_takes_a_recorded_frame(saved: Path, dataset: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("smolvla_fast.cli.demo.draw", lambda *_: None)  # takes longer than all the rest
    files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    command = ["demo", "--policy.path", str(saved), "--threads", "1", "--rounds", "1", *files]
    assert main([*command, "--dataset.root", str(dataset), "--dataset.episodes", "2"]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert re.fullmatch(r"frame \d+ of episode 2 in pick \(4 episodes\)", found["observation"])
    assert found["cameras"] == 2 and found["status"]["calls_stock"] == 0
