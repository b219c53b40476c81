"""``--peft.*``: adapters as LeRobot 0.6.1 adds, saves and loads them, on the fast path."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support.training_runs import go_on, read, same

import smolvla_fast
from smolvla_fast.cli import main
from smolvla_fast.testing.policies import make_noise, make_observation
from smolvla_fast.train import TrainingError, resume
from smolvla_fast.train.log import read_log
from smolvla_fast.training import train

pytest.importorskip("peft")
pytestmark = pytest.mark.training

BOTH = r"--peft.target_modules=.*\.(q|v)_proj"
"""In the vision tower, the text layers and the expert."""


def adapted(bench_top, finished, output, *more):
    """Settings of a run that adapts a checkpoint, which says its own type and sizes."""
    source = finished / "checkpoints" / "last" / "pretrained_model"
    flags = [
        flag for flag in bench_top.flags(output, "--log_freq=1", *more) if not flag.startswith("--policy.")
    ]
    return read([*flags, f"--policy.path={source}", "--policy.optimizer_lr=0.01", "--peft.r=4"])[0]


def adapters(checkpoint):
    return load_file(checkpoint / "pretrained_model" / "adapter_model.safetensors")


@pytest.mark.parametrize("target", [(), (BOTH,)], ids=["expert", "both"])
def test_adapters_train_as_in_stock_and_lerobot_loads_them(bench_top, finished, tmp_path, target):
    losses, chunks = [], []
    for fast in ("on", "off"):
        run = train(adapted(bench_top, finished, tmp_path / fast, f"--fast={fast}", *target, "--steps=3"))
        losses.append([entry["loss"] for entry in read_log(tmp_path / fast)])
        trained = [name for name, p in run.policy.named_parameters() if p.requires_grad]
        assert trained and all("lora" in name for name in trained)
        if fast == "on":
            now = smolvla_fast.status(run.policy)
            assert (now.training_fast, now.training_stock) == (3, 0)
            # An adapter on what is frozen is not ignored: its own modules compute it.
            assert ("frozen prefix" in now.training_fallback_reasons) == bool(target)
        chunks.append(chunk_by_lerobot(tmp_path / fast / "checkpoints" / "last" / "pretrained_model"))
    # fp32 sums in another order, through three updates.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # AdamW divides by the gradient's own size: where that is near 0 rounding alone decides a step of 1e-2.
    assert (chunks[0] - chunks[1]).norm() <= 1e-2 * chunks[1].norm()
    before = chunk_by_lerobot(finished / "checkpoints" / "last" / "pretrained_model")
    assert (chunks[0] - before).norm() > (chunks[0] - chunks[1]).norm()


def chunk_by_lerobot(folder):
    """A chunk of a checkpoint as ``make_policy`` loads it."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.policies import make_policy

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    dataset = json.loads((folder / "train_config.json").read_text())["dataset"]
    policy = make_policy(config, LeRobotDatasetMetadata(dataset["repo_id"], root=dataset["root"])).eval()
    inner = getattr(policy, "get_base_model", lambda: policy)()
    with torch.no_grad():
        return inner.predict_action_chunk(make_observation(inner), noise=make_noise(inner))


def test_verify_says_how_to_merge_adapters(bench_top, finished, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(adapted(bench_top, finished, tmp_path / "run", "--steps=1"))
    own = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    assert main(["verify", f"--policy.path={own}"]) == 2
    says, *lines = capsys.readouterr().err.splitlines()
    assert "adapters of PEFT" in says and "policy_* files to pretrained_model-merged" in says
    exec("\n".join(line.strip() for line in lines))
    for path in own.glob("policy_*"):
        shutil.copy(path, "pretrained_model-merged")
    assert main(["verify", "--policy.path=pretrained_model-merged", "--frames=1", "--threads=1"]) == 0
    shutil.copy(own / "train_config.json", "pretrained_model-merged")
    merged, apart = chunk_by_lerobot(tmp_path / "pretrained_model-merged"), chunk_by_lerobot(own)
    assert (merged - apart).norm() <= 1e-5 * apart.norm()  # fp32 sums in another order


def test_resumed_adapters_end_at_the_same_bits(bench_top, finished, tmp_path):
    train(adapted(bench_top, finished, tmp_path / "whole", "--steps=3"))
    train(adapted(bench_top, finished, tmp_path / "parts", "--steps=3", "--save_freq=2"))
    (tmp_path / "parts" / "checkpoints" / "last").unlink()
    (tmp_path / "parts" / "checkpoints" / "last").symlink_to("000002")
    go_on(tmp_path / "parts")
    ends = [adapters(tmp_path / name / "checkpoints" / "000003") for name in ("whole", "parts")]
    assert same(*ends) and any(value.any() for name, value in ends[0].items() if "lora_B" in name)


def test_adapters_without_a_policy_to_adapt_are_refused(bench_top, tmp_path):
    with pytest.raises(TrainingError, match=r"need --policy\.path: adapters change a policy"):
        bench_top.settings(tmp_path / "run", "--peft.r=4")


def test_flags_that_an_adapter_checkpoint_would_ignore_are_refused(bench_top, finished, tmp_path, capsys):
    train(adapted(bench_top, finished, tmp_path / "run", "--steps=1"))
    source = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model"
    flags = [flag for flag in bench_top.flags(tmp_path / "more") if not flag.startswith("--policy.")]
    assert main(["train", *flags, f"--policy.path={source}", "--peft.r=8"]) == 2
    assert "it holds adapters already, which --peft.* would not change" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
    with pytest.raises(TrainingError, match=r"peft\.r \(4 in the checkpoint, None asked for\)"):
        resume.go_on({"peft": None}, source.parent)
