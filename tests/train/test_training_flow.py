"""The flow from a dataset to a trained policy: against LeRobot's own parts, reproducible, and without side effects."""

from __future__ import annotations

import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from lerobot.datasets import LeRobotDataset
from support.training_runs import same, weights

from smolvla_fast import training
from smolvla_fast.smolvla.features import ACTION
from smolvla_fast.testing.dataset import REPO_ID, write_dataset
from smolvla_fast.train import TrainingError
from smolvla_fast.train.data import held_out_batches, open_data, training_batches
from smolvla_fast.train.log import read_log
from smolvla_fast.train.reader import ColumnReader
from smolvla_fast.training import update

pytestmark = pytest.mark.training

TIMES = {
    ACTION: [i / 10 for i in range(6)],
    **{f"observation.{name}": [0] for name in ("state", "images.front", "images.wrist")},
}


def trained(bench_top, output, *flags):
    """Log without times, and weights, of a run of the command."""
    bench_top.train(output, *flags)
    log = [
        {k: e[k] for k in ("step", "loss", "grad_norm", "lr") if k in e}
        for e in read_log(output)
        if "loss" in e
    ]
    return log, weights(output / "checkpoints" / "last")


def test_lerobots_policy_trained_the_same_way_ends_at_the_same_bits(bench_top, finished, tmp_path):
    """Same checkpoint, same seed: losses, gradient norms and weights of three steps, prefix trained too."""
    start = f"--policy.path={finished / 'checkpoints' / 'last' / 'pretrained_model'}"
    flags = (start, "--steps=3", "--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false")
    ours = trained(bench_top, tmp_path / "ours", *flags)
    theirs = trained(bench_top, tmp_path / "theirs", *flags, "--implementation=lerobot")
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys() and same(ours[1], theirs[1])


def test_the_steps_are_those_of_lerobots_loop(bench_top, finished, tmp_path):
    """``lerobot_train.update_policy`` with LeRobot's dataset, order, processors, optimizer and schedule, beside ours."""
    from accelerate import Accelerator
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.datasets import EpisodeAwareSampler, make_dataset
    from lerobot.optim.factory import make_optimizer_and_scheduler
    from lerobot.policies import make_policy, make_pre_post_processors
    from lerobot.scripts.lerobot_train import update_policy
    from lerobot.utils.logging_utils import AverageMeter, MetricsTracker

    pretrained = finished / "checkpoints" / "last" / "pretrained_model"
    config = TrainPipelineConfig.from_pretrained(pretrained)
    config.dataset.video_backend = "pyav"
    dataset = make_dataset(config)
    config.policy.pretrained_path = pretrained
    policy = make_policy(config.policy, dataset.meta)
    preprocess, _ = make_pre_post_processors(config.policy, str(pretrained))
    optimizer, scheduler = make_optimizer_and_scheduler(config, policy)
    ends = dataset.meta.episodes["dataset_from_index"], dataset.meta.episodes["dataset_to_index"]
    sampler = EpisodeAwareSampler(*ends, shuffle=True, seed=config.seed)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size=4, sampler=sampler))
    accelerator = Accelerator(cpu=True)
    meters = {name: AverageMeter(name) for name in ("loss", "grad_norm", "lr", "update_s")}
    theirs = []
    with torch.random.fork_rng():
        batches = [preprocess(next(loader)) for _ in range(3)]
        torch.manual_seed(0)
        for batch in batches:
            tracker = MetricsTracker(4, 1, 1, deepcopy(meters), accelerator=accelerator)
            update_policy(
                tracker, policy, batch, optimizer, config.optimizer.grad_clip_norm, accelerator, scheduler
            )
            theirs.append((tracker.loss.val, tracker.grad_norm.val))

    run = bench_top.prepare(tmp_path / "run", f"--policy.path={pretrained}", "--steps=4", "--fast=off")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = training_batches(run.settings, run.data.train, 0)
        facts = [update(run, own) for _ in range(3)]
    assert [(f["loss"], f["grad_norm"]) for f in facts] == theirs
    ours = run.policy.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in policy.state_dict().items())


