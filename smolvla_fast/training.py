"""The training pipeline: dataset, batch, preprocess, loss, backward, clip, step, schedule, log, checkpoint.

    from smolvla_fast.train import DatasetSettings, TrainSettings
    from smolvla_fast.training import train

    train(TrainSettings(DatasetSettings("me/pick"), SmolVLAConfig(), output_dir="outputs/pick"))

``smolvla-fast train`` does the same with flags. Replaces ``lerobot-train``: same data order, presets and files.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .ops.memory import is_out_of_memory
from .smolvla.features import ACTION
from .train import checkpoint as files
from .train.checkpoint import Checkpoints
from .train.data import Data, held_out_batches, open_data, to_floats, training_batches
from .train.dataset_files import first_line
from .train.disk import check_output_dir, make_folder
from .train.errors import TrainingError
from .train.evaluation import held_out_loss
from .train.log import Log
from .train.policy import check_policy, make_policy, make_processors, speed_up
from .train.random_state import seed_all, seeded
from .train.settings import TrainSettings
from .train.trial import try_step

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The state of a run between two steps."""

    settings: TrainSettings
    asked: dict[str, Any]
    """The settings that began the run, before the dataset filled in features."""
    data: Data
    policy: Any
    preprocess: Any
    postprocess: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    step: int
    path: str
    """How steps are computed, in words: patched or plain, and why."""

    @property
    def samples(self) -> int:
        """Samples per optimizer step."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps


def train(
    settings: TrainSettings,
    *,
    resume: Path | None = None,
    on_begin: Callable[[Run], None] = lambda run: None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, facts: None,
) -> Run:
    """Trains until ``settings.steps``, writes log and checkpoints, and returns the run with its trained policy.

    resume    checkpoint folder to resume from, with the ``settings`` of ``train.settings.go_on``
    on_begin  called once before the first step
    on_step   called after each step with its number, and loss, grad_norm, lr, data_s and update_s
    raises    TrainingError for an impossible run, and for weights that are not finite, which are not saved; earlier
              checkpoints stay

    The caller's random state is restored.
    """
    _refuse_many_processes()
    with seeded(settings.seed), _told_how_to_go_on(settings.output_dir):
        run = prepare(settings, resume, trial=True)
        if resume is None:
            seed_all(settings.seed)  # the noise must not depend on how many numbers the constructors drew
        on_begin(run)
        log = Log(settings.output_dir, run.step, settings.log_freq)
        try:
            _steps(run, log, on_step)
        except BaseException:
            # The error that stopped the run matters, not a disk too full for one more line.
            with suppress(TrainingError):
                log.close()
            raise
        log.close()
    return run


@contextmanager
def _told_how_to_go_on(output_dir: Path) -> Iterator[None]:
    """Adds to errors of data and of memory, raised anywhere in a run, what a run with checkpoints can do."""
    try:
        yield
    except (TrainingError, RuntimeError, MemoryError) as error:
        said = str(error)
        fixed = [flag for flag in ("--dataset.episodes", "--tolerance_s") if flag in said]
        if isinstance(error, TrainingError) and not fixed:
            raise
        last = Checkpoints(output_dir).last()
        new = (
            f"a new run, with --policy.path={last / files.PRETRAINED} and another --output_dir"
            if last
            else ""
        )
        if isinstance(error, TrainingError):
            if last is None:
                raise
            message = f"{said.rstrip('.')}. With the data mended, --resume=true goes on; {' and '.join(fixed)} need {new}"
        elif "DataLoader worker" in said:  # torch's signal handler raises it wherever the run is
            again = "go on with --resume=true and" if last else "run again with"
            message = (
                f"a process that reads data died ({first_line(error)}), often for want of memory; {again} a smaller "
                "--num_workers, 0 reads in the process that trains"
            )
        elif is_out_of_memory(error):
            message = (
                f"a step needs more memory than there is ({first_line(error)}). Give a smaller --batch_size, with more "
                "--gradient_accumulation_steps for as many samples, or --dtype=bf16"
                + (f", to {new}" if last else "")
            )
        else:
            raise
        raise TrainingError(message) from error


def _steps(run: Run, log: Log, on_step: Callable[[int, dict[str, float]], None]) -> None:
    settings = run.settings
    checkpoints = Checkpoints(settings.output_dir)
    batches = training_batches(settings, run.data.train, run.step * settings.gradient_accumulation_steps)
    while run.step < settings.steps:
        facts = update(run, batches)
        run.step += 1
        on_step(run.step, facts)
        log.add(run.step, run.samples, **facts)
        if run.data.held_out is not None and _due(run.step, settings.eval_steps):
            held_out = held_out_batches(settings, run.data.held_out)
            loss = held_out_loss(run.policy, run.preprocess, held_out, _autocast(settings))
            log.write({"step": run.step, "eval_loss": loss})
        if settings.save_checkpoint and (_due(run.step, settings.save_freq) or run.step == settings.steps):
            _refuse_nonfinite_weights(run, checkpoints.last())
            checkpoints.save(run.step, settings.steps, lambda folder: write_checkpoint(run, folder))


def prepare(settings: TrainSettings, resume: Path | None = None, *, trial: bool = False) -> Run:
    """Data, policy, processors, optimizer and schedule, fresh or as a checkpoint left them.

    ``settings`` do not change: the run has a copy, with features from the dataset where none were given.

    trial   compute the loss of two samples before ``output_dir`` is made, as ``train`` does
    raises  TrainingError as ``train`` does, and in a new run for an ``output_dir`` that is not empty
    """
    check_output_dir(settings.output_dir, resume is None)
    check_policy(settings)
    asked = files.read_run(resume).get("asked") if resume else None
    asked = asked or settings.to_dict()
    settings = replace(settings, policy=deepcopy(settings.policy))
    source = resume / files.PRETRAINED if resume else settings.policy_path
    data = open_data(settings)
    policy = make_policy(settings, source)
    preprocess, postprocess = make_processors(settings, data.stats, source, resume is not None)
    if trial:  # before the patch, whose counters and image cache would keep the trial
        try_step(settings, data, policy, preprocess, _autocast(settings))
    fused, path = speed_up(policy, settings)
    make_folder(settings.output_dir)
    # With frozen parameters, as in LeRobot: a checkpoint numbers the states by their place in this list.
    preset = settings.policy.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params(), fused=fused or None)
    scheduler = settings.policy.get_scheduler_preset().build(optimizer, settings.steps)
    run = Run(settings, asked, data, policy, preprocess, postprocess, optimizer, scheduler, 0, path)
    if resume:
        run.step = files.load_state(resume, optimizer, scheduler)
        _check_same_data(run, resume)
    return run


def update(run: Run, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """One optimizer step: ``gradient_accumulation_steps`` batches forward and backward, clip, step, schedule.

    returns  loss (the mean over the batches), grad_norm before clipping, lr; seconds of reading (data_s) and the rest
             (update_s)
    raises   TrainingError, with the weights as before, when loss or gradient is not finite
    """
    settings, parts = run.settings, run.settings.gradient_accumulation_steps
    losses: list[Tensor] = []
    seen: list[dict[str, Any]] = []  # raw batches in the host's memory, for the message of an error
    data_s = 0.0
    begun = time.perf_counter()
    for _ in range(parts):
        asked = time.perf_counter()
        seen.append(next(batches))
        batch = run.preprocess(to_floats(seen[-1], settings.policy.device or "cpu"))
        data_s += time.perf_counter() - asked
        with _autocast(settings):
            loss, _ = run.policy.forward(batch)
        (loss / parts).backward()
        losses.append(loss.detach())

    clip = settings.policy.optimizer_grad_clip_norm
    norm = torch.nn.utils.clip_grad_norm_(run.policy.parameters(), clip if clip > 0 else math.inf)
    # Checked before the step, and both in one transfer, since each waits for the GPU.
    mean, grad_norm = torch.stack([torch.stack(losses).mean().float(), norm.float()]).tolist()
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise TrainingError(_not_finite(run, mean, grad_norm, seen))
    rate = run.optimizer.param_groups[0]["lr"]
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    update_s = time.perf_counter() - begun - data_s
    return {"loss": mean, "grad_norm": grad_norm, "lr": rate, "data_s": data_s, "update_s": update_s}


def write_checkpoint(run: Run, folder: Path) -> None:
    """Writes the files that LeRobot loads and resumes from, and those that resume this run to the same bits."""
    pretrained = folder / files.PRETRAINED
    run.policy.save_pretrained(pretrained)
    run.preprocess.save_pretrained(pretrained)
    run.postprocess.save_pretrained(pretrained)
    files.write_train_config(pretrained, run.settings.to_lerobot())
    facts = {"settings": run.settings.to_dict(), "asked": run.asked, "frames": len(run.data.train)}
    files.save_state(folder, run.step, run.samples, run.optimizer, run.scheduler, facts)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _autocast(settings: TrainSettings) -> AbstractContextManager:
    device = torch.device(settings.policy.device or "cpu").type
    return torch.autocast(device, torch.bfloat16, enabled=settings.bf16)


def _check_same_data(run: Run, checkpoint: Path) -> None:
    before, now = files.read_run(checkpoint)["frames"], len(run.data.train)
    if before != now:
        raise TrainingError(
            f"the dataset has {now} frames to train on, {before} when {checkpoint} was written, so their order would "
            f"differ. Resume on the same data, or start a new run with --policy.path={checkpoint / files.PRETRAINED}"
        )


def _not_finite(run: Run, loss: float, grad_norm: float, batches: list[dict[str, Any]]) -> str:
    causes = []
    for raw in batches:
        # Preprocessed again, since statistics can make NaN out of finite data.
        batch = run.preprocess(to_floats(raw, run.settings.policy.device or "cpu"))
        floats = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
        if bad := [key for key, value in floats.items() if not value.isfinite().all()]:
            frames = batch["index"].tolist() if isinstance(batch.get("index"), Tensor) else len(batch[ACTION])
            causes.append(f"{bad} of the frames {frames} hold such values")
    cause = (
        f"{'; '.join(causes)}: repair the data or its statistics"
        if causes
        else f"the data of the step, {run.samples} samples, are finite: try a lower --policy.optimizer_lr, more "
        "--policy.scheduler_warmup_steps"
    )
    return (
        f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}; {cause}. The step was not taken, and the "
        "checkpoints before it are as they were"
    )


def _refuse_nonfinite_weights(run: Run, last: Path | None) -> None:
    """TrainingError for trained weights that are not finite: a checkpoint of them would be useless."""
    trained = [(name, p) for name, p in run.policy.named_parameters() if p.requires_grad]
    bad = [name for name, parameter in trained if not parameter.isfinite().all()]
    if bad:
        kept = f"the last checkpoint, {last}, is as it was" if last else "there is no checkpoint before it"
        raise TrainingError(
            f"step {run.step}: {len(bad)} of {len(trained)} trained weights are not finite, the first is {bad[0]}. Nothing "
            f"was saved, {kept}. Try a lower --policy.optimizer_lr, more --policy.scheduler_warmup_steps, or a larger "
            "--policy.optimizer_eps"
        )


def _refuse_many_processes() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "smolvla-fast train runs in one process, WORLD_SIZE asks for more. lerobot-train under accelerate trains on "
            "several GPUs from the same checkpoint, without the fast path; a training loop of your own keeps it with "
            "smolvla_fast.patch(policy, training=True) before the policy is wrapped"
        )
