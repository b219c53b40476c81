"""Short training runs, through the command and through its parts, on one tiny backbone and dataset."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from draccus.wrappers import docstring
from safetensors.torch import load_file

from smolvla_fast import training
from smolvla_fast.cli import main
from smolvla_fast.cli import train as command
from smolvla_fast.testing.dataset import REPO_ID, write_dataset
from smolvla_fast.testing.policies import TINY_TEXT, TINY_VISION, TINY_VOCAB, make_vlm_folder
from smolvla_fast.train import random_state
from smolvla_fast.train.data import training_batches
from smolvla_fast.training import Run, prepare, train, update

# The parser of LeRobot's commands reads its sources for the help of every flag, in every command anew.
docstring.get_attribute_docstring = cache(docstring.get_attribute_docstring)


def drop_episode_statistics(root: Path) -> None:
    """Drops a hundred columns that LeRobot writes and training never reads: a dataset opens twice as fast without."""
    for path in (root / "meta" / "episodes").glob("*/*.parquet"):
        table = pq.read_table(path)
        kept = [name for name in table.column_names if not name.startswith("stats/")]
        pq.write_table(table.select(kept).replace_schema_metadata(), path)


class BenchTop:
    """The backbone and the dataset of a session, and runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.vlm = self.backbone("vlm")
        self.data = root / "data"
        self.frames = len(write_dataset(self.data, episodes=4, frame=(16, 24)))
        drop_episode_statistics(self.data)

    def backbone(self, name: str, **text: Any) -> Path:
        folder = self.root / name
        return make_vlm_folder(folder, text={**TINY_TEXT, **text}, vision=TINY_VISION, vocab_size=TINY_VOCAB)

    def flags(self, output: Path, *more: str) -> list[str]:
        """The flags of a new run; of two equal flags the last wins. Without log: its curve takes longer than the run."""
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
        """The command without progress and curve, which take longer than the run, but with a log."""
        train(self.settings(output, "--log_freq=1", *more))

    def settings(self, output: Path, *more: str) -> Any:
        return read(self.flags(output, *more))[0]

    def prepare(self, output: Path, *more: str, steps: int = 0) -> Run:
        """A run after its first ``steps`` steps."""
        run = prepare(self.settings(output, *more))
        batches = training_batches(run.settings, run.data.train, 0)
        for _ in range(steps):
            update(run, batches)
            run.step += 1
        return run


@cache
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


def read(flags: list[str]) -> Any:
    """Settings and, on resume, checkpoint."""
    return command.read_settings(vars(_parser().parse_args(flags)))


def go_on(output: Path, *more: str) -> None:
    """Resumes as ``BenchTop.train`` trains."""
    settings, checkpoint = read(["--resume=true", f"--output_dir={output}", *more])
    train(settings, resume=checkpoint)


def resume(output: Path, *more: str) -> int:
    return main(["train", "--resume=true", f"--output_dir={output}", *more])


def refused(bench_top, output, capsys, *flags):
    """Checks that a command ends with status 2 and writes nothing; returns its message."""
    assert bench_top.command(output, *flags) == 2
    assert not output.exists()
    return capsys.readouterr().err


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(str(checkpoint / "pretrained_model" / "model.safetensors"))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Every tensor the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def state_files(checkpoint: Path) -> dict[str, bytes]:
    """The files of a checkpoint, except those that hold its folder or the number of steps."""
    return {
        str(path.relative_to(checkpoint)): path.read_bytes()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in ("train_config.json", "run.json")
    }


def record(root: Path, features: dict[str, Any], episodes: int = 2, frames: int = 8) -> str:
    """Writes a dataset of any features, {name: (dtype, shape)}, and returns its flag.

    "image" and "depth" are dtypes here. Values depend on a feature's place in the list, not on its name.
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
    drop_episode_statistics(root)
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
    """Makes ``module.name``, the update of a loop, draw the noise of step n from seed n.

    returns  the list to which every update adds its loss and gradient norm
    """
    update, losses = getattr(module, name), []

    def step(*given: Any, **options: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(len(losses))
            result = update(*given, **options)
        losses.append(read(result))
        return result

    monkeypatch.setattr(module, name, step)
    return losses


def lerobot_command(monkeypatch, *flags: str) -> None:
    """Runs LeRobot's own command in this process, and restores its logging, backends and random state."""
    from lerobot.scripts import lerobot_train as stock

    root, backends = logging.getLogger(), (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = root.handlers[:], root.level, backends[0].benchmark, backends[1].allow_tf32
    monkeypatch.setattr(sys, "argv", ["lerobot-train", *flags])
    try:
        with random_state.seeded(0):
            stock.train()
    finally:
        root.handlers[:], level, backends[0].benchmark, backends[1].allow_tf32 = before
        root.setLevel(level)


def lerobot_train(monkeypatch, flags: list[str]) -> list[tuple[float, float]]:
    """Losses and gradient norms of LeRobot's own command under these flags."""
    from lerobot.scripts import lerobot_train as stock

    losses = seeded_losses(monkeypatch, stock, "update_policy", lambda r: (r[0].loss.val, r[0].grad_norm.val))
    given = {flag.split("=")[0]: flag for flag in flags}  # draccus refuses a flag given twice
    more = ["--policy.push_to_hub=false", "--save_checkpoint=false", "--dataset.video_backend=pyav"]
    lerobot_command(monkeypatch, *given.values(), *more)
    return losses


def own_train(monkeypatch, settings: Any) -> list[tuple[float, float]]:
    """Losses and gradient norms of our loop."""
    losses = seeded_losses(monkeypatch, training, "update", lambda facts: (facts["loss"], facts["grad_norm"]))
    train(settings)
    return losses
