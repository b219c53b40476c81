"""The whole training flow in minutes on a CPU: write a dataset, train, kill and resume the run, evaluate, patch the policy.

    make train-demo          (or: python examples/train_demo.py [FOLDER])

A hand learns to pick up a red cube from 60 scripted episodes with two cameras; only the images show where the cube lies.
Exit status 1 if the policy does not beat every constant action on held-out episodes by ``MARGIN``, if wrong images do not
raise its error by ``LOOKING``, if patched inference differs, or if the run ended before it could be killed; 2 for a FOLDER
that holds anything but an earlier demo.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import smolvla_fast
from smolvla_fast.cli import main as smolvla_fast_command
from smolvla_fast.smolvla import SmolVLAPolicy, make_pre_post_processors
from smolvla_fast.smolvla.features import ACTION, OBS_IMAGES
from smolvla_fast.testing.dataset import REPO_ID, write_dataset
from smolvla_fast.testing.policies import make_policy
from smolvla_fast.train.checkpoint import Checkpoints, read_run
from smolvla_fast.train.data import held_out_batches, open_data, to_floats
from smolvla_fast.train.random_state import seeded
from smolvla_fast.train.settings import TrainSettings

STEPS, SAVE = 600, 200
SEED = 1
"""Not LeRobot's 1000, whose error lies so near the margin that the rounding of an update decided."""
NOISE = 7
"""Seed of the noise from which actions are predicted."""
MARKER = ".train_demo"
"""Marks a folder as written by a demo, so that another may empty it."""
MARGIN = 0.75
"""Largest squared error of the policy on held-out episodes, as a share of the best constant action's."""
LOOKING = 1.25
"""Least factor by which the error must grow when every frame gets another frame's images."""

TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)  # fmt: skip
VISION = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=4
)  # fmt: skip


def main(folder: Path) -> int:
    torch.set_num_threads(1)  # one core computes, the other reads
    if not cleared(folder):
        return 2
    start = time.perf_counter()
    dataset = write_dataset(folder / "dataset", episodes=60)
    print(
        f"wrote {dataset.num_episodes} episodes, {dataset.num_frames} frames, to {folder / 'dataset'}",
        flush=True,
    )
    write_base(folder)
    run = folder / "run"
    arguments = [
        "train", f"--dataset.repo_id={REPO_ID}", f"--dataset.root={folder / 'dataset'}", "--dataset.eval_split=0.2",
        f"--policy.path={folder / 'base'}", "--policy.input_features=null", "--policy.output_features=null",
        "--policy.train_expert_only=false", "--policy.freeze_vision_encoder=false", "--policy.optimizer_lr=1.5e-3",
        "--policy.scheduler_warmup_steps=50", f"--policy.scheduler_decay_steps={STEPS}",
        "--policy.scheduler_decay_lr=1.5e-5",
        "--batch_size=16", f"--steps={STEPS}", f"--save_freq={SAVE}", "--log_freq=20", f"--eval_steps={SAVE // 2}",
        "--max_eval_samples=64", "--num_workers=1", f"--output_dir={run}", f"--seed={SEED}",
    ]  # fmt: skip
    print("$ smolvla-fast", *arguments, flush=True)
    code = "import sys, torch; torch.set_num_threads(1); from smolvla_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    if not kill_once_saved([sys.executable, "-c", code, *arguments], run):
        return 1
    go_on = ["train", "--resume=true", f"--output_dir={run}"]
    print("$ smolvla-fast", *go_on, flush=True)
    if smolvla_fast_command(go_on):
        return 1
    good = evaluate(run)
    print(f"{time.perf_counter() - start:.0f} s in all; loss curve: {run / 'train_log.png'}")
    return 0 if good else 1


def cleared(folder: Path) -> bool:
    """Empties the folder of an earlier demo and marks it; False for any other folder that is not empty."""
    if folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        print(
            f"{folder} holds something that this demo has not written (there is no {MARKER} in it), and would be emptied; "
            "give a new or an empty folder",
            file=sys.stderr,
        )
        return False
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return True


def write_base(folder: Path) -> None:
    """Writes the checkpoint to start from: a small SmolVLA with random weights, scaled so that images matter."""
    policy = make_policy(
        "tiny", origin="ours", folder=folder / "vlm", text=TEXT, vision=VISION, expert_width_multiplier=1.0,
        train_expert_only=False, freeze_vision_encoder=False,
    )  # fmt: skip
    policy.save_pretrained(folder / "base")
    for processor in make_pre_post_processors(policy.config):
        processor.save_pretrained(folder / "base")
    print(
        f"wrote a policy of {sum(p.numel() for p in policy.parameters()):,} random weights to {folder / 'base'}"
    )


