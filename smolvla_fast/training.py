"""The training pipeline: dataset, batch, preprocess, loss, backward, clip, step, schedule, log, checkpoint.

    from smolvla_fast.train import DatasetSettings, TrainSettings
    from smolvla_fast.training import train

    train(TrainSettings(DatasetSettings("me/pick"), SmolVLAConfig(), output_dir="outputs/pick"))

``smolvla-fast train`` does the same with flags. Replaces ``lerobot-train``: same data order, presets and files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
from .train import processes
from .train.checkpoint import Checkpoints
from .train.data import Data, frames_of, held_out_batches, open_data, to_floats, training_batches
from .train.disk import check_output_dir, make_folder
from .train.errors import TrainingError, root_cause
from .train.first_step import try_step
from .train.known_frames import KnownFrames, kept, open_known_frames
from .train.log import Log
from .train.policy import check_policy, make_policy, make_processors, speed_up
from .train.random_state import seed_all, seeded
from .train.resume import batch_size_of
from .train.settings import TrainSettings

GO_ON = "go on from its checkpoint with train(settings, resume=CHECKPOINT), or begin with prepare(settings)"
CALMER = "try a lower --policy.optimizer_lr, more --policy.scheduler_warmup_steps"


@dataclass
class Run:
    """The state of a run between two steps."""

    settings: TrainSettings
    asked: dict[str, Any]
    """The settings that began the run, before the dataset filled in features."""
    data: Data
    policy: Any
    accelerator: Any
    model: Any
    """What is called: the policy, or DistributedDataParallel around it."""
    preprocess: Any
    postprocess: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    step: int
    path: str
    """How steps are computed, in words: patched or plain, and why."""
    known: KnownFrames
    """Image tokens that are kept from step to step."""
    place: tuple[int, int]
    """Number of this process, and how many there are. Process 0 writes and says what is written and said."""

    @property
    def samples(self) -> int:
        """Samples per optimizer step, over all processes."""
        return self.settings.batch_size * self.settings.gradient_accumulation_steps * self.place[1]

    def prepared(self, raw: dict[str, Any]) -> dict[str, Any]:
        """A batch as the policy takes it."""
        device = self.settings.policy.device or "cpu"
        return {**self.preprocess(to_floats(raw, device)), **kept(raw, device)}


def train(
    settings: TrainSettings,
    *,
    resume: Path | None = None,
    on_begin: Callable[[Run], None] = lambda run: None,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, facts: None,
) -> Run:
    """Trains until ``settings.steps``, writes log and checkpoints, and returns the run with its trained policy.

    resume    checkpoint folder to resume from, with the ``settings`` of ``train.resume.go_on``
    on_begin  called once before the first step
    on_step   called after each step with its number, and loss, grad_norm, lr, data_s and update_s
    raises    TrainingError for an impossible run, and for weights that are not finite, which are not saved; earlier
              checkpoints stay

    The caller's random state is restored. Processes that accelerate or torchrun has started train together. The run has
    ended: ``update`` on it is a TrainingError; a loop of your own begins with ``prepare``.
    """
    with _told_how_to_go_on(settings.output_dir), seeded(settings.seed), processes.own_accelerate():
        run = prepare(settings, resume, trial=True)
        seed_all(None if resume else settings.seed)  # noise must not depend on what the constructors drew
        log = None
        try:
            if resume and run.step >= settings.steps:
                raise TrainingError(
                    f"the run is complete: {resume} is of step {run.step}, and --steps is {settings.steps}; give a larger "
                    "--steps to go on"
                )
            if run.place[0] == 0:
                processes.start_trackers(run.accelerator, run.settings)
                on_begin(run)
                log = Log(settings.output_dir, run.step, settings.log_freq, run.accelerator.log)
            _steps(run, log, on_step)
            if log:
                log.close()
        finally:
            # The error that stopped the run matters, not a disk too full for one more line.
            with suppress(Exception):
                if log:
                    log.close()
            processes.finish_trackers(run.accelerator)
            run.known.close()
            run.accelerator, run.model = None, run.policy
    return run


@contextmanager
def _told_how_to_go_on(output_dir: Path) -> Iterator[None]:
    """Adds what to do to errors of missing packages, of data and of memory, the latter raised anywhere in a run."""
    try:  # before the run, whose callbacks may lack packages of their own
        import accelerate  # noqa: F401

        from .train import reader  # noqa: F401  which reads the datasets of LeRobot 0.6
    except ImportError as error:
        raise TrainingError(f'{error}; on Python 3.12 run `pip install "smolvla_fast[train]"`') from error
    try:
        yield
    except (TrainingError, RuntimeError, MemoryError) as error:
        said = str(error)
        fixed = [flag for flag in ("--dataset.episodes", "--tolerance_s") if flag in said]
        if isinstance(error, TrainingError) and not fixed:
            raise
        last = Checkpoints(output_dir).last()
        new = f"a new run, with --policy.path={last and last / files.PRETRAINED} and another --output_dir"
        if isinstance(error, TrainingError) and last:
            message = f"{said.rstrip('.')}. With the data mended, --resume=true goes on; {' and '.join(fixed)} need {new}"
        elif "DataLoader worker" in said:  # torch's signal handler raises it wherever the run is
            again = "go on with --resume=true and" if last else "run again with"
            message = (
                f"a process that reads data died ({root_cause(error)}), often for want of memory; {again} a smaller "
                "--num_workers, 0 reads in the process that trains"
            )
        elif is_out_of_memory(error):
            message = (
                f"a step needs more memory than there is ({root_cause(error)}). Give a smaller --batch_size, with more "
                "--gradient_accumulation_steps for as many samples, or --dtype=bf16"
                + (f", to {new}" if last else "")
            )
        else:
            raise
        raise TrainingError(message) from error


def _steps(run: Run, log: Log | None, on_step: Callable[[int, dict[str, float]], None]) -> None:
    """log  None in all processes but one, which writes"""
    settings, checkpoints = run.settings, Checkpoints(run.settings.output_dir)
    first = run.step * settings.gradient_accumulation_steps
    batches = training_batches(settings, run.data.train, first, run.place)
    while run.step < settings.steps:
        facts = update(run, batches)
        run.step += 1
        if log:
            on_step(run.step, facts)
            log.add(run.step, run.samples, **facts)
        if run.data.held_out is not None and settings.eval_steps and run.step % settings.eval_steps == 0:
            loss = _held_out_loss(run)
            if log:
                log.write(run.step, {"eval_loss": loss})
        due = settings.save_freq and run.step % settings.save_freq == 0
        if settings.save_checkpoint and (due or run.step == settings.steps):
            _refuse_nonfinite_weights(run, checkpoints.kept())
            if log:
                checkpoints.save(run.step, settings.steps, lambda folder: write_checkpoint(run, folder))
            run.accelerator.wait_for_everyone()


@torch.no_grad()
def _held_out_loss(run: Run) -> float:
    """Mean flow-matching loss over the held-out samples, at the same noise and times on every call."""
    total, frames = 0.0, 0
    run.policy.eval()
    with seeded(7):
        for samples, raw in held_out_batches(run.settings, run.data.held_out, run.place):
            frames += samples
            total += samples * loss_of(run, run.policy, run.prepared(raw), samples).item()
    run.policy.train()
    mean = torch.tensor(total / frames, device=run.policy.config.device)
    return run.accelerator.reduce(mean, "mean").item()


def prepare(settings: TrainSettings, resume: Path | None = None, *, trial: bool = False) -> Run:
    """Data, policy, processors, optimizer and schedule, fresh or as a checkpoint left them.

    ``settings`` do not change: the run has a copy, with features from the dataset where none were given.

    trial   compute the loss of two samples before ``output_dir`` is made, as ``train`` does
    raises  TrainingError as ``train`` does, and in a new run for an ``output_dir`` that is not empty

    accelerate's state of this process is replaced; ``train`` puts it back.
    """
    accelerator = processes.make_accelerator(settings)
    place = accelerator.process_index, accelerator.num_processes
    if place[0] == 0:
        check_output_dir(settings.output_dir, resume is None)
    accelerator.wait_for_everyone()
    check_policy(settings)
    saved = files.read_run(resume) if resume else {}
    asked = saved.get("asked") or settings.to_dict()
    settings = replace(settings, policy=deepcopy(settings.policy), wandb=replace(settings.wandb))
    if place[1] > 1:  # each has the device that accelerate made its current one
        settings.policy.device = accelerator.device.type
    if resume:
        settings.batch_size = batch_size_of(settings, saved.get("processes", 1), place[1])
    source = resume / files.PRETRAINED if resume else settings.policy_path
    with accelerator.main_process_first():  # which downloads
        data = open_data(settings)
        before, now = saved.get("frames"), len(data.train)
        if resume and before != now:
            raise TrainingError(
                f"the dataset has {now} frames to train on, {before} when {resume} was written, so their order would "
                f"differ. Resume on the same data, or start a new run with --policy.path={source}"
            )
        policy = make_policy(settings, source)
    preprocess, postprocess = make_processors(settings, data.stats, source, resume is not None)
    if trial:  # before the patch, whose counters and image cache would keep the trial
        try_step(settings, data, policy, preprocess, accelerator.autocast())
    fused, path = speed_up(policy, settings)
    known, words = open_known_frames(settings, data, policy, preprocess, accelerator.autocast())
    if place[0] == 0:
        make_folder(settings.output_dir)
    # With frozen parameters, as in LeRobot: a checkpoint numbers the states by their place in this list.
    preset = settings.policy.get_optimizer_preset()
    optimizer = preset.build(policy.get_optim_params(), fused=fused or None)
    scheduler = settings.policy.get_scheduler_preset().build(optimizer, settings.steps)
    model = accelerator.prepare_model(policy, device_placement=False) if place[1] > 1 else policy
    run = Run(
        settings, asked, data, policy, accelerator, model, preprocess, postprocess,
        optimizer, scheduler, 0, path + words, known, place,
    )  # fmt: skip
    if resume:
        run.step = files.load_state(resume, optimizer, scheduler)
    return run


def update(run: Run, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    """One optimizer step: ``gradient_accumulation_steps`` batches forward and backward, clip, step, schedule.

    returns  loss (mean over the batches), grad_norm before clipping, lr; seconds: data_s of reading, update_s of the rest
    raises   TrainingError, with the weights as before and no gradients, when loss or gradient is not finite
    """
    if run.accelerator is None:
        raise TrainingError(f"this run has ended; {GO_ON}")
    try:
        return _update(run, run.accelerator, batches)
    except BaseException:  # a step not taken leaves neither gradients nor a count of its batches
        run.policy.zero_grad()
        run.accelerator.step = 0
        raise


def _update(run: Run, accelerator: Any, batches: Iterator[dict[str, Any]]) -> dict[str, float]:
    settings, parts = run.settings, run.settings.gradient_accumulation_steps
    losses: list[Tensor] = []
    seen: list[dict[str, Any]] = []  # raw batches in the host's memory, for the message of an error
    data_s, begun = 0.0, time.perf_counter()
    for part in range(parts):
        asked = time.perf_counter()
        seen.append(next(batches))
        batch = run.prepared(seen[-1])
        data_s += time.perf_counter() - asked
        samples = frames_of(settings, len(run.data.train), run.step * parts + part, run.place[1])
        with accelerator.accumulate(run.model):
            loss = loss_of(run, run.model, batch, samples)
            accelerator.backward(loss)
        losses.append(loss.detach())

    clip = settings.policy.optimizer_grad_clip_norm
    norm = accelerator.clip_grad_norm_(run.policy.parameters(), clip if clip > 0 else math.inf)
    # Checked before the step, and both in one transfer, since each waits for the GPU.
    facts = torch.stack([torch.stack(losses).mean().float(), norm.float()])
    mean, grad_norm = accelerator.reduce(facts, "mean").tolist()
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise TrainingError(_not_finite(run, mean, grad_norm, seen))
    found = dict(loss=mean, grad_norm=grad_norm, lr=run.optimizer.param_groups[0]["lr"], data_s=data_s)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    return {**found, "update_s": time.perf_counter() - begun - data_s}


def _not_finite(run: Run, loss: float, grad_norm: float, batches: list[dict[str, Any]]) -> str:
    """The message for a loss or gradient that is not finite: which frames hold such values, or what to try."""
    causes = []
    for raw in batches:
        # Preprocessed again, since statistics can make NaN out of finite data.
        batch = run.prepared(raw)
        floats = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
        if bad := [key for key, value in floats.items() if not value.isfinite().all()]:
            frames = batch["index"].tolist() if isinstance(batch.get("index"), Tensor) else len(batch[ACTION])
            causes.append(f"{bad} of the frames {frames} hold such values")
    finite = f"the data of the step, {run.samples} samples, are finite: {CALMER}"
    cause = f"{'; '.join(causes)}: repair the data or its statistics" if causes else finite
    return f"step {run.step + 1}: loss {loss}, gradient norm {grad_norm}; {cause}. The step was not taken"


def _refuse_nonfinite_weights(run: Run, kept: str) -> None:
    """TrainingError for trained weights that are not finite: a checkpoint of them would be useless."""
    trained = [(name, p) for name, p in run.policy.named_parameters() if p.requires_grad]
    bad = [name for name, parameter in trained if not parameter.isfinite().all()]
    if bad:
        raise TrainingError(
            f"step {run.step}: {len(bad)} of {len(trained)} trained weights are not finite, the first is {bad[0]}. Nothing "
            f"was saved, {kept}. {CALMER.capitalize()}, or a larger --policy.optimizer_eps"
        )


def loss_of(run: Run, model: Any, batch: dict[str, Any], samples: int) -> Tensor:
    """The loss of a batch. Of several processes each has its share; the mean over them is the loss of the whole batch, and
    the mean of their gradients its gradient.

    model    the policy, or what is around it      samples  in the batch, over all processes
    """
    several = run.place[1] > 1
    drawn = processes.noise_of_share(run.policy, samples, run.place) if several else {}
    with run.accelerator.autocast(), run.known.given(batch):
        loss, _ = model(batch, **drawn)
    return loss * processes.weight_of_share(run.accelerator, batch, samples, run.place) if several else loss


def write_checkpoint(run: Run, folder: Path) -> None:
    """Writes the files that LeRobot loads and resumes from, and those that resume this run to the same bits."""
    pretrained = folder / files.PRETRAINED
    run.policy.save_pretrained(pretrained)
    if hasattr(run.policy, "peft_config"):  # PEFT saves adapters alone
        run.policy.config.save_pretrained(pretrained)
    run.preprocess.save_pretrained(pretrained)
    run.postprocess.save_pretrained(pretrained)
    files.write_json(pretrained / "train_config.json", run.settings.to_lerobot())
    files.save_state(folder, run)
