"""Files of a dataset that are missing, cut off, empty or garbage: named, with episode and frame, and no traceback."""

from __future__ import annotations

import builtins
import importlib.abc
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.training_runs import drop_episode_statistics, refused, resume, state_files

from smolvla_fast.testing.dataset import write_dataset
from smolvla_fast.train import TrainingError
from smolvla_fast.train.data import held_out_batches, open_data, training_batches
from smolvla_fast.train.dataset_files import check_backend, file_fault
from smolvla_fast.train.readable import Readable

pytestmark = pytest.mark.training

EPISODES = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"
FRONT, WRIST = (f"videos/observation.images.{camera}/chunk-000/file-000.mp4" for camera in ("front", "wrist"))


@pytest.fixture(scope="module")
def filmed(bench_top):
    """Three episodes on video, one file a camera."""
    root = bench_top.root / "filmed"
    write_dataset(root, episodes=3, frame=(32, 32), videos=True)
    drop_episode_statistics(root)
    return root


@pytest.fixture(scope="module")
def in_two_files(bench_top):
    """The four episodes with pictures, the last two of them in a second file of data."""
    root = shutil.copytree(bench_top.data, bench_top.root / "in_two_files")
    data = pq.read_table(root / DATA)
    first = np.asarray(data["episode_index"]) < 2
    pq.write_table(data.filter(pa.array(~first)), root / DATA.replace("file-000", "file-001"))
    pq.write_table(data.filter(pa.array(first)), root / DATA)
    replace_column(root / EPISODES, "data/file_index", lambda values: [0, 0, 1, 1])
    return root


def replace_column(path: Path, name: str, change) -> None:
    table = pq.read_table(path)
    field = table.schema.field(name)
    column = pa.array(list(change(table[name].to_pylist())), type=field.type)
    pq.write_table(table.set_column(table.schema.get_field_index(name), field, column), path)


def root_of(source: Path, tmp_path: Path) -> Path:
    return shutil.copytree(source, tmp_path / "damaged")


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path: Path) -> None:
    path.write_bytes(b"\x93garbage" * 100)