def kill_once_saved(command: list[str], run: Path) -> bool:
    """Starts a training command and kills it some time after its first checkpoint.

    Prints the reason and returns False where it ended by itself, which leaves nothing to resume.
    """
    start = time.monotonic()
    # Kept back: processes that read data for a killed one end with tracebacks of their own.
    with tempfile.TemporaryFile("w+") as errors, subprocess.Popen(command, stderr=errors) as process:
        while process.poll() is None and Checkpoints(run).last() is None:
            time.sleep(0.05)
        if process.poll() is None:
            time.sleep(min(3, 0.1 * (time.monotonic() - start)))  # some steps on, and far from the last
        process.kill()
        process.wait()
        if process.returncode != -signal.SIGKILL:
            errors.seek(0)
            said = f"the run was to be killed and ended by itself, with status {process.returncode}"
            print(f"{errors.read()}{said}", file=sys.stderr)
            return False
    print(f"killed; the last whole checkpoint is {Checkpoints(run).last()}", flush=True)
    return True


def evaluate(run: Path) -> bool:
    """Prints the errors on held-out episodes, plain, with wrong images, and patched; True if all pass."""
    checkpoint = Checkpoints(run).last()
    settings = TrainSettings.from_dict(
        {**read_run(checkpoint)["settings"], "num_workers": 0, "max_eval_samples": 0}
    )
    batches = [raw for _, raw in held_out_batches(settings, open_data(settings).held_out)]
    policy = SmolVLAPolicy.from_pretrained(checkpoint / "pretrained_model")
    preprocess, postprocess = make_pre_post_processors(policy.config, checkpoint / "pretrained_model")

    error, constant = action_error(policy, preprocess, batches)
    blind, _ = action_error(policy, preprocess, batches, wrong_images=True)
    smolvla_fast.patch(policy)
    patched, _ = action_error(policy, preprocess, batches)
    first = preprocess({k: v[:1] for k, v in to_floats(batches[0], "cpu").items()})
    report = smolvla_fast.verify(policy, first)
    actions = postprocess(policy.predict_action_chunk(first)[0])
    status = smolvla_fast.status(policy)

    print(
        f"mean squared error of action chunks on {sum(len(b['index']) for b in batches)} held-out frames, normalised units:"
    )
    print(f"  best constant action        {constant:.4f}")
    print(
        f"  trained policy              {error:.4f}  ({error / constant:.3f} of it; at most {MARGIN} is asked for)"
    )
    print(
        f"  with another frame's images {blind:.4f}  ({blind / error:.2f} times; at least {LOOKING} is asked for)"
    )
    print(
        f"  patched for inference       {patched:.4f}  ({status.calls_fast} chunks fast, {status.calls_stock} stock)"
    )
    print(
        f"  verify: relative L2 {report.rel_l2:.1e} to stock, bound {report.bound:.1e}, "
        f"{'passed' if report.passed else 'FAILED'}"
    )
    print(
        f"a chunk in the robot's units: {actions.shape[0]} actions, the first {[round(x, 3) for x in actions[0].tolist()]}"
    )
    same = abs(patched - error) <= 1e-3 * error  # `fp32` errs by 1e-5 of a chunk at most
    return (
        error <= MARGIN * constant
        and blind >= LOOKING * error
        and same
        and report.passed
        and status.calls_stock == 0
    )


@torch.no_grad()
def action_error(
    policy: Any, preprocess: Any, batches: Iterable[Any], *, wrong_images: bool = False
) -> tuple[float, float]:
    """Mean squared errors of the predicted chunks, and of the best constant action, both in normalised units.

    The constant is the mean of the compared actions, so no other constant does better on them. Actions beyond the end of
    an episode do not count.

    wrong_images  give every frame another frame's images: the error of the policy without sight
    """
    inputs = [preprocess(to_floats(raw, policy.config.device)) for raw in batches]
    if wrong_images:
        inputs = _with_other_images(inputs)
    with seeded(NOISE):
        predicted = torch.cat([policy.predict_action_chunk(batch).float().cpu() for batch in inputs])
    target = torch.cat([batch[ACTION].float().cpu() for batch in inputs])
    valid = ~torch.cat([batch["action_is_pad"].cpu() for batch in inputs])
    constant = target[valid].mean(dim=0)
    errors = (predicted - target)[valid], target[valid] - constant
    return errors[0].square().mean().item(), errors[1].square().mean().item()


def _with_other_images(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rolls the images by half of all samples: where episodes are about equally long, they come from another episode."""
    sizes = [len(batch[ACTION]) for batch in inputs]
    moved: list[dict[str, Any]] = [dict(batch) for batch in inputs]
    for key in (key for key in inputs[0] if key.startswith(f"{OBS_IMAGES}.") and not key.endswith("_is_pad")):
        images = torch.cat([batch[key] for batch in inputs]).roll(sum(sizes) // 2, dims=0)
        for batch, part in zip(moved, images.split(sizes), strict=True):
            batch[key] = part
    return moved


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=Path("outputs/train-demo"))
    sys.exit(main(parser.parse_args().folder))