def test_accumulated_gradients_are_those_of_the_mean_loss(bench_top, tmp_path):
    """Two batches of 4 against the mean of two losses, differentiated by itself, in the same noise."""
    run = bench_top.prepare(
        tmp_path / "run", "--gradient_accumulation_steps=2", "--policy.optimizer_grad_clip_norm=0"
    )
    batches = training_batches(run.settings, run.data.train, 0)
    two = [next(batches) for _ in range(2)]
    twin = deepcopy(run.policy)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        total = sum(twin.forward(run.preprocess(deepcopy(batch)))[0] for batch in two) / 2
        total.backward()
        torch.manual_seed(0)
        run.optimizer.zero_grad = lambda: None
        facts = update(run, iter(two))
    assert facts["loss"] == pytest.approx(total.item(), rel=1e-6)  # a sum of two in another order
    for (name, one), two in zip(run.policy.named_parameters(), twin.parameters(), strict=True):
        if two.grad is None:
            assert one.grad is None, name
        else:
            # 1e-5 of the largest: fp32 sums over a batch and over two, in another order
            assert (one.grad - two.grad).abs().max() <= 1e-5 * two.grad.abs().max(), name


def test_a_seed_is_reproduced_and_another_is_another(bench_top, tmp_path):
    first = trained(bench_top, tmp_path / "first", "--steps=3")
    torch.manual_seed(123)
    again = trained(bench_top, tmp_path / "again", "--steps=3")
    other = trained(bench_top, tmp_path / "other", "--steps=3", "--seed=7")
    assert first[0] == again[0] and same(first[1], again[1])
    assert first[0] != other[0] and not same(first[1], other[1])


def test_workers_evaluation_and_checkpoints_change_nothing(bench_top, tmp_path):
    plain = trained(bench_top, tmp_path / "plain", "--steps=3", "--dataset.eval_split=0.25")
    extras = ("--num_workers=2", "--eval_steps=1", "--save_freq=1", "--max_eval_samples=5")
    busy = trained(bench_top, tmp_path / "busy", "--steps=3", "--dataset.eval_split=0.25", *extras)
    assert plain[0] == busy[0] and same(plain[1], busy[1])
    losses = [entry["eval_loss"] for entry in read_log(tmp_path / "busy") if "eval_loss" in entry]
    assert len(set(losses)) == 3


def test_the_callers_random_state_comes_back(bench_top, tmp_path):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    bench_top.train(tmp_path / "run")
    with pytest.raises(TrainingError):
        bench_top.train(tmp_path / "refused", "--dataset.root=/no/such")
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_frozen_weights_stay_and_the_others_move(bench_top, finished, tmp_path):
    start = finished / "checkpoints" / "last"
    _, end = trained(bench_top, tmp_path / "run", f"--policy.path={start / 'pretrained_model'}")
    before = weights(start)
    moved = {name for name, value in end.items() if not torch.equal(value, before[name])}
    assert moved and all(".vlm." not in name for name in moved)
    assert {name for name in end if "lm_expert" in name and "layernorm" not in name} <= moved


def test_reading_by_column_gives_lerobots_samples(bench_top):
    for episodes in (None, [0, 2]):
        stock = LeRobotDataset(
            REPO_ID, root=bench_top.data, episodes=episodes, delta_timestamps=TIMES, video_backend="pyav",
            return_uint8=True,
        )  # fmt: skip
        settings = bench_top.settings(
            bench_top.root / "unused", *([f"--dataset.episodes={episodes}"] if episodes else [])
        )
        ours = open_data(settings).train
        assert type(ours.reader) is ColumnReader and type(stock.reader) is not ColumnReader
        for index in (0, 5, 26, len(stock) - 1):  # the start, the end of an episode and of all
            a, b = stock[index], ours[index]
            assert a.keys() == b.keys()
            for key, value in a.items():
                assert type(value) is type(b[key]) and np.array_equal(value, b[key]), key
                assert not isinstance(value, torch.Tensor) or value.dtype is b[key].dtype


