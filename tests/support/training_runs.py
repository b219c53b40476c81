"""Short training runs, through the command and through its parts, on one tiny backbone and dataset."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from smolvla_fast import training
from smolvla_fast.cli import main
from smolvla_fast.cli import train as command
from smolvla_fast.testing.dataset import REPO_ID, write_dataset
from smolvla_fast.testing.policies import TINY_TEXT, TINY_VISION, TINY_VOCAB, make_vlm_folder
from smolvla_fast.train import random_state
from smolvla_fast.train.data import training_batches
from smolvla_fast.training import Run, prepare, train, update


class BenchTop:
    """Where the runs of a session find their backbone and their data."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vlm = self.backbone("vlm")
        self.data = root / "data"
        self.frames = len(write_dataset(self.data, episodes=4, frame=(16, 24)))

    def backbone(self, name: str, **text: Any) -> Path:
        folder = self.root / name
        return make_vlm_folder(folder, text={**TINY_TEXT, **text}, vision=TINY_VISION, vocab_size=TINY_VOCAB)

    def flags(self, output: Path, *more: str) -> list[str]:
        """Of a new run; the last of two equal flags holds. No log, for drawing its curve takes longer than such a run."""
        return [
            f"--dataset.repo_id={REPO_ID}", f"--dataset.root={self.data}", f"--policy.vlm_model_name={self.vlm}",
            "--policy.num_vlm_layers=4", "--policy.chunk_size=6", "--policy.n_action_steps=6",
            "--policy.resize_imgs_with_padding=[32,32]", "--policy.device=cpu", "--policy.optimizer_lr=0.001",
            "--policy.scheduler_warmup_steps=0", "--num_workers=0", "--batch_size=4", "--steps=2", "--save_freq=0",
            "--log_freq=0", f"--output_dir={output}", *more,
        ]  # fmt: skip

    def command(self, output: Path, *more: str) -> int:
        """``smolvla-fast train`` in this process; returns its exit status."""
        return main(["train", *self.flags(output, *more)])

    def train(self, output: Path, *more: str) -> None:
        """What the command does, without progress and curve, which take longer than such a run; with a log."""
        train(self.settings(output, "--log_freq=1", *more))

    def settings(self, output: Path, *more: str) -> Any:
        return read(self.flags(output, *more))[0]

    def prepare(self, output: Path, *more: str, steps: int = 0) -> Run:
        """A run that is ready to go, ``steps`` of it gone."""
        run = prepare(self.settings(output, *more))
        batches = training_batches(run.settings, run.data.train, 0)
        for _ in range(steps):
            update(run, batches)
            run.step += 1
        return run


def read(flags: list[str]) -> Any:
    """Settings and, on resume, checkpoint."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.read_settings(vars(parser.parse_args(flags)))


def go_on(output: Path) -> None:
    """``resume`` as ``BenchTop.train`` does it."""
    settings, checkpoint = read(["--resume=true", f"--output_dir={output}"])
    train(settings, resume=checkpoint)


def resume(output: Path, *more: str) -> int:
    return main(["train", "--resume=true", f"--output_dir={output}", *more])


def refused(bench_top, output, capsys, *flags):
    """The message of a command that must end with status 2 and write nothing."""
    assert bench_top.command(output, *flags) == 2
    assert not output.exists()
    return capsys.readouterr().err


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(str(checkpoint / "pretrained_model" / "model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Every tensor the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def state_files(checkpoint: Path) -> dict[str, bytes]:
    """All files of a checkpoint but those that name its folder or the number of steps that were asked for."""
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in ("train_config.json", "run.json")
    }


def record(root: Path, features: dict[str, Any], episodes: int = 2, frames: int = 8) -> str:
    """Writes a dataset of any features, {name: (dtype, shape)}, and returns its flag. Images and depth have a dtype of
    their own here; values are drawn by a feature's place in the list, so that one under another name has the same.
    """
    from lerobot.datasets import LeRobotDataset

    from smolvla_fast.testing.dataset import _quiet

    declared, draws = {}, []
    for name, (dtype, shape) in features.items():
        picture = dtype in ("image", "depth")
        declared[name] = {
            "dtype": "image" if picture else dtype, "shape": shape,
            "names": ["height", "width", "channels"] if picture else None, "info": {"is_depth_map": dtype == "depth"},
        }  # fmt: skip
        draws.append(lambda rng, dtype=dtype, shape=shape: _draw(rng, dtype, shape))
    dataset = LeRobotDataset.create(REPO_ID, 10, declared, root=root, use_videos=False, video_backend="pyav")
    rngs = [np.random.default_rng(place) for place in range(len(draws))]
    with _quiet():
        for _ in range(episodes):
            for _ in range(frames):
                values = [draw(rng) for draw, rng in zip(draws, rngs, strict=True)]
                dataset.add_frame({**dict(zip(declared, values, strict=True)), "task": "pick the cube"})
            dataset.save_episode()
        dataset.finalize()
    return f"--dataset.root={root}"


def _draw(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    if dtype == "string":
        return "gently"
    if dtype in ("image", "depth"):
        return rng.integers(0, 255, shape).astype("uint8" if dtype == "image" else "uint16")
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    return (rng.standard_normal(shape) if "float" in dtype else rng.integers(0, 100, shape)).astype(dtype)


def seeded_losses(monkeypatch, module: Any, name: str, read: Callable[[Any], tuple[float, float]]) -> list:
    """Has ``module.name``, the update of a loop, draw step n's noise from seed n; returns the list that its losses and
    gradient norms go to."""
    update, losses = getattr(module, name), []

    def step(*given: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(len(losses))
            result = update(*given, **options)
        losses.append(read(result))
        return result

    monkeypatch.setattr(module, name, step)
    return losses


def lerobot_train(monkeypatch, flags: list[str]) -> list[tuple[float, float]]:
    """Losses and gradient norms of LeRobot's own command under these flags, in this process, which stays as it was."""
    from lerobot.scripts import lerobot_train as stock

    root, backends = logging.getLogger(), (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = root.handlers[:], root.level, backends[0].benchmark, backends[1].allow_tf32
    losses = seeded_losses(monkeypatch, stock, "update_policy", lambda r: (r[0].loss.val, r[0].grad_norm.val))
    given = {flag.split("=")[0]: flag for flag in flags}  # draccus knows no flag twice
    more = ["--policy.push_to_hub=false", "--save_checkpoint=false", "--dataset.video_backend=pyav"]
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *given.values(), *more])
    try:
        with random_state.seeded(0):
            stock.train()
    finally:
        root.handlers[:], level, backends[0].benchmark, backends[1].allow_tf32 = before
        root.setLevel(level)
    return losses


def own_train(monkeypatch, settings: Any) -> list[tuple[float, float]]:
    """The same of ours."""
    losses = seeded_losses(monkeypatch, training, "update", lambda facts: (facts["loss"], facts["grad_norm"]))
    train(settings)
    return losses