def no_rows(path: Path) -> None:
    """A table alone has rows."""
    if path.suffix == ".parquet":
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    else:
        empty(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [missing, empty, no_rows, cut_off, garbage, a_folder]
FILES = ["meta/info.json", "meta/stats.json", "meta/tasks.parquet", EPISODES, DATA, FRONT, WRIST]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_before_the_first_step(name, damage, bench_top, filmed, tmp_path, capsys):
    root = root_of(filmed, tmp_path)
    damage(root / name)
    message = refused(
        bench_top, tmp_path / "run", capsys, f"--dataset.root={root}", "--dataset.video_backend=pyav"
    )
    shown = "meta/episodes" if name == EPISODES else "data/chunk" if name == DATA else name
    assert shown in message, message
    assert message.count("\n") == 1 and "Hub" not in message.split("Accepted is")[0], message
    assert any(way in message for way in ("again", "recompute_stats", "that holds meta/")), message
    if name in (FRONT, WRIST):
        assert "of episodes 0, 1, 2 " in message


def test_a_video_of_which_bytes_are_missing_is_cut_off(filmed, tmp_path):
    whole, short = (filmed / FRONT).read_bytes(), tmp_path / "short.mp4"
    assert file_fault(filmed / FRONT) is None
    short.write_bytes(whole[:-1])
    assert file_fault(short) == f"is cut off at {len(whole) - 1} bytes"
    for size in range(1, 1200, 60):  # within the header PyAV's errors are of several classes
        short.write_bytes(whole[:size])
        assert file_fault(short)


@pytest.mark.parametrize(
    ("damage", "way_out"),
    [
        (missing, True),
        (empty, False),
        (no_rows, False),
        (garbage, False),
    ],  # LeRobot reads every table that is there
)
def test_one_of_several_data_files_is_named_with_its_episodes(
    damage, way_out, bench_top, in_two_files, tmp_path, capsys
):
    root = root_of(in_two_files, tmp_path)
    damage(root / "data/chunk-000/file-001.parquet")
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={root}")
    assert "data/chunk-000/file-001.parquet" in message
    assert ("--dataset.episodes" in message) is way_out
    if way_out:
        assert "of episodes 2, 3 is missing" in message
        one = refused(
            bench_top, tmp_path / "run", capsys, f"--dataset.root={root}", "--dataset.episodes=[0,3]"
        )
        assert "of episode 3 is missing" in one
        flags = (f"--dataset.root={root}", "--dataset.episodes=[0,1]")
        assert bench_top.command(tmp_path / "run", *flags, "--steps=1") == 0


def lose_rows(root: Path) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(table.slice(0, len(table) - 5), root / DATA)


def turn_around(root: Path) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(table.take(np.arange(len(table))[::-1]), root / DATA)


def lose_tasks(root: Path) -> None:
    path = root / "meta/tasks.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def lose_episodes(root: Path) -> None:
    pq.write_table(pq.read_table(root / EPISODES).slice(0, 2), root / EPISODES)


def feature(name: str, **entries):
    """Another declaration of a feature in meta/info.json; without entries a camera with no column."""

    def change(root: Path) -> None:
        values = json.loads((root / "meta/info.json").read_text())
        own = values["features"].get(name, values["features"]["observation.images.front"])
        values["features"][name] = {**own, **entries}
        (root / "meta/info.json").write_text(json.dumps(values))

    return change


def of_version(version: str):
    def change(root: Path) -> None:
        values = json.loads((root / "meta/info.json").read_text())
        (root / "meta/info.json").write_text(json.dumps({**values, "codebase_version": version}))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lose_rows, ["data/chunk-000/file-000.parquet", "episode 3 has 18 rows instead of rows 78"], id="rows"),
        pytest.param(turn_around, ["episode 0 has 26 rows instead of rows 0 to 25 in this order"], id="order"),
        pytest.param(lose_tasks, ["meta/tasks.parquet", "0 tasks"], id="tasks"),
        pytest.param(lose_episodes, ["meta/episodes describes 2 episodes", "meta/info.json 4"], id="episodes"),
        pytest.param(
            feature("observation.state", shape=[7]),
            [DATA, "meta/info.json: 'observation.state' has the shape [7] there and [6] in the data"], id="state-shape",
        ),
        pytest.param(
            feature("action", shape=[5]), ["meta/info.json: 'action' has the shape [5] there and [6] in the data"],
            id="action-shape",
        ),
        pytest.param(
            feature("observation.images.top"),
            ["meta/info.json", "the column 'observation.images.top' that", "is missing from its data"], id="no-column",
        ),
        pytest.param(
            feature("observation.images.front", names=None),
            ["names null for the camera 'observation.images.front'", '"height", "width", "channels"'], id="no-names",
        ),
        pytest.param(
            feature("observation.images.front", names=["height"]),
            ['names ["height"] for the camera', '"height", "width", "channels"'], id="one-name",
        ),
        pytest.param(
            feature("observation.images.front", shape=[16, 24]),
            ["shape [16, 24] for the camera 'observation.images.front'", "[480, 640, 3]"], id="camera-shape",
        ),
        pytest.param(feature("action", shape=6), ["meta/info.json", "'action'"], id="no-shape"),
        pytest.param(feature("action", shape=[]), ["meta/info.json has shape [] for 'action'", "[6]"], id="empty-shape"),
        pytest.param(
            feature("timestamp", shape=[]), ["meta/info.json has shape [] for 'timestamp'", "[6]"], id="empty-shape-of-one"
        ),
        pytest.param(of_version("v2.1"), ["v2.1", "convert_dataset_v21_to_v30"], id="v2.1"),
        pytest.param(of_version("latest"), ["meta/info.json cannot be read"], id="no-version"),
        pytest.param(lambda root: shutil.rmtree(root / "meta"), ["meta/info.json is missing", "holds data"], id="meta"),
        pytest.param(lambda root: shutil.rmtree(root / "data"), ["data/chunk-000/file-000.parquet", "missing"], id="data"),
        pytest.param(lambda root: (shutil.rmtree(root), root.write_text("")), ["it is no folder"], id="a-file"),
        pytest.param(lambda root: (root / "meta/info.json").write_text("[]"), ["meta/info.json"], id="a-list"),
    ],
)  # fmt: skip
def test_train_names_the_fault_of_an_incomplete_dataset(change, says, bench_top, tmp_path, capsys):
    root = root_of(bench_top.data, tmp_path)
    change(root)
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={root}")
    assert all(part in message for part in [*says, str(root)]) and message.count("\n") == 1, message


