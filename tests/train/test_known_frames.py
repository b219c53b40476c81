"""Frames whose image tokens are known: not decoded, and the run's bits are those of a run that encodes them."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import datasets
import pytest
import torch
from lerobot.datasets import LeRobotDatasetMetadata, dataset_reader
from support.training_runs import BenchTop, go_on, same, state_files, weights

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.loss import engine as loss_engine
from smolvla_fast.loss.token_store import RESULT
from smolvla_fast.testing.dataset import write_dataset
from smolvla_fast.train import TrainingError
from smolvla_fast.train.data import training_batches
from smolvla_fast.train.known_frames import _fingerprint as fingerprint
from smolvla_fast.train.readable import KNOWN, TOKENS, Readable
from smolvla_fast.training import loss_of, train, update

pytestmark = pytest.mark.training

PATIENCE = 240


@pytest.fixture(scope="module")
def video_top(tmp_path_factory):
    """A tiny backbone, and a dataset of two short episodes as video."""
    top = BenchTop.__new__(BenchTop)
    top.root = tmp_path_factory.mktemp("known")
    top.vlm, top.data = top.backbone("vlm"), top.root / "data"
    top.frames = len(write_dataset(top.data, episodes=2, frame=(32, 32), videos=True))
    return top


@pytest.fixture(scope="module")
def filled(video_top):
    """A folder that ``encode`` has filled for ``flags``. Not to be changed: copy it."""
    folder = video_top.root / "tokens"
    assert main(["encode", *flags(video_top, folder)]) == 0
    return folder


def flags(top, folder, *more):
    """Of a run that keeps tokens in a folder."""
    return top.flags(
        top.root / "unused", "--dataset.video_backend=pyav", f"--image_cache_dir={folder}", *more
    )


def copied(filled, tmp_path):
    return shutil.copytree(filled, tmp_path / "tokens")


def prepared(top, output, *more):
    """A run with the fresh weights that the command's seed gives it."""
    torch.manual_seed(1000)
    return top.prepare(output, "--dataset.video_backend=pyav", "--fast=on", *more)


