"""The processes and trackers of a run, on Hugging Face accelerate: one process, or those that its launcher has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..patch import find_policy
from .data import share
from .errors import TrainingError
from .settings import TrainSettings


@contextmanager
def own_accelerate() -> Iterator[None]:
    """accelerate keeps one state a process. The body has one of its own; the caller's comes back."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    try:
        yield
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


def make_accelerator(settings: TrainSettings) -> Any:
    """An ``Accelerator`` in a fresh state of accelerate. TrainingError for a tracker that is not installed, and for FSDP,
    DeepSpeed and other launches that split a model."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trackers = [*settings.log_with, *(["wandb"] if settings.wandb.enable else [])]
    if absent := sorted({*trackers} - {*map(str, get_available_trackers())}):
        raise TrainingError(f"--log_with={absent}: not installed; run `pip install {' '.join(absent)}`")
    accelerator = Accelerator(
        cpu=settings.policy.device == "cpu",
        mixed_precision="bf16" if settings.bf16 else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            settings.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        # As LeRobot: some parameters get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        log_with=trackers or None,
        project_dir=settings.output_dir,
    )
    if accelerator.distributed_type not in (
        DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU,
    ):  # fmt: skip
        raise TrainingError(
            f"accelerate was launched for {accelerator.distributed_type.value}; accepted are one process, and several "
            "that each hold the whole policy (MULTI_CPU, MULTI_GPU); mend `accelerate config`, or use lerobot-train"
        )
    return accelerator


def start_trackers(accelerator: Any, settings: TrainSettings) -> None:
    wandb = settings.wandb
    given = {
        "dir": settings.output_dir, "entity": wandb.entity, "notes": wandb.notes, "mode": wandb.mode, "id": wandb.run_id,
        "resume": "allow",
    }  # fmt: skip
    flat = {name: value for name, value in settings.to_dict().items() if isinstance(value, (int, float, str))}
    if accelerator.log_with:
        accelerator.init_trackers(wandb.project, flat, {"wandb": given})


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


def on_processes(accelerator: Any, policy: Any) -> Any:
    """The policy under DistributedDataParallel, or itself where there is one process."""
    return (
        accelerator.prepare_model(policy, device_placement=False) if accelerator.num_processes > 1 else policy
    )