def test_reading_by_column_decodes_no_image_for_an_action(bench_top, monkeypatch):
    from datasets import Image

    decode, decoded = Image.decode_example, []
    monkeypatch.setattr(Image, "decode_example", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    stock = LeRobotDataset(REPO_ID, root=bench_top.data, delta_timestamps=TIMES, video_backend="pyav")
    ours = open_data(bench_top.settings(bench_top.root / "unused")).train
    counts = []
    for dataset in (stock, ours):
        decoded.clear()
        dataset[3]
        counts.append(len(decoded))
    # Two cameras: LeRobot's row, six rows for the actions, one each for state and cameras; ours the row, and each camera.
    assert counts == [2 + 12 + 2 + 4, 4]


def test_train_reads_video_frames(tmp_path, bench_top):
    write_dataset(tmp_path / "video", episodes=2, frame=(32, 32), videos=True)
    flags = (f"--dataset.root={tmp_path / 'video'}", "--dataset.video_backend=pyav")
    run = bench_top.prepare(tmp_path / "run", *flags, steps=1)
    frame = next(training_batches(run.settings, run.data.train, 0))["observation.images.front"]
    assert frame.dtype is torch.uint8  # a quarter of the traffic; floats on the device
    assert run.data.train.meta.video_keys == ["observation.images.front", "observation.images.wrist"]


def test_epochs_are_whole_and_in_another_order(bench_top, tmp_path):
    settings = bench_top.settings(tmp_path / "run", "--batch_size=10")
    dataset = open_data(settings).train
    batches = training_batches(settings, dataset, 0)
    count = -(-len(dataset) // 10)
    epochs = [torch.cat([next(batches)["index"] for _ in range(count)]).tolist() for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(dataset))) and epochs[0] != epochs[1]
    later = training_batches(settings, dataset, count + 2)
    assert next(later)["index"].tolist() == epochs[1][20:30]


def test_the_curve_is_drawn(finished):
    from PIL import Image

    assert Image.open(finished / "train_log.png").size[0] > 600


def test_the_dataset_tells_by_images_alone_where_the_cube_is(bench_top, tmp_path):
    """Same seed, same bits. Another one: the first states are the same, images and actions are not."""
    first = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 5)):
        item = write_dataset(tmp_path / name, episodes=1, seed=seed, frame=(16, 24))[0]
        first[name] = {key: item[key] for key in TIMES}
    assert all(torch.equal(first["one"][key], first["again"][key]) for key in TIMES)
    differ = {key for key in TIMES if not torch.equal(first["one"][key], first["other"][key])}
    assert differ == set(TIMES) - {"observation.state"}
    for wrong in (dict(joints=3), dict(cameras=["side"]), dict(cameras=[])):
        with pytest.raises(ValueError, match="accepted are cameras out of .* and joints >= 4"):
            write_dataset(tmp_path / "wrong", **wrong)


