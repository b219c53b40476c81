"""A checkpoint folder as LeRobot saves it, tiny and made offline; its stock twin; what LeRobot's pipelines feed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from smolvla_fast.testing.policies import make_policy
from smolvla_fast.verify import rel_l2 as rel_l2

TASK = "pick up the red cube"


class Checkpoint(NamedTuple):
    """path: what ``--policy.path`` takes."""

    path: Path

    def load(self) -> Any:
        """The policy, unpatched."""
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        return SmolVLAPolicy.from_pretrained(self.path)

    def pipelines(self, policy: Any) -> tuple[Any, Any]:
        from lerobot.policies.factory import make_pre_post_processors

        return make_pre_post_processors(policy.config, pretrained_path=str(self.path))


def save_checkpoint(folder: Path, **config: Any) -> Checkpoint:
    """Writes weights, configuration and processors of a tiny policy, and the VLM folder that they name."""
    from lerobot.policies.smolvla.processor_smolvla import make_smolvla_pre_post_processors

    policy = make_policy("tiny", folder=folder / "vlm", **config)
    policy.save_pretrained(folder / "policy")
    for pipeline in make_smolvla_pre_post_processors(policy.config, None):
        pipeline.save_pretrained(folder / "policy")
    return Checkpoint(folder / "policy")


def fix_noise(policy: Any, noise: Tensor) -> None:
    """Has a policy start every chunk from one noise, so that calls in any thread and order can be compared."""
    policy.model.sample_noise = lambda shape, device: noise[: shape[0]].to(device)


def copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
