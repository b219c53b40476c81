"""Short training runs, through the command and through its parts, on one tiny backbone and dataset."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from smolvla_fast.cli import main
from smolvla_fast.cli import train as command
from smolvla_fast.testing import TINY_TEXT, TINY_VISION, TINY_VOCAB, make_vlm_folder
from smolvla_fast.testing_dataset import REPO_ID, write_dataset
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
