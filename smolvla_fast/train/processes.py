"""The processes and trackers of a run, on Hugging Face accelerate: one process, or those that its launcher has started."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from ..patch import find_policy
from .data import share
from .disk import TRACKERS, make_folder
from .errors import TrainingError, root_cause
from .settings import TrainSettings

logger = logging.getLogger(__name__)


@contextmanager
def own_accelerate() -> Iterator[None]:
    """accelerate keeps one state a process. The body has one of its own; the caller's comes back. A process group that the
    body made is destroyed, one that was there stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from torch import distributed

    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    grouped = distributed.is_available() and distributed.is_initialized()
    try:
        yield
    finally:
        if not grouped and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


def make_accelerator(settings: TrainSettings) -> Any:
    """An ``Accelerator`` in a fresh state of accelerate. TrainingError for a tracker that is not installed, for a device
    other than the policy's, for several processes without a seed, and for FSDP, DeepSpeed and other launches that split a
    model."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trackers = dict.fromkeys(settings.log_with, "--log_with")
    trackers |= {"wandb": "--wandb.enable=true"} if settings.wandb.enable else {}
    for name in sorted({*trackers} - {*map(str, get_available_trackers())}):
        raise TrainingError(f"{trackers[name]}: {name} is not installed; run `pip install {name}`")
    device = torch.device(settings.policy.device or "cpu").type
    parts = settings.gradient_accumulation_steps
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if settings.bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(parts, sync_with_dataloader=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),  # as LeRobot: some get no gradient
            InitProcessGroupKwargs(timeout=timedelta(days=1)),  # the others wait while the first downloads
        ],
        log_with=[*trackers] or None,
        project_dir=settings.output_dir / TRACKERS,
    )
    if (kind := accelerator.distributed_type.value) not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU"):
        raise TrainingError(
            f"accelerate was launched for {kind}; accepted are one process, and several that each hold the whole policy "
            "(MULTI_CPU, MULTI_GPU); mend `accelerate config`, or use lerobot-train"
        )
    if accelerator.device.type != device:
        raise TrainingError(
            f"--policy.device={device}, and accelerate was launched for {accelerator.device.type}; give that device, or "
            "launch without --cpu (`accelerate config` may hold it)"
        )
    if accelerator.num_processes > 1 and settings.seed is None:
        count = accelerator.num_processes
        raise TrainingError(f"--seed=null: {count} processes need one seed for weights and noise; give one")
    # Set by accelerate's launcher for several processes, which on a CPU starts them by MPI alone.
    if accelerator.num_processes == 1 and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        logger.warning(
            "`accelerate launch` was to start several processes, and this one is alone: --batch_size=%d is all of a "
            "step. `accelerate launch --multi_gpu --num_processes=N` and torchrun start several, on a CPU too",
            settings.batch_size,
        )  # fmt: skip
    return accelerator


def start_trackers(accelerator: Any, settings: TrainSettings) -> None:
    """Starts what ``log_with`` and ``wandb.enable`` name. ``settings.wandb.run_id`` becomes the id that wandb made.

    raises  TrainingError for a tracker that refuses
    """
    if not accelerator.log_with:
        return
    wandb, folder = settings.wandb, settings.output_dir / TRACKERS
    given = {name: getattr(wandb, name) for name in ("entity", "notes", "mode")}
    given |= {"dir": folder, "id": wandb.run_id, "resume": "allow"}
    flat = {name: value for name, value in settings.to_dict().items() if isinstance(value, (int, float, str))}
    make_folder(folder)
    try:
        accelerator.init_trackers(wandb.project, flat, {"wandb": given})
    except Exception as error:  # each tracker raises its own
        names = " and ".join(map(str, accelerator.log_with))
        said = (
            f"{' '.join(str(error).split())} ({root_cause(error)})" if error.__cause__ else root_cause(error)
        )
        raise TrainingError(
            f"{names} cannot start: {said}; mend that (wandb: run `wandb login`, or give --wandb.mode=offline), or leave "
            "out --wandb.enable and --log_with"
        ) from error
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            wandb.run_id = tracker.run.id


def finish_trackers(accelerator: Any) -> None:
    """Ends what ``start_trackers`` has started. One that fails is a warning, not the end of the run."""
    for tracker in accelerator.trackers:
        try:
            if hasattr(tracker, "tracker"):  # else it did not start
                tracker.finish()
        except Exception as error:
            logger.warning("%s did not end as it should: %s", tracker.name, error)


def noise_of_share(policy: Any, samples: int, place: tuple[int, int]) -> dict[str, Tensor]:
    """Noise and times of this process's samples, out of those that one process would draw for all of them.

    So losses do not depend on how many processes there are, nor does the random state, which all of them share.
    """
    model, mine = find_policy(policy).model, share(samples, place)
    mine = mine if mine.stop > mine.start else slice(0, 1)
    config, device = model.config, model.state_proj.weight.device
    noise = model.sample_noise((samples, config.chunk_size, config.max_action_dim), device)
    return {"noise": noise[mine], "time": model.sample_time(samples, device)[mine]}


def weight_of_share(accelerator: Any, batch: dict[str, Any], samples: int, place: tuple[int, int]) -> Tensor:
    """What the loss of this process's samples is multiplied by, so that its mean over processes is that of the batch:
    LeRobot's loss is a mean over the actions that lie in the episode."""
    padded = batch["action_is_pad"]
    mine = share(samples, place)
    valid = (~padded).sum() if mine.stop > mine.start else padded.new_zeros((), dtype=torch.int64)
    total = accelerator.reduce(valid, "sum").clamp_min(1)
    return valid.float() * place[1] / total