def test_action_error_measures_chunks_and_the_best_constant(bench_top, demo, tmp_path):
    """A policy that answers with the right chunk has no error, one that answers with a constant at least the constant's."""
    run = bench_top.prepare(tmp_path / "run", "--dataset.eval_split=0.25")
    batches = [raw for _, raw in held_out_batches(run.settings, run.data.held_out)]

    class Answers:
        def __init__(self, answer):
            self.config, self.predict_action_chunk = run.policy.config, answer

    error, constant = demo.action_error(Answers(lambda batch: batch[ACTION].clone()), run.preprocess, batches)
    assert error == 0 and constant > 0
    zero, again = demo.action_error(
        Answers(lambda batch: torch.zeros_like(batch[ACTION])), run.preprocess, batches
    )
    assert again == constant and zero >= constant
    seen = {}
    for wrong in (False, True):
        images = []
        watch = Answers(
            lambda batch, images=images: images.append(batch["observation.images.front"]) or batch[ACTION]
        )
        demo.action_error(watch, run.preprocess, batches, wrong_images=wrong)
        seen[wrong] = torch.cat(images)
    assert torch.equal(seen[True], seen[False].roll(len(seen[False]) // 2, 0))
    once, twice = (training._held_out_loss(run) for _ in range(2))
    assert once == twice and run.policy.training


UNEVEN = ("--policy.num_expert_layers=2", "--policy.self_attn_every_n_layers=0")
"""Flags of a policy that the fast path leaves to stock."""


@pytest.mark.parametrize(
    ("flags", "path"),
    [
        (["--fast=off"], "plain, as asked for"),
        (["--fast=on"], "patched for training"),
        (UNEVEN, "plain: 2 expert layers beside 4"),
        (["--image_cache=90000000"], "patched for training, AdamW fused, image tokens of "),
        (
            ["--image_cache=90000000", "--policy.train_expert_only=false"],
            "patched for training, AdamW fused, image_cache without effect (vision tower or connector learn",
        ),
        (
            ["--image_cache=90000000", *UNEVEN],
            "plain: 2 expert layers beside 4 text layers, image_cache without effect (the policy is not patched",
        ),
    ],
)
def test_a_run_names_its_path(bench_top, tmp_path, flags, path):
    """The command prints it: see ``test_bf16_that_runs_in_fp32_is_said``."""
    said = bench_top.prepare(tmp_path / "run", *flags).path
    assert said.startswith(path) and ("GB" in said) == ("image tokens" in path)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (UNEVEN, "2 expert layers beside 4.*--fast=auto"),
        (
            ["--policy.resize_imgs_with_padding=[64,64]"],
            r"resize_imgs_with_padding=\(64, 64\); accepted is \(32, 32\)",
        ),
        ([], "SMOLVLA_FAST_DISABLE is set"),
    ],
)
def test_fast_on_is_refused_where_it_cannot_be_kept(bench_top, tmp_path, monkeypatch, flags, says):
    if not flags:
        monkeypatch.setenv("SMOLVLA_FAST_DISABLE", "1")
    with pytest.raises(TrainingError, match=says):
        bench_top.prepare(tmp_path / "run", "--fast=on", *flags)


def test_the_fast_path_updates_in_one_pass_and_by_the_same_rule(bench_top, tmp_path):
    """AdamW fused beside torch's own loop: the same gradients, weights apart by the rounding of three updates."""
    fast = bench_top.prepare(tmp_path / "fast", "--fast=on", "--policy.optimizer_lr=0.01")
    plain = bench_top.prepare(tmp_path / "plain", "--fast=off", "--policy.optimizer_lr=0.01")
    assert fast.optimizer.param_groups[0]["fused"] is True and "AdamW fused" in fast.path
    assert plain.optimizer.param_groups[0]["fused"] is None and "AdamW" not in plain.path
    plain.policy.load_state_dict(fast.policy.state_dict())
    begun = {name: each.detach().clone() for name, each in fast.policy.named_parameters()}
    batch = fast.preprocess(next(training_batches(fast.settings, fast.data.train, 0)))
    for _ in range(3):
        fast.optimizer.zero_grad()
        fast.policy.forward(deepcopy(batch))[0].backward()
        for one, two in zip(fast.policy.parameters(), plain.policy.parameters(), strict=True):
            two.grad = None if one.grad is None else one.grad.clone()
        fast.optimizer.step()
        plain.optimizer.step()
    moved = 0
    for (name, one), two in zip(fast.policy.named_parameters(), plain.policy.parameters(), strict=True):
        # An update is a few operations of fp32, rounded at 6e-8 each, on numbers up to the weight and its way.
        far = (one - begun[name]).abs().max()
        assert (one - two).abs().max() <= 1e-6 * (far + one.abs().max()), name
        moved += bool(far > 0)
    assert moved > 20


def test_lerobots_optimizer_stays_where_the_policy_is_not_patched(bench_top, tmp_path):
    run = bench_top.prepare(tmp_path / "run", "--fast=auto", *UNEVEN)
    assert run.path.startswith("plain: ") and run.optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize("slow", [None, "no bf16 here"])
def test_bf16_that_runs_in_fp32_is_said(bench_top, tmp_path, capsys, monkeypatch, slow):
    monkeypatch.setattr("smolvla_fast.train.policy.why_bf16_is_slow", lambda: slow)
    assert bench_top.command(tmp_path / "run", "--dtype=bf16", "--steps=1") == 0
    said = "on cpu under bf16 autocast, patched for training, AdamW fused" + (
        f", products in fp32 ({slow})" if slow else "\n"
    )
    out = capsys.readouterr().out
    assert said in out and " float32)" in out