def test_train_names_an_unreadable_file(bench_top, tmp_path, capsys, monkeypatch):
    """As another user's files do; the system's own refusal, for a test may run as one whom nothing is refused."""
    root = root_of(bench_top.data, tmp_path)
    opened = builtins.open

    def closed(path, *arguments, **options):
        if str(path).endswith("stats.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", closed)
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={root}")
    assert "meta/stats.json" in message and "Permission denied" in message


@pytest.mark.parametrize("call, closed", [("listdir", ""), ("stat", "meta/info.json")])
def test_train_names_a_folder_or_file_that_is_closed(call, closed, bench_top, tmp_path, capsys, monkeypatch):
    root, original = root_of(bench_top.data, tmp_path), getattr(os, call)
    (root / "meta/info.json").unlink()

    def refusing(path, *arguments, **options):
        if not isinstance(path, int) and Path(path) == root / closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, refusing)
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={root}")
    assert f"{root / closed} cannot be read" in message and "Permission denied" in message, message


@pytest.mark.parametrize("backend", ["torchcodec", "gpu"])
def test_a_decoder_that_cannot_be_loaded_is_refused_with_another(
    backend, bench_top, filmed, tmp_path, capsys
):
    if backend == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, OSError, RuntimeError):
            pass
        else:
            pytest.skip("torchcodec can be loaded here")
    flags = (f"--dataset.root={filmed}", f"--dataset.video_backend={backend}")
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert "dataset.video_backend" in message and backend in message and "pyav" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("loads", [True, False])
def test_another_decoder_is_advised_only_where_it_can_be_loaded(
    loads, bench_top, filmed, tmp_path, monkeypatch
):
    """Read by pyav; torchcodec as it is where it loads, and as it is without FFmpeg."""
    root = root_of(filmed, tmp_path)
    data = open_data(
        bench_top.settings(tmp_path / "run", f"--dataset.root={root}", "--dataset.video_backend=pyav")
    )

    def fail(*_):
        raise ValueError("Invalid data found when processing input")

    monkeypatch.setattr(data.train.reader, "_query_videos", fail)

    package = types.ModuleType("torchcodec")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.ModuleType("torchcodec.decoders"))
    if not loads:
        monkeypatch.delitem(sys.modules, "torchcodec.decoders")
        monkeypatch.setattr(sys, "meta_path", [NoFFmpeg(), *sys.meta_path])
    with pytest.raises(TrainingError) as error:
        Readable(data.train)[0]
    message = str(error.value)
    assert "observation.images.front at frame 0 of episode 0" in message and "Invalid data" in message
    assert ("try --dataset.video_backend=torchcodec" in message) is loads
    if not loads:
        with pytest.raises(TrainingError, match=r"Likely causes: 1\. FFmpeg is not properly installed\."):
            check_backend("torchcodec", True)