def steps(run, count):
    batches = training_batches(run.settings, run.data.train, 0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [(facts["loss"], facts["grad_norm"]) for facts in (update(run, batches) for _ in range(count))]


def known_rows(run):
    return [run.known.store.read(frame) is not None for frame in range(len(run.data.train))]


@pytest.fixture
def decoded(monkeypatch):
    """Counts, as a list of names, what LeRobot and datasets decode in this process."""
    calls = []

    def counting(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counting(dataset_reader, "decode_video_frames")
    counting(datasets.Image, "decode_example")
    return calls


@pytest.fixture(params=["video", "images"])
def top(request, video_top, bench_top):
    return video_top if request.param == "video" else bench_top


SEEN_OTHERWISE = ("--policy.empty_cameras=1", "--policy.add_image_special_tokens=true")


@pytest.mark.parametrize(
    ("top", "more"), [("video", ()), ("images", ()), ("images", SEEN_OTHERWISE)], indirect=["top"]
)
def test_a_run_ends_at_the_bits_of_one_that_encodes_at_every_epoch(top, tmp_path, more, decoded):
    """Against the cache of ``patch``, which decodes every frame, through two epochs of one episode."""
    more = ("--dataset.episodes=[0]", "--batch_size=5", *more)
    looks_up = prepared(top, tmp_path / "a", *more)
    smolvla_fast.patch(looks_up.policy, training=True, image_cache=10**8)
    keeps = prepared(top, tmp_path / "b", *more, "--image_cache=100000000")
    frames = len(keeps.data.train)
    count = 2 * -(-frames // 5)
    expected = steps(looks_up, count)
    decoded.clear()
    assert steps(keeps, count) == expected
    # Two cameras, each frame once; LeRobot decodes the image of a parquet file twice a sample.
    assert len(decoded) == 2 * frames * (1 if keeps.data.train.meta.video_keys else 2)
    assert smolvla_fast.status(looks_up.policy).training_cache["hits"] > 0
    assert same(keeps.policy.state_dict(), looks_up.policy.state_dict())
    assert all(known_rows(keeps)) and smolvla_fast.status(keeps.policy).training_stock == 0
    assert "prepare_images" not in vars(keeps.policy)


def test_adapters_train_on_known_frames(bench_top, finished, tmp_path):
    """Adapters on the expert leave the tower as it is; PEFT's wrapper is called, the policy inside it is given tokens."""
    source = f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"
    more = (source, "--peft.r=4", "--dataset.episodes=[0]")
    looks_up = prepared(bench_top, tmp_path / "a", *more)
    smolvla_fast.patch(looks_up.policy, training=True, image_cache=10**8)
    keeps = prepared(bench_top, tmp_path / "b", *more, "--image_cache=100000000")
    count = 2 * -(-len(keeps.data.train) // 4)
    assert steps(keeps, count) == steps(looks_up, count)
    assert all(known_rows(keeps)) and smolvla_fast.status(keeps.policy).training_stock == 0


def test_known_tokens_are_those_the_step_would_make(top, tmp_path):
    """Each row, to the bit, against the frame read by LeRobot and encoded by the cache of ``patch``."""
    run = prepared(top, tmp_path / "run", "--image_cache=100000000", "--batch_size=7")
    steps(run, -(-len(run.data.train) // 7))
    smolvla_fast.patch(run.policy, training=True, image_cache=10**8)
    engine = smolvla_fast.patching.runtime.runtime_of(run.policy.model).training.look(run.policy.model)[0]
    store = run.known.store
    run.known.close()
    for row in range(0, len(run.data.train), 9):
        sample = run.data.train[row]
        raw = torch.utils.data.default_collate([sample])
        loss_of(run, run.policy, run.prepared(raw), 1)
        made = list(engine.cache._tokens.values())[-2:]
        assert torch.equal(store.read(int(sample["index"])), torch.stack(made))


def test_known_samples_have_the_bits_of_decoded_ones(top, tmp_path, decoded):
    """All columns but the images: state, chunk of actions, padding, task, of every row of some episodes."""
    last = 1 if top.frames < 80 else 3
    run = prepared(top, tmp_path / "run", f"--dataset.episodes=[{last}]", "--image_cache=100000000")
    dataset, store = run.data.train, run.known.store
    reads = Readable(dataset)
    assert not reads[0][KNOWN] and TOKENS not in reads[0]
    for row in range(len(dataset)):
        whole = dataset[row]
        assert whole.pop(KNOWN) is False
        store.write(int(whole["index"]), torch.full(store.shape, float(row)))
        decoded.clear()
        found = reads[row]
        assert not decoded
        assert found.pop(KNOWN) and torch.equal(found.pop(TOKENS), torch.full(store.shape, float(row)))
        rest = {key: value for key, value in whole.items() if key not in dataset.meta.camera_keys}
        assert (
            found.keys() == rest.keys()
            and "action_is_pad" in rest
            and "observation.images.front_is_pad" in rest
        )
        for key, value in rest.items():
            assert type(found[key]) is type(value), key
            assert (
                torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
            ), key
            assert not isinstance(value, torch.Tensor) or found[key].dtype is value.dtype, key


def test_nothing_is_decoded_once_all_is_known(video_top, filled, tmp_path, decoded):
    """An epoch and the held-out losses, on what ``encode`` has written."""
    more = (f"--image_cache_dir={filled}", "--dataset.eval_split=0.5", "--eval_steps=1", "--steps=8")
    run = prepared(video_top, tmp_path / "run", *more)
    decoded.clear()
    steps(run, 8)
    smolvla_fast.training._held_out_loss(run)
    assert not decoded and smolvla_fast.status(run.policy).training_fast > 8


def test_a_batch_of_known_and_new_frames_has_the_bits_of_new_ones(top, tmp_path):
    """Whichever of four frames are known: one loss, and one batch order."""
    run = prepared(top, tmp_path / "run", "--image_cache=100000000")
    batches, rows = {}, [3, 11, 0, 7]
    sampled = [Readable(run.data.train)[row] for row in rows]
    whole = dict(zip(rows, sampled, strict=True))
    collate = smolvla_fast.train.readable.Collate(None)

    def loss(samples):
        raw = collate(samples)
        batches[int(raw[KNOWN].sum())] = raw
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loss_of(run, run.policy, run.prepared(raw), 4).item()

    plain = loss(sampled)
    for known in ({3}, {0, 7}, {11, 0}, {3, 11, 0, 7}):
        reads = Readable(run.data.train)
        mixed = [reads[row] if row in known else whole[row] for row in rows]
        assert [sample[KNOWN] for sample in mixed] == [row in known for row in rows]
        assert loss(mixed) == plain
    assert TOKENS not in batches[0] and not any(k[-12:] == "images.front" for k in batches[4])
    assert torch.equal(batches[0]["action"], batches[4]["action"]) and batches[2][TOKENS].shape[0] == 2


def test_a_resumed_run_ends_at_the_same_bits(video_top, filled, tmp_path):
    """Tokens in memory throughout; stopped and gone on with a folder in which some are known, one damaged."""
    more = ("--dataset.episodes=[0]", "--batch_size=10", "--steps=5", "--dataset.video_backend=pyav")
    whole, parts, folder = tmp_path / "whole", tmp_path / "parts", copied(filled, tmp_path)
    video_top.train(whole, *more, "--image_cache=100000000")
    [tokens] = folder.glob("*/tokens")
    content = bytearray(tokens.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    content[100] ^= 1
    tokens.write_bytes(content)
    video_top.train(parts, *more, "--save_freq=2", f"--image_cache_dir={folder}")
    for step in ("000004", "000005"):
        shutil.rmtree(parts / "checkpoints" / step)
    torch.manual_seed(99)
    go_on(parts)
    one, two = (each / "checkpoints" / "000005" for each in (whole, parts))
    assert same(weights(one), weights(two)) and state_files(one) == state_files(two)


def test_a_run_that_has_ended_reads_images_again(video_top, filled, tmp_path):
    settings = video_top.settings(
        tmp_path / "run", "--dataset.video_backend=pyav", f"--image_cache_dir={filled}"
    )
    within = []
    done = train(settings, on_begin=lambda run: within.append(run.data.train[0].keys()))
    ended = done.data.train[0].keys()
    assert TOKENS in within[0] and "observation.images.front" not in within[0]
    assert TOKENS not in ended and "observation.images.front" in ended


@pytest.mark.slow
def test_workers_read_what_the_trainer_has_written(video_top, tmp_path):
    """A spawned process maps the memory of this one: its second epoch has tokens alone. Once they are gone it reads files
    again, and names the one that has been damaged meanwhile."""
    data = shutil.copytree(video_top.data, tmp_path / "data")
    more = (f"--dataset.root={data}", "--image_cache=100000000", "--num_workers=1", "--dataset.episodes=[0]")
    run = prepared(video_top, tmp_path / "run", *more)
    batches = training_batches(run.settings, run.data.train, 0)
    count = -(-len(run.data.train) // 4)
    seen = []

    def noted():
        for batch in batches:
            seen.append(int(batch[KNOWN].sum()))
            yield batch

    source = noted()
    for _ in range(2 * count + 1):
        update(run, source)
    assert seen[0] == 0 and seen[-1] == 4
    [video] = data.glob("videos/observation.images.wrist/*/*.mp4")
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    run.known.store._rows[:] = 0
    with pytest.raises(TrainingError, match=r"observation\.images\.wrist at frame \d+ of episode 0") as error:
        for _ in range(2 * count):
            update(run, source)
    assert str(video.relative_to(data)) in str(error.value) and "is cut off" in str(error.value)
    assert "again" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    # Of the four reasons, which one comparison of what was noted finds, two.
    ["dataset", "vision tower", *(pytest.param(name, marks=pytest.mark.long) for name in ("dtype", RESULT))],
)
def test_what_has_changed_is_encoded_anew_and_said(video_top, filled, tmp_path, monkeypatch, caplog, change):
    folder = copied(filled, tmp_path)
    again = ["encode", *flags(video_top, folder)]
    [before] = [path.read_bytes() for path in folder.glob("*/tokens")]
    if change == "dataset":
        data = shutil.copytree(video_top.data, tmp_path / "data", copy_function=shutil.copy2)
        again.append(f"--dataset.root={data}")
        assert main(again) == 0 and not caplog.text, "the same files in another place"
        video = next(data.glob("videos/*/*/*.mp4"))
        os.utime(video, ns=(0, video.stat().st_mtime_ns + 1))
    elif change == "dtype":
        monkeypatch.setattr(loss_engine, "why_bf16_is_slow", lambda: None)
        again.append("--dtype=bf16")
    elif change == RESULT:
        again.append("--policy.normalization_mapping={VISUAL: MEAN_STD, STATE: MEAN_STD, ACTION: MEAN_STD}")
    else:
        again.append("--seed=7")  # the weights are fresh
    assert main(again) == 0
    assert f"not the same {change} as in {folder}" in caplog.text and "frames are encoded anew" in caplog.text
    after = [path.read_bytes() for path in folder.glob("*/tokens")]
    assert len(after) == 2 and before in after


def start_encode(top, folder, *more):
    """``smolvla-fast encode`` as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "smolvla_fast.cli", "encode", *flags(top, folder, *more)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.long
@pytest.mark.slow
def test_two_encoders_at_once_fill_one_folder(video_top, filled, tmp_path):
    encoders = [start_encode(video_top, tmp_path / "both", "--batch_size=1") for _ in range(2)]
    said = [each.communicate(timeout=PATIENCE)[0] for each in encoders]
    assert [each.returncode for each in encoders] == [0, 0], said
    [made], [expected] = (
        [p.read_bytes() for p in each.glob("*/tokens")] for each in (tmp_path / "both", filled)
    )
    assert made == expected


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_an_encoder_goes_on_where_it_was_killed(video_top, filled, tmp_path, capsys):
    """Killed once some rows are known; the frames that are left are encoded, and the file is that of one run."""
    folder = tmp_path / "tokens"
    # A fork, which has imported all.
    command = (["encode", *flags(video_top, folder, "--batch_size=1")],)
    encoder = multiprocessing.get_context("fork").Process(target=main, args=command)
    encoder.start()
    until = time.monotonic() + PATIENCE
    while not any(any(path.read_bytes()) for path in folder.glob("*/tokens")) and time.monotonic() < until:
        time.sleep(0.01)
    encoder.kill()
    encoder.join()
    [tokens] = folder.glob("*/tokens")
    # A fast machine may be done by now; its last row then goes back to unknown.
    content = tokens.read_bytes()
    tokens.write_bytes(content[: -len(content) // video_top.frames] + bytes(len(content) // video_top.frames))
    assert main(["encode", *flags(video_top, folder)]) == 0
    new, known = map(
        int, re.search(r"encoded (\d+) frames in .*; (\d+) were known", capsys.readouterr().out).groups()
    )
    assert new > 0 < known and new + known == video_top.frames
    assert tokens.read_bytes() == next(filled.glob("*/tokens")).read_bytes()


def test_a_full_disk_is_said_before_a_frame_is_encoded(video_top, tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert main(["encode", *flags(video_top, tmp_path / "tokens")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr()
    assert "cannot hold the image tokens: " in said.err and "File too large; free some space" in said.err
    assert not said.out


def test_a_run_that_goes_on_can_be_encoded_ahead(finished, tmp_path, capsys):
    """By the flags of the resume, and from the checkpoint's own weights."""
    again = ["--resume=true", f"--output_dir={finished}", f"--image_cache_dir={tmp_path / 'tokens'}"]
    assert main(["encode", *again]) == 0 and "0 were known" in capsys.readouterr().out
    weights_of = f"--policy.path={finished / 'checkpoints' / '000002' / 'pretrained_model'}"
    run = ["--dataset.repo_id=smolvla_fast/pick", f"--dataset.root={finished.parent / 'data'}", weights_of]
    assert main(["encode", *run, "--policy.device=cpu", "--num_workers=0", again[-1]]) == 0
    assert "encoded 0 frames" in capsys.readouterr().out, "the tower of an earlier step is the same"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--image_cache_dir=",), "no --image_cache_dir: give the folder"),
        (
            ("--image_cache_dir=/proc/version/x",),
            "cannot hold the image tokens: Not a directory; .*give another --image_cache_dir",
        ),
        (("--image_cache=100",), "not one fits into 100 bytes"),
        (("--dataset.root=/nowhere",), "there is no such folder"),
        (
            ("--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false"),
            "tower or connector learn.*; give --policy.train_expert_only=true",
        ),
        (("--fast=off",), "needs the fast path"),
        (
            ("--policy.num_expert_layers=2", "--policy.self_attn_every_n_layers=0"),
            "the policy is not patched",
        ),
        (("--dataset.image_transforms.enable=true",), "train with lerobot-train, which has them"),
    ],
)
def test_what_cannot_be_encoded_is_refused(video_top, tmp_path, capsys, more, says):
    assert main(["encode", *flags(video_top, tmp_path / "tokens", *more)]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_a_limit_keeps_what_fits_and_decodes_the_rest(video_top, tmp_path, decoded):
    run = prepared(video_top, tmp_path / "run", f"--image_cache={5 * 1544}", "--dataset.episodes=[0]")
    assert "room for the first 5" in run.path
    count = -(-len(run.data.train) // 4)
    decoded.clear()
    steps(run, 2 * count)
    assert known_rows(run)[:6] == [True] * 5 + [False]
    assert len(decoded) == 2 * (2 * len(run.data.train) - 5)


def test_a_cache_that_cannot_serve_has_a_receipt(bench_top, tmp_path):
    run = bench_top.prepare(tmp_path / "run", "--image_cache=1000000", "--policy.train_expert_only=false")
    reason = "vision tower or connector learn; tokens are made at every step"
    assert run.known.store is None and f"image_cache without effect ({reason})" in run.path
    assert smolvla_fast.status(run.policy).training_fallback_reasons["image cache"] == reason
    with pytest.raises(TrainingError, match="image_cache needs the fast path"):
        bench_top.settings(tmp_path / "refused", "--image_cache_dir=x", "--fast=off")


def test_without_linuxs_calls_frames_are_encoded_at_every_step(bench_top, tmp_path, monkeypatch):
    """As on macOS: a file with room that is not reserved would kill a process where the disk is full."""
    monkeypatch.delattr(os, "posix_fallocate")
    run = prepared(bench_top, tmp_path / "run", "--image_cache=1000000")
    assert run.known.store is None and "image_cache without effect (it needs Linux" in run.path


def test_image_tokens_are_refused_where_stock_computes_the_loss(bench_top, tmp_path):
    """And where the tower learns: given tokens would leave it as it is."""
    run = prepared(bench_top, tmp_path / "run", "--image_cache=1000000")
    raw = next(training_batches(run.settings, run.data.train, 0))
    with (
        pytest.raises(ValueError, match="image tokens are given.*float16; accepted is bfloat16; give images"),
        # Encoded before autocast, which on a processor with fast bf16 would make tokens of another dtype than the run's.
        run.known.given(batch := run.prepared(raw)),
        torch.autocast("cpu", torch.float16),
    ):
        run.policy.forward(batch)
    tower = run.policy.model.vlm_with_expert.get_vlm_model().connector
    tower.requires_grad_(True)
    with pytest.raises(ValueError, match="image tokens are given: vision tower or connector learn"):
        loss_of(run, run.policy, run.prepared(raw), 4)


def test_a_fingerprint_moves_with_every_file_that_is_read(video_top, tmp_path):
    """Also with one behind a link: a large disk may hold the videos."""
    data = shutil.copytree(video_top.data, tmp_path / "data", copy_function=shutil.copy2)
    elsewhere = shutil.move(data / "videos", tmp_path / "videos")
    (data / "videos").symlink_to(elsewhere, target_is_directory=True)
    meta = LeRobotDatasetMetadata("local/dataset", data)
    seen = {fingerprint(meta)}
    for name in ("meta/info.json", "meta/episodes/*/*.parquet", "data/*/*.parquet", "videos/*/*/*.mp4"):
        [file, *_] = data.glob(name)
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        assert fingerprint(meta) not in seen, name
        seen.add(fingerprint(meta))
    os.utime(data / "meta/stats.json", ns=(0, 0))  # frames are not read from it
    assert fingerprint(meta) in seen


def test_cameras_that_changed_places_have_other_tokens(bench_top, finished, tmp_path, caplog):
    folder, front, wrist = tmp_path / "tokens", "observation.images.front", "observation.images.wrist"
    source = f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"
    for more in ((), (f"--rename_map={{{front}: {wrist}, {wrist}: {front}}}",)):
        assert main(["encode", *flags(bench_top, folder, source, *more)]) == 0
    assert "not the same cameras as in" in caplog.text and len([*folder.glob("*/tokens")]) == 2