class NoFFmpeg(importlib.abc.MetaPathFinder):
    """Has torchcodec fail as it does where FFmpeg is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchcodec.decoders":
            raise RuntimeError(
                "Could not load libtorchcodec. Likely causes:\n\n  1. FFmpeg is not properly installed.\n  2. None fits."
            )


# --- Found at a frame, in this process or in a worker


def break_a_picture(root: Path, row: int) -> None:
    """Half of a PNG, of the wrist camera."""

    def change(values):
        values[row]["bytes"] = values[row]["bytes"][:40]
        return values

    replace_column(root / DATA, "observation.images.wrist", change)


def shift(root: Path, seconds: float) -> None:
    replace_column(
        root / EPISODES,
        "videos/observation.images.front/from_timestamp",
        lambda values: [v + seconds for v in values],
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_is_named_and_the_checkpoints_stay(workers, bench_top, tmp_path, capsys):
    root, output = root_of(bench_top.data, tmp_path), tmp_path / "run"
    flags = (f"--dataset.root={root}", f"--num_workers={workers}", "--save_freq=1", "--batch_size=2")
    data = open_data(bench_top.settings(output, *flags)).train
    batches = training_batches(bench_top.settings(output, *flags, "--num_workers=0"), data, 0)
    row = [next(batches) for _ in range(3)][2]["index"][0].item()
    break_a_picture(root, row)
    assert bench_top.command(output, *flags, "--steps=5") == 2
    message = capsys.readouterr().err
    held = data.hf_dataset.data
    episode, frame = (held.column(name)[row].as_py() for name in ("episode_index", "frame_index"))
    for part in (
        f"observation.images.wrist at frame {frame} of episode {episode}",
        DATA,
        str(root),
        "--dataset.episodes",
    ):
        assert part in message
    assert "Traceback" not in message and message.rstrip().count("\n") == 0, message
    assert sorted(p.name for p in (output / "checkpoints").glob("0*"))[-1] == "000002"
    # Mended, the run goes on from there.
    shutil.rmtree(root)
    shutil.copytree(bench_top.data, root)
    before = state_files(output / "checkpoints" / "000002")
    assert resume(output, "--steps=3") == 0 and state_files(output / "checkpoints" / "000002") == before


def lose_a_picture(root: Path, row: int) -> None:
    """Null in the place of a PNG, of the wrist camera."""

    def change(values):
        values[row] = None
        return values

    replace_column(root / DATA, "observation.images.wrist", change)


@pytest.mark.parametrize("damage_at", [break_a_picture, lose_a_picture])
@pytest.mark.parametrize("row", [0, -1])
def test_a_picture_that_is_broken_at_either_end_is_named_before_the_first_step(
    row, damage_at, bench_top, tmp_path, capsys
):
    root = root_of(bench_top.data, tmp_path)
    damage_at(root, row)
    message = refused(bench_top, tmp_path / "run", capsys, f"--dataset.root={root}")
    episode = 0 if row == 0 else 3
    assert re.search(
        rf"observation\.images\.wrist at frame \d+ of episode {episode} (cannot be read|is null)", message
    ), message
    assert DATA in message and "--dataset.episodes" in message and message.count("\n") == 1, message


@pytest.mark.parametrize("seconds", [0.07, -0.03])
def test_timestamps_that_are_off_are_named_at_their_frame(seconds, bench_top, filmed, tmp_path, capsys):
    root = root_of(filmed, tmp_path)
    shift(root, seconds)
    flags = (f"--dataset.root={root}", "--dataset.video_backend=pyav")
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert re.search(r"observation\.images\.front at frame \d+ of episode \d", message), message
    assert FRONT in message and "--tolerance_s" in message and message.count("\n") == 1, message


def test_timestamps_that_are_off_name_the_tolerance_that_takes_them(bench_top, filmed, tmp_path, capsys):
    root = root_of(filmed, tmp_path)
    shift(root, 0.03)
    flags = (f"--dataset.root={root}", "--dataset.video_backend=pyav", "--steps=1")
    message = refused(bench_top, tmp_path / "run", capsys, *flags)
    assert "observation.images.front at frame" in message and FRONT in message and "off by 0.03 s" in message
    assert "--tolerance_s=0.033" in message and "Traceback" not in message and message.count("\n") == 1
    assert bench_top.command(tmp_path / "run", *flags, "--tolerance_s=0.033") == 0


def test_timestamps_that_are_off_by_more_than_half_a_frame_name_no_tolerance(bench_top, filmed, tmp_path):
    root = root_of(filmed, tmp_path)
    shift(root, 60.0)
    settings = bench_top.settings(tmp_path / "run", f"--dataset.root={root}", "--dataset.video_backend=pyav")
    with pytest.raises(TrainingError, match="does not fit the data") as error:
        next(training_batches(settings, open_data(settings).train, 0))
    assert "give --tolerance_s" not in str(error.value)


# In a worker: test_known_frames.py, whose worker has other things to show as well.
@pytest.mark.parametrize("damage", [missing, garbage, cut_off])
def test_a_video_that_is_damaged_while_a_run_reads_is_named(damage, bench_top, filmed, tmp_path):
    root = root_of(filmed, tmp_path)
    settings = bench_top.settings(tmp_path / "run", f"--dataset.root={root}", "--dataset.video_backend=pyav")
    data = open_data(settings)
    damage(root / WRIST)
    with pytest.raises(
        TrainingError, match=r"observation\.images\.wrist at frame \d+ of episode \d"
    ) as error:
        for _ in zip(range(99), training_batches(settings, data.train, 0), strict=False):
            pass
    assert WRIST in str(error.value) and "again" in str(error.value) and "\n" not in str(error.value)


def test_a_held_out_frame_that_cannot_be_read_is_named(bench_top, tmp_path):
    root = root_of(bench_top.data, tmp_path)
    break_a_picture(root, bench_top.frames - 1)
    settings = bench_top.settings(tmp_path / "run", f"--dataset.root={root}", "--dataset.eval_split=0.25")
    with pytest.raises(TrainingError, match=r"observation\.images\.wrist at frame \d+ of episode 3"):
        list(held_out_batches(settings, open_data(settings).held_out))


def test_frames_of_two_sizes_are_named(bench_top, tmp_path):
    from io import BytesIO

    from PIL import Image

    root = root_of(bench_top.data, tmp_path)
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")

    def change(values):
        values[3]["bytes"] = file.getvalue()
        return values

    replace_column(root / DATA, "observation.images.front", change)
    settings = bench_top.settings(tmp_path / "run", f"--dataset.root={root}")
    with pytest.raises(
        TrainingError,
        match=r"make no batch: observation\.images\.front of \[1, 3, 16, 24\] and \[1, 3, 8, 8\]",
    ):
        for _ in zip(range(99), training_batches(settings, open_data(settings).train, 0), strict=False):
            pass


@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.parametrize("begun", [False, True], ids=["first", "resumed"])
def test_a_worker_that_dies_is_said(begun, bench_top, finished, tmp_path, capsys, monkeypatch):
    """Killed, as by a system without memory left. The trial reads in the process that trains."""
    read = Readable.__getitem__

    def deadly(self, row):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), 9)
        return read(self, row)

    monkeypatch.setattr(Readable, "__getitem__", deadly)
    if begun:
        folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
        assert resume(folder, "--steps=5", "--num_workers=1") == 2
    else:
        assert bench_top.command(tmp_path / "run", "--num_workers=1") == 2
    message = capsys.readouterr().err
    assert "a process that reads data died" in message and "--num_workers" in message
    assert ("--resume=true" in message) is begun


@pytest.mark.parametrize("gone_bad", ["a picture", "a number"])
def test_a_fault_of_a_run_s_data_names_flags_that_can_still_be_given(
    gone_bad, bench_top, finished, tmp_path, capsys
):
    """Episodes cannot be left out of a run that has begun: ``--resume=true`` refuses the flag."""
    root, output = (
        root_of(bench_top.data, tmp_path),
        shutil.copytree(finished, tmp_path / "run", symlinks=True),
    )
    if gone_bad == "a picture":
        break_a_picture(root, 0)
    else:
        replace_column(root / DATA, "action", lambda values: [np.full(6, np.nan), *values[1:]])
    assert resume(output, "--steps=5", f"--dataset.root={root}") == 2
    message = capsys.readouterr().err
    way = re.search(
        r"--dataset\.episodes need a new run, with (--policy\.path=\S+) and another --output_dir", message
    )
    assert way and "--tolerance_s need" not in message, message
    flags = (f"--dataset.root={root}", "--dataset.episodes=[1,2,3]", way[1])
    assert bench_top.command(tmp_path / "anew", *flags, "--steps=1") == 0
